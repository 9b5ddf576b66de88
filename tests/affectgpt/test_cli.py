"""The `affectgpt` command: what it lists, how fast it answers, which status it exits with, and what plug-ins reach."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import affectgpt
import grpo_kernels
from affectgpt import cli
from affectgpt.cli import COMMANDS, main
from affectgpt.config import MOVED_KEYS, R1Config, TaskConfig
from affectgpt.data.datasets import LAYOUTS, Sample, load_folder
from affectgpt.pipeline import load_samples
from affectgpt.rewards import REWARDS
from grpo_core.config.loader import ConfigError, load_config
from grpo_core.errors import InputError

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "av"}
LAYOUT = """
from __future__ import annotations
from pathlib import Path
from affectgpt.data.datasets import Sample, register_layout

@register_layout("clips_by_split")
class Splits:
    '''Clips in one folder per split.'''

    split: str = "train"
    '''Which folder is read.'''

    def load(self, root: Path, *, labels, reasons, labelled):
        return [Sample(path.stem, path, None, None, labels=labels) for path in sorted((root / self.split).iterdir())]
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sft", "--help"], ["ablations", "--help"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys\nfrom affectgpt.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', *({HEAVY} & sys.modules.keys()))"
    )
    done = python(code, *arguments)
    assert "usage: affectgpt" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("loaded:")


def test_a_mistyped_key_is_refused_before_torch_is_imported():
    code = f"import sys\nfrom affectgpt.cli import main\nprint(main(sys.argv[1:]), *({HEAVY} & sys.modules.keys()))"
    done = python(code, "train", "--optim.learning_rat", "1")
    assert done.stdout.split() == ["2"]
    assert done.stderr.startswith("error: unknown key 'optim.learning_rat'")


def test_a_mistyped_model_folder_is_refused_before_torch_is_imported(tmp_path):
    code = f"import sys\nfrom affectgpt.cli import main\nprint(main(sys.argv[1:]), *({HEAVY} & sys.modules.keys()))"
    done = python(code, "train", "--model.llm", "Qwen/Qwen2.5-7B", "--run.output_dir", str(tmp_path / "runs"))
    assert done.stdout.split() == ["2"]
    assert done.stderr.startswith("error: model.llm: there is no folder Qwen/Qwen2.5-7B, and nothing is downloaded")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "sft", "evaluate", "predict"])
def test_every_command_names_a_folder_that_holds_no_model(command, tmp_path, tiny_llm_folder, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for option, folder, words in (
        ("model.path", tmp_path / "gone", "gone holds no AffectGPT (affectgpt.json): give one that"),
        (
            "model.path",
            tiny_llm_folder,
            "holds no AffectGPT (affectgpt.json): if it is a causal LM, give it as model.llm",
        ),
        ("model.llm", tmp_path / "adapter", "holds an adapter, not a whole model"),
        ("model.visual_encoder", tmp_path, "has no config.json"),
        ("model.audio_encoder", tmp_path / "gone", "there is no folder"),
    ):
        assert main([command, f"--{option}", str(folder), "--run.output_dir", str(tmp_path / "runs")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {option}: ")
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_importing_the_package_needs_nothing_and_every_public_name_is_there():
    done = python(f"import affectgpt, sys\nprint(*({HEAVY | {'numpy'}} & sys.modules.keys()))")
    assert done.stdout.split() == []
    assert all(hasattr(affectgpt, name) for name in affectgpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'AffectGTP'"):
        _ = affectgpt.AffectGTP


def test_the_version_is_the_distributions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"affectgpt {grpo_kernels.__version__}\n"


def test_the_list_has_every_command_and_a_typo_is_met_with_the_nearest(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+)", capsys.readouterr().out, re.MULTILINE)
    commands = ["train", "sft", "evaluate", "predict", "ablations", "report", "wheel", "synthetic"]
    assert listed == list(COMMANDS) == commands
    assert main(["evalute"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'evalute': did you mean 'evaluate'?\n"


def test_every_recipe_is_the_command():
    names = {"affectgpt_r1": "train", "affectgpt_sft": "sft"}
    for path in (ROOT / "recipes").glob("*.py"):
        assert f'main(["{names.get(path.stem, path.stem)}", *sys.argv[1:]])' in path.read_text()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("refused"), 2, "refused"),
        (InputError("unreadable"), 2, "unreadable"),
        (NotImplementedError("a model of another kind"), 2, "a model of another kind"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv: No such file or directory"),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (OSError(28, "No space left on device", "runs/r1"), 1, "runs/r1: No space left on device"),
    ],
)
def test_mistakes_are_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(fail, ""))
    assert main(["train"]) == status
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_reward_that_cannot_be_imported_stops_before_the_runs_folder(tmp_path, capsys):
    arguments = [
        "--reward.names",
        f"[accuracy, {tmp_path}/mine.py:brevity]",
        "--run.output_dir",
        str(tmp_path / "runs"),
    ]
    assert main(["train", *arguments]) == 2
    assert re.fullmatch(r"error: reward .*mine\.py:brevity: there is no file .*mine\.py\n", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


# --- layouts -----------------------------------------------------------------------------------------------------


def test_a_layout_of_a_plugin_works_from_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(LAYOUT)
    (tmp_path / "clips" / "test").mkdir(parents=True)
    (tmp_path / "clips" / "test" / "a.mp4").touch()
    options = ["--data.format", "clips_by_split", "--data.root", str(tmp_path / "clips")]
    options += ["--data.layout.split", "test", "--data.labels", "sad"]
    try:
        config = load_config(TaskConfig, ["--plugins", str(tmp_path / "mine.py"), *options])
        video = tmp_path / "clips" / "test" / "a.mp4"
        assert load_samples(config.data) == [Sample("a", video, None, None, labels="sad")]
        with pytest.raises(
            ConfigError, match=r"data\.layout\.splt .* not an option of format clips_by_split: .* split"
        ):
            load_config(TaskConfig, [*options, "--data.layout.splt", "test"])
    finally:
        LAYOUTS._entries.pop("clips_by_split", None)


def test_layouts_load_what_their_functions_load_and_know_whether_labels_are_wanted(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text("name,openset\na,happy\n")
    options = ["--data.format", "folder", "--data.root", str(tmp_path), "--data.labels", "labels.csv"]
    data = load_config(TaskConfig, options).data
    # the table says which clips are meant: a test set may lie in the folder of the training set
    assert load_samples(data) == load_folder(tmp_path, "labels.csv")[:1]
    assert [sample.labels for sample in load_samples(data, labelled=False)] == [None, None]


def test_options_of_layouts_that_moved_say_where_they_are():
    for old, new in MOVED_KEYS.items():
        with pytest.raises(ConfigError, match=f"{re.escape(old)} .*is now {re.escape(new)}"):
            load_config(R1Config, [f"--{old}", "1"])
    with pytest.raises(ConfigError, match=r"data\.layout\.clips .* is not an option of format mer2025"):
        load_config(R1Config, ["--data.layout.clips", "[2, 2]"])


@pytest.mark.parametrize(("registry", "page"), [(LAYOUTS, "data.md"), (REWARDS, "rewards.md")])
def test_the_docs_table_has_every_entry(registry, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    ours = [name for name in registry if registry[name].__module__.startswith("affectgpt.")]  # not other tests' entries
    assert len(ours) > 3
    assert [name for name in ours if f"| `{name}` |" not in text] == []
