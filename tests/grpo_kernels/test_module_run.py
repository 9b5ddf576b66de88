"""`python -m` of a module that is no program is refused, not a status of 0 after nothing."""

import pkgutil
import subprocess
import sys

import pytest

import affectgpt
import grpo_core
import grpo_kernels
from grpo_kernels._module_run import refuse_module_run

PACKAGES = (affectgpt, grpo_core, grpo_kernels)
MODULES = [
    (package, module.name)
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.ispkg
]


def run(package, *command: str) -> None:
    refuse_module_run(package.__name__, package.__path__[0], ["python", *command])


def test_every_module_is_a_program_or_refused(capsys):
    mains = [name for _, name in MODULES if name.endswith(".__main__")]
    assert sorted(mains) == [f"affectgpt{room}.__main__" for room in ("", ".emotion_wheel", ".report", ".synthetic")]
    programs = [*mains, "grpo_core.report"]  # a module with a guard
    assert "affectgpt.modeling.official" in {name for _, name in MODULES}
    for package, name in MODULES:
        if name in programs:
            run(package, "-m", name)
            run(package, "-m", name.removesuffix(".__main__"))
            continue
        with pytest.raises(SystemExit) as leaving:
            run(package, "-m", name)
        assert leaving.value.code == 2
        assert f"error: {name} is a module to import and no program" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "pytest", "-m", "affectgpt.cli"),
        ("-m", "affectgpt.nowhere"),
        ("-m", "affectgpt"),
        ("-m", "affectgpt_tools.cli"),
        ("-c", "import affectgpt.cli"),
        ("script.py", "-m", "affectgpt.cli"),
        ("-X", "importtime", "script.py"),
        (),
    ],
)
def test_other_commands_are_left_alone(command):
    run(affectgpt, *command)


@pytest.mark.parametrize(
    "command", [("-maffectgpt.cli",), ("-I", "-Bm", "affectgpt.cli"), ("-X", "dev", "-m", "affectgpt.cli")]
)
def test_all_ways_to_ask_for_a_module_are_seen(command):
    with pytest.raises(SystemExit):
        run(affectgpt, *command)


def test_the_message_lists_what_can_be_run(capsys):
    with pytest.raises(SystemExit):
        run(grpo_core, "-m", "grpo_core.policy")
    assert capsys.readouterr().err.endswith("the programs here are python -m grpo_core.report\n")


def test_the_interpreter_is_stopped_before_anything_is_imported():
    command = [sys.executable, "-m", "affectgpt.modeling.official"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "the programs here are python -m affectgpt," in done.stderr
