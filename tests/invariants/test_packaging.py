"""The three packages depend on each other in one direction only, and each on no more than it may."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import grpo_core
import grpo_kernels
from tests.names import missing_name

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "grpo_kernels": ROOT / "kernels/grpo_kernels",
    "grpo_core": ROOT / "grpo_core",
    "affectgpt": ROOT / "model/affectgpt",
}
# numpy is what Triton's interpreter computes with, and the interpreter is for tests: no kernel needs it
# flash_attn is used where it is installed; torch's own operators serve elsewhere
EXCEPTIONS = {
    ("kernels/grpo_kernels/testing/interpreter.py", "numpy"),
    ("kernels/grpo_kernels/attention/group_attention.py", "flash_attn"),
}
KERNELS_MAY = {"torch", "triton", "grpo_kernels"}
CORE_MAY = KERNELS_MAY | {"transformers", "peft", "numpy", "safetensors", "tqdm", "yaml", "grpo_core"}
MAY = {"grpo_kernels": KERNELS_MAY, "grpo_core": CORE_MAY}
OURS = {"grpo_kernels", "grpo_core", "affectgpt", "recipes", "bench", "tests", "kernels", "model"}


def imports(path):
    """(line, top-level module) of every absolute import in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.partition(".")[0]


def test_the_import_reader_sees_imports_inside_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os.path\ndef f():\n    from torch.nn import Linear\n    from . import x\n")
    assert list(imports(path)) == [(1, "os"), (3, "torch")]


@pytest.mark.parametrize("package", MAY)
def test_engine_and_kernels_import_only_what_a_gpu_image_has(package):
    allowed = MAY[package] | sys.stdlib_module_names
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imports(path)
        if name not in allowed and (path.relative_to(ROOT).as_posix(), name) not in EXCEPTIONS
    ]
    assert not found, f"{package} may import {', '.join(sorted(MAY[package]))} only; found\n" + "\n".join(found)


def test_affectgpt_imports_no_script():
    allowed = {"grpo_kernels", "grpo_core", "affectgpt"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(PACKAGES["affectgpt"].rglob("*.py"))
        for line, name in imports(path)
        if name in OURS - allowed
    ]
    assert not found


def modules_after(statement):
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_all_of_grpo_kernels_brings_neither_transformers_nor_our_other_packages():
    root = PACKAGES["grpo_kernels"]
    paths = [path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py")) if path.stem != "__init__"]
    names = [".".join(path.parts) for path in paths]
    loaded = modules_after("\n".join(["import grpo_kernels", *(f"import grpo_kernels.{name}" for name in names)]))
    assert "grpo_kernels" in loaded
    assert not loaded & {"transformers", "peft", "grpo_core", "affectgpt"}


def test_configuration_needs_no_torch():
    """So that `--help` and a misspelt key answer at once."""
    assert "torch" not in modules_after("import grpo_core.config.loader")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_modules_is_a_package_that_setup_finds(package):
    folders = {path.parent for path in PACKAGES[package].rglob("*.py")}
    assert folders
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_are_in_rooms_of_the_same_names_as_modules(package):
    tests = ROOT / "tests" / package
    rooms = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert len(rooms) > 4
    assert not {str(room) for room in rooms if not (PACKAGES[package] / room / "__init__.py").is_file()}


def test_no_folder_hides_another_project():
    """A package `kernels` would shadow the one transformers imports, and `model` is nobody's to claim."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "model/__init__.py").exists()


def test_version_is_the_same_everywhere():
    """In `grpo_kernels` (setup.py reads it there), the changelog's newest release, and `grpo_core` if it has one."""
    version = grpo_kernels.__version__
    releases = re.findall(r"^## \[?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0] == version
    assert getattr(grpo_core, "__version__", version) == version


def test_every_move_in_the_changelog_ends_at_a_name_that_exists():
    rows = re.findall(
        r"^\| `([\w.]+)` \| `([\w.]+)`", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 30
    assert not [new for _, new in rows if missing_name(new)]


def test_make_clean_deletes_nothing_that_a_user_made():
    done = subprocess.run(["make", "-n", "clean"], capture_output=True, text=True, check=True, cwd=ROOT)
    deleted = done.stdout.split()
    assert ".pytest_cache" in deleted
    assert not {"runs", "runs/", "gpu_round", "bench/results"} & set(deleted)


def test_what_ruff_and_mypy_find_is_what_pre_commit_finds_and_needs_no_download():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = {hook["entry"].removesuffix(" --force-exclude") for hook in hooks[0]["hooks"]}
    lint = subprocess.run(["make", "-n", "lint"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    commands = {line.removesuffix(" .") for line in lint.splitlines() if "ruff" in line or "mypy" in line}
    assert entries == commands


def test_the_docs_environment_has_what_the_extra_names():
    """The Makefile installs it without the package, and so names it again."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extra = re.findall(r'"([\w-]+(?:\[\w+\])?)', re.search(r'"docs": \[(.+?)\],\n', setup)[1])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"\.venv-docs/bin/\$\(PIP_INSTALL\) (.+)", makefile)[1]
    assert shlex.split(line) == extra


def test_mypy_checks_functions_but_no_kernels(tmp_path):
    """By the stub in .ci/typings: a `@triton.jit` body is skipped, its launch allowed, all else is checked."""
    (tmp_path / "snippet.py").write_text(
        "import triton\n"
        "import triton.language as tl\n"
        "@triton.jit\n"
        "def kernel(x, N: tl.constexpr):\n"
        "    tl.store(x, N.no_such_thing + 1 + 'a')\n"
        "def launch(x: int) -> None:\n"
        "    kernel[(1,)](x, N=2)\n"
        "def forgotten(x):\n"
        "    return x\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    found = subprocess.run([*command, tmp_path / "snippet.py"], capture_output=True, text=True, cwd=ROOT).stdout
    errors = [line for line in found.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "snippet.py:8" in errors[0]
    assert "no-untyped-def" in errors[0]
