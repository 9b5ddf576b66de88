"""A start continues its own run, refuses another one's, and never deletes or moves what it finds."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from grpo_core.config.fields import ConfigError, ConfigSection
from grpo_core.config.loader import load_config, to_dict
from grpo_core.config.options import GRPOConfig, RunConfig
from grpo_core.distributed import Distributed
from grpo_core.storage.run_folder import changed_options, newest_folder, open_run


@dataclass(kw_only=True)
class Config(GRPOConfig):
    """Options as the text recipe has them."""

    data: Path = Path("prompts.jsonl")
    judge: Path | None = None
    reward: tuple[str, ...] = ("rewards.py:share",)


@pytest.fixture
def config(tmp_path):
    """Options of the run `runs/r1`, read as from the command line."""

    def read(*flags: str) -> Config:
        return load_config(Config, ["--run.output_dir", str(tmp_path / "runs"), "--run.name", "r1", *flags])

    return read


def begin(config, step=0, finish=False):
    """Start a run, make steps, and end it or have it killed."""
    run = open_run(config, Distributed())
    run.begin()
    if step:
        (run.path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (run.path / "checkpoints" / f"step-{step:06d}" / "trainer_state.json").write_text("{}")
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.finish() if finish else run.release()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks, which say who looked last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.lock")
    return {str(path): path.read_bytes() for path in files}


# --- an unfinished run -------------------------------------------------------------------------------------------


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_micro_batches_twice(config, capsys):
    first = begin(config(), step=40)
    capsys.readouterr()
    for before, now in ((16384, 8192), (8192, 4096)):
        again = begin(config("--max_tokens_per_micro_batch", str(now)))
        assert again.path == first.path
        assert (again.path / "checkpoints/step-000040").is_dir()
        assert (again.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
        key = "optim.max_tokens_per_micro_batch"
        assert f"{key} was {before} and is {now} from step 40 on" in capsys.readouterr().out
    sessions = [json.loads(line) for line in (first.path / "sessions.jsonl").read_text().splitlines()]
    assert [session["position"] for session in sessions] == ["step 0", "step 40", "step 40"]
    assert sessions[2]["changes"] == [{"key": key, "before": "8192", "now": "4096", "free": True}]
    assert yaml.safe_load((first.path / "config.yaml").read_text())["optim"]["max_tokens_per_micro_batch"] == 4096


def test_a_numbered_run_goes_on_without_a_word_about_its_name(config, capsys):
    begin(config(), step=40, finish=True)
    second = begin(config(), step=7)
    capsys.readouterr()
    again = begin(config())
    assert again.path == second.path == again.path.with_name("r1-2")
    assert again.changes == []
    assert capsys.readouterr().out == f"run folder: {again.path}, going on at step 7\n"
    begin(config("--weight_decay", "0.1", "--accept_changes", "weight_decay"))
    assert "accept_changes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ("--save_steps", "5"),
        ("--keep_checkpoints", "5"),
        ("--eval_steps", "5"),
        ("--trackers", "tensorboard"),
        ("--max_steps", "500"),
        ("--max_steps", "50"),
        ("--lock_timeout", "1"),
        ("--check_first_step", "false"),
        ("--data", "elsewhere/prompts.jsonl"),
        ("--reward", "/elsewhere/rewards.py:share"),
        ("--run.output_dir", "{parent}/../runs"),
    ],
    ids=lambda flags: flags[0].lstrip("-"),
)
def test_options_that_train_the_same_continue_the_run(config, flags, tmp_path):
    (tmp_path / "runs").mkdir()
    first = begin(config(), step=40)
    again = begin(config(*(flag.format(parent=tmp_path / "runs") for flag in flags)))
    assert os.path.samefile(again.path, first.path)


@pytest.mark.parametrize(
    ("flags", "key", "before", "now"),
    [
        (("--prompts_per_step", "8"), "run.prompts_per_step", "16", "8"),
        (("--run.seed", "1"), "run.seed", "0", "1"),
        (("--weight_decay", "0.1"), "optim.weight_decay", "0.0", "0.1"),
        (("--betas", "0.9,0.95"), "optim.betas", "0.9,0.999", "0.9,0.95"),
        (("--learning_rate", "1e-6"), "optim.learning_rate", "1e-05", "1e-06"),
        (("--lr_scheduler", "cosine"), "optim.lr_scheduler", "constant", "cosine"),
        (("--epsilon_high", "0.3"), "algorithm.loss.epsilon_high", "none", "0.3"),
        (("--loss_type", "cispo", "--cispo_cap", "3"), "algorithm.loss_type", "dapo", "cispo"),
        (("--reward", "rewards.py:other"), "reward", "rewards.py:share", "rewards.py:other"),
        (("--judge", "a/folder"), "judge", "none", "a/folder"),
        (("--algorithm.reward_weights.share", "2"), "algorithm.reward_weights", "{}", "{share: 2.0}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_train_otherwise_are_refused_by_key_and_taken_when_accepted(
    config, flags, key, before, now, capsys
):
    first = begin(config(), step=40)
    kept = contents(first.path)
    with pytest.raises(ConfigError) as refused:
        open_run(config(*flags), Distributed())
    message = str(refused.value)
    assert f"{first.path} holds an unfinished run (at step 40) of other options ({key} was {before} and is {now})" in (
        message
    )
    assert f"--run.accept_changes {key}" in message
    assert "\n" not in message
    assert contents(first.path) == kept
    capsys.readouterr()
    again = begin(config(*flags, "--run.accept_changes", key))
    assert again.path == first.path
    assert f"{key} was {before} and is {now} from step 40 on" in capsys.readouterr().out
    assert (first.path / "checkpoints/step-000040").is_dir()
    # accepted once: today's options are the run's now, and going back is another change
    assert begin(config(*flags)).path == first.path
    assert yaml.safe_load((first.path / "config.yaml").read_text())["run"]["accept_changes"] == []
    with pytest.raises(ConfigError, match=r"--run.accept_changes"):
        open_run(config(), Distributed())


@pytest.mark.parametrize("schedule", [("--lr_scheduler", "cosine"), ("--beta", "0.1", "--beta_end", "0")])
def test_another_length_is_refused_where_a_schedule_ends_at_it(config, schedule):
    begin(config(*schedule), step=40)
    with pytest.raises(ConfigError, match=r"run.max_steps was 100 and is 200"):
        open_run(config(*schedule, "--max_steps", "200"), Distributed())
    begin(config(*schedule, "--max_steps", "200", "--run.accept_changes", "run.max_steps"))


def test_an_evaluation_interval_that_chooses_the_model_is_refused(config):
    followed = ("--metric_for_best_model", "eval/f1")
    begin(config(*followed, "--eval_steps", "10"), step=40)
    with pytest.raises(ConfigError, match=r"run.eval_steps was 10 and is 20"):
        open_run(config(*followed, "--eval_steps", "20"), Distributed())


def test_all_changed_keys_are_named_and_a_section_accepts_its_keys(config):
    begin(config(), step=40)
    changes = ("--weight_decay", "0.1", "--betas", "0.9,0.95", "--run.seed", "3")
    with pytest.raises(ConfigError, match=r"--run\.accept_changes optim\.weight_decay,optim\.betas,run\.seed"):
        open_run(config(*changes), Distributed())
    begin(config(*changes, "--run.accept_changes", "optim,seed"))


def test_an_accepted_key_that_does_not_exist_is_refused(config):
    for step in (0, 40):
        with pytest.raises(ConfigError, match=r"run\.accept_changes names 'optim\.weight_deca'.*optim\.weight_decay"):
            open_run(config("--run.accept_changes", "optim.weight_deca"), Distributed())
        begin(config(), step=step)


def test_a_run_without_a_step_starts_again_with_the_options_given_now(config):
    first = begin(config())
    again = begin(config("--run.seed", "3"))
    assert again.path == first.path
    assert yaml.safe_load((again.path / "config.yaml").read_text())["run"]["seed"] == 3


def test_progress_of_an_earlier_stage_counts(config):
    run = begin(config())
    (run.path / "cold_start/checkpoints/step-000007").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"at step 7 of cold_start"):
        open_run(config("--run.seed", "3"), Distributed())


# --- a finished run ----------------------------------------------------------------------------------------------


def test_a_finished_run_stays_and_the_next_goes_beside_it_under_the_next_number(config, capsys):
    first = begin(config(), step=100, finish=True)
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder: {first.path}"
    kept = contents(first.path)
    second = begin(config(), step=40)
    assert second.path == first.path.with_name("r1-2")
    assert second.config.run.folder == second.path
    assert capsys.readouterr().out.startswith(f"run folder: {second.path}")
    # the latest number decides: it is unfinished, so it goes on, and other options are refused
    assert begin(config("--save_steps", "3")).path == second.path
    with pytest.raises(ConfigError, match=r"r1-2 holds an unfinished run"):
        open_run(config("--run.seed", "1"), Distributed())
    begin(config(), finish=True)
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder: {second.path}"
    third = begin(config("--run.seed", "1"), step=3)
    assert third.path == first.path.with_name("r1-3")
    assert contents(first.path) == kept
    assert newest_folder(first.path.parent, "r1") == third.path


def test_opening_changes_nothing_until_the_run_begins(config, tmp_path):
    open_run(config(), Distributed())
    assert not (tmp_path / "runs").exists()
    first = begin(config(), step=100, finish=True)
    kept = contents(tmp_path)
    for flags in ((), ("--run.seed", "1"), ("--data", "mistyped.jsonl")):
        open_run(config(*flags), Distributed())  # and then the model's folder is not found, say
    assert contents(tmp_path) == kept
    assert list((tmp_path / "runs").iterdir()) == [first.path]


def test_a_finished_run_goes_on_in_its_folder_if_it_is_only_longer(config):
    first = begin(config(), step=100, finish=True)
    longer = begin(config("--max_steps", "200", "--save_steps", "7"), step=150)
    assert longer.path == first.path
    assert begin(config("--max_steps", "200")).path == first.path  # unfinished again, although the old mark is there
    begin(config("--max_steps", "200"), finish=True)
    assert begin(config("--max_steps", "200")).path.name == "r1-2"


@pytest.mark.parametrize(
    "flags", [("--max_steps", "200", "--run.seed", "1"), ("--max_steps", "50"), ("--run.resume", "false")]
)
def test_a_finished_run_does_not_go_on_if_it_is_otherwise_another(config, flags):
    first = begin(config(), step=100, finish=True)
    assert begin(config(*flags)).path == first.path.with_name("r1-2")


def test_a_finished_run_of_a_schedule_goes_on_longer_only_if_that_is_accepted(config):
    linear = ("--lr_scheduler", "linear")
    first = begin(config(*linear), step=100, finish=True)
    longer = (*linear, "--max_steps", "200")
    assert open_run(config(*longer), Distributed()).path.name == "r1-2"
    assert begin(config(*longer, "--run.accept_changes", "run.max_steps")).path == first.path


def test_a_finished_run_without_a_checkpoint_is_not_made_again_over_its_files(config):
    first = begin(config(), finish=True)
    (first.path / "metrics.jsonl").write_text('{"step": 100}\n')
    assert begin(config("--max_steps", "200")).path.name == "r1-2"


def test_an_unfinished_run_stays_if_it_is_not_to_be_resumed(config):
    first = begin(config(), step=40)
    assert begin(config("--run.resume", "false")).path == first.path.with_name("r1-2")
    assert (first.path / "checkpoints/step-000040").is_dir()


def test_a_run_that_a_user_has_named_like_a_number_is_not_taken_for_one(config):
    begin(config(), step=100, finish=True)
    theirs = begin(config("--run.name", "r1-2", "--run.seed", "5"), step=7)
    kept = contents(theirs.path)
    assert begin(config()).path.name == "r1-3"
    assert contents(theirs.path) == kept


# --- other people's files ----------------------------------------------------------------------------------------


def test_a_folder_of_the_users_own_is_refused_and_not_touched(config, tmp_path):
    home = tmp_path / "home/project"
    (home / "model").mkdir(parents=True)
    (home / "model/weights.txt").write_text("mine")
    (home / "notes.txt").write_text("mine")
    kept = contents(home)
    for file in ("", "config.yaml"):
        if file:
            (home / file).write_text("colour: red\n")
            kept = contents(home)
        with pytest.raises(ConfigError, match=r"project holds .*, which a run would overwrite, and no config.yaml of"):
            open_run(config("--run.output_dir", str(home.parent), "--run.name", "project"), Distributed())
        assert contents(home) == kept


def test_files_of_the_program_count_as_what_it_would_overwrite(config, tmp_path):
    (tmp_path / "runs/r1/evaluations").mkdir(parents=True)
    open_run(config(), Distributed())
    with pytest.raises(ConfigError, match=r"holds evaluations, which a run would overwrite"):
        open_run(config(), Distributed(), writes=("evaluations",))


def test_an_empty_folder_and_one_with_a_log_in_it_are_fine(config, tmp_path):
    folder = tmp_path / "runs/r1"
    folder.mkdir(parents=True)
    begin(config())
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "slurm-123.out").write_text("log")
    assert begin(config(), step=3).path == folder
    assert (folder / "slurm-123.out").read_text() == "log"


@pytest.mark.parametrize("name", ["", "  ", ".", "..", "../x", "a/b", "a\\b", "a\nb", "/tmp/x"])
def test_a_name_is_a_name_and_no_path(name):
    with pytest.raises(ValueError, match=r"run.name is .*: give one plain name"):
        RunConfig(name=name)


def test_the_seed_in_a_name_is_the_runs():
    assert RunConfig(name="demo-seed{seed}", seed=3).folder == Path("runs/demo-seed3")


@pytest.mark.parametrize("file", ["runs", "runs/r1"])
def test_a_file_where_a_folder_should_be_is_named_before_anything_is_loaded(config, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(ConfigError, match=rf"{tmp_path / file} is not a folder, where the run's folder .* would be"):
        open_run(config(), Distributed())


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(config, tmp_path, monkeypatch):
    # root may write everywhere, whatever the mode
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} cannot be written .*: choose another --run.output_dir"):
        open_run(config(), Distributed())


def test_a_full_disk_at_the_start_is_one_sentence_with_the_path(config, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    run = open_run(config(), Distributed())
    monkeypatch.setattr("grpo_core.config.loader.write_text", full)
    with pytest.raises(ConfigError, match=r"r1/config.yaml cannot be written \(No space left on device\)"):
        run.begin()


# --- a damaged config, and those of earlier versions -------------------------------------------------------------


@pytest.mark.parametrize("damage", ["", "algorithm:\n  loss_type: da", "a: [1, 2", "- 1\n", None, "\udcff\udcfe"])
def test_a_damaged_config_is_said_and_its_run_never_starts_from_0(config, damage):
    first = begin(config("--run.seed", "3"), step=40)
    file = first.path / "config.yaml"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage.encode(errors="surrogateescape"))
    kept = contents(first.path)
    with pytest.raises(ConfigError, match=r"holds a run \(at step 40\) whose config.yaml .*: restore it, go on with"):
        open_run(config("--run.seed", "3"), Distributed())
    assert contents(first.path) == kept
    again = begin(config("--run.seed", "3", "--run.accept_changes", "config.yaml"))
    assert again.path == first.path
    assert (first.path / "checkpoints/step-000040").is_dir()
    assert begin(config("--run.seed", "3")).path == first.path  # the config is whole again


def test_a_config_is_written_whole_or_not_at_all(config, monkeypatch):
    first = begin(config("--run.seed", "3"), step=40)
    kept = (first.path / "config.yaml").read_text()

    def killed(self, target):
        raise KeyboardInterrupt

    run = open_run(config("--run.seed", "3", "--save_steps", "9"), Distributed())
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.begin()
    run.release()
    assert (first.path / "config.yaml").read_text() == kept


def earlier(config, summary=False) -> Path:
    """A folder as the version before left it: a config, but neither sessions nor a mark of its end."""
    folder = begin(config, step=40).path
    (folder / "sessions.jsonl").unlink()
    (folder / "run.lock").unlink()
    if summary:
        (folder / "summary.json").write_text("{}")
    return folder


def test_a_run_of_an_earlier_version_goes_on_although_options_were_added_since(config):
    folder = earlier(config())
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("accept_changes", "lock_timeout", "plugins"):
        del saved["run"][name]
    del saved["optim"]["eps"], saved["reward"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert begin(config()).path == folder
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["eps"] == 1e-8


def test_a_run_of_an_earlier_version_with_a_summary_is_finished(config):
    folder = earlier(config(), summary=True)
    kept = contents(folder)
    assert begin(config()).path.name == "r1-2"
    assert contents(folder) == kept
    shutil.rmtree(folder.with_name("r1-2"))
    assert begin(config("--max_steps", "200")).path == folder


def test_a_text_run_of_an_earlier_version_without_a_config_is_named_with_the_way_on(config):
    folder = earlier(config())
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is missing: .* --run.accept_changes config.yaml"):
        open_run(config(), Distributed())
    assert begin(config("--run.accept_changes", "config.yaml")).path == folder


def test_a_removed_option_is_shown_and_may_be_accepted(config):
    folder = begin(config(), step=40).path
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["optim"]["nesterov"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"optim.nesterov was true and is not set"):
        open_run(config(), Distributed())
    begin(config("--run.accept_changes", "optim.nesterov"))


# --- what is kept with a run -------------------------------------------------------------------------------------


def test_a_run_keeps_its_config_command_versions_and_machine(config):
    run = begin(config("--run.seed", "3"))
    assert load_config(Config, ["--config", str(run.path / "config.yaml")]) == run.config
    (session,) = [json.loads(line) for line in (run.path / "sessions.jsonl").read_text().splitlines()]
    assert session["pid"] == os.getpid()
    assert session["command"][0]
    assert {"python", "torch", "transformers", "numpy"} <= session["versions"].keys()
    assert (session["ranks"], session["device"]) == (1, "cpu")
    finished = begin(config("--run.seed", "3"), finish=True).path / "finished.json"
    assert json.loads(finished.read_text())["max_steps"] == 100


def test_every_default_compares_equal_with_itself():
    config = Config()
    assert changed_options(yaml.safe_load(yaml.safe_dump(to_dict(config))), config) == []


@dataclass
class Other(ConfigSection):
    """A config of a program that has nothing but a run."""

    run: RunConfig


def test_any_config_with_a_run_has_a_folder(tmp_path):
    run = begin(Other(RunConfig(output_dir=tmp_path)), step=3)
    assert begin(Other(replace(run.config.run, max_steps=200))).path == tmp_path / "run"
