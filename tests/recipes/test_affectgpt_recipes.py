"""The recipes as a user runs them, on a few small clips and tiny models, in processes of their own."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from affectgpt.cli import main
from affectgpt.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
SMALL = {
    "data.layout.clips": "[24, 6]",
    "data.validation_fraction": "0.25",
    "cold_start.max_steps": "4",
    "cold_start.eval_steps": "2",
    "cold_start.prompts_per_step": "8",
    "rollout.group_size": "4",
    "rollout.max_new_tokens": "12",
    "run.max_steps": "4",
    "run.prompts_per_step": "6",
    "run.eval_steps": "2",
    "run.save_steps": "2",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "clips", seed=0, train=24, test=6, workers=1)


@pytest.fixture(scope="module")
def parts(clips, tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, tmp_path_factory) -> dict[str, str]:
    """Options that name the clips, the tiny models and one feature cache."""
    return {
        "data.root": str(clips),
        "data.cache_dir": str(tmp_path_factory.mktemp("features")),
        "model.llm": str(tiny_llm_folder),
        "model.visual_encoder": str(tiny_clip_folder),
        "model.audio_encoder": str(tiny_hubert_folder),
    }


def command(recipe: str, options: dict[str, str], ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    return [sys.executable, *launcher, str(ROOT / "recipes" / recipe), *flags]


def run(recipe: str, options: dict[str, str], ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(command(recipe, options, ranks), capture_output=True, text=True, timeout=300, check=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A whole small run, and its options."""
    options = SMALL | parts | {"run.output_dir": str(tmp_path_factory.mktemp("runs"))}
    result = run("affectgpt_r1.py", options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "GRPO, clips swapped" in result.stdout
    return Path(options["run.output_dir"]) / "demo-seed0", options


def test_a_whole_run_leaves_scores_curves_answers_a_report_and_a_model(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    rows = ("untrained", "cold_start", "sft_continued", "grpo", "shuffled_media")
    assert summary.keys() >= {"seed", *(f"{row}_f1" for row in rows)}
    assert all(0 <= summary[f"{row}_f1"] <= 100 for row in rows)
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert {"reward", "kl", "entropy", "completions/mean_length", "rewards/accuracy/mean"} <= metrics[0].keys()
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    completions = lines(folder / "completions.jsonl")
    assert len(completions) == 4 * 6 * 4
    assert completions[0].keys() >= {"prompt_id", "text", "labels", "rewards", "reward", "advantage", "ground_truth"}
    for row in rows:
        evaluation = json.loads((folder / "evaluations" / f"{row}.json").read_text())
        assert 100 * evaluation["f1"] == pytest.approx(summary[f"{row}_f1"])
        assert len(evaluation["samples"]) == 6
    assert "<svg" in (folder / "report.html").read_text()


def test_a_report_written_again_is_the_first_one_byte_for_byte(finished):
    folder, _ = finished
    first = (folder / "report.html").read_bytes()
    assert b"data:image/jpeg" in first
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == first


def test_the_saved_model_scores_what_the_run_reported(finished, tmp_path):
    folder, options = finished
    keep = ("data.root", "data.cache_dir", "rollout.max_new_tokens")
    common = {key: options[key] for key in keep} | {
        "model.path": str(folder / "model"),
        "run.output_dir": str(tmp_path),
    }
    earlier = tmp_path / "run" / "evaluations" / "evaluation.json"  # of another model, say: it stays
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    result = run("evaluate.py", common | {"data.labels": "track2_test.csv"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert earlier.read_text() == "{}"
    evaluation = json.loads(earlier.with_name("evaluation-2.json").read_text())
    reported = json.loads((folder / "evaluations" / "grpo.json").read_text())
    assert evaluation["samples"] == reported["samples"]
    assert f"{100 * reported['f1']:8.2f}" in result.stdout

    output = tmp_path / "answers.csv"
    result = run("predict.py", common | {"data.labels": "track2_test.csv", "output": str(output)})
    assert result.returncode == 0, result.stderr[-3000:]
    with output.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["name"]: row["openset"] for row in rows} == {
        sample["name"]: f"[{', '.join(sample['labels'])}]" for sample in reported["samples"]
    }


def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path):
    folder, options = finished
    options = options | {"run.output_dir": str(tmp_path)}
    process = subprocess.Popen(
        command("affectgpt_r1.py", options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "demo-seed0" / "checkpoints" / "step-000002"
    deadline = time.monotonic() + 240
    while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_dir()
    assert not (tmp_path / "demo-seed0" / "finished.json").exists()
    result = run("affectgpt_r1.py", options)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = "model/affectgpt.safetensors"
    assert (tmp_path / "demo-seed0" / weights).read_bytes() == (folder / weights).read_bytes()
    assert (tmp_path / "demo-seed0" / "summary.json").read_text() == (folder / "summary.json").read_text()
    one, two = (lines(path / "completions.jsonl") for path in (folder, tmp_path / "demo-seed0"))
    assert one == two


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def start(options: dict[str, str]) -> int:
    """The recipe in this process: its imports are made already."""
    return main(["train", *(part for key, value in options.items() for part in (f"--{key}", value))])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model.path": "no_model"}, "no_model"), ({"data.labels": "track9.csv"}, "track9.csv")],
    ids=("model", "labels"),
)
def test_a_mistyped_path_leaves_a_finished_run_as_it_is(finished, capsys, change, message):
    folder, options = finished
    kept = contents(folder)
    for _ in range(2):
        # of a real data set: an option of synthetic clips would say so first
        changed = {key: value for key, value in options.items() if key != "data.layout.clips"}
        assert start(changed | {"data.format": "mer2025"} | change) != 0
        assert message in capsys.readouterr().err
    assert contents(folder) == kept
    assert {path.name for path in folder.parent.iterdir()} <= {"demo-seed0", "synthetic"}


def test_a_run_killed_while_it_wrote_its_report_is_finished_by_the_same_command(
    finished, tmp_path, capsys, monkeypatch
):
    """And a report that fails costs neither the run nor its exit status."""
    folder, options = finished
    again = shutil.copytree(folder, tmp_path / "demo-seed0")
    (again / "finished.json").unlink()
    (again / "report.html").unlink()
    kept = contents(again)

    def fails(*arguments, **options):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("affectgpt.report.write_report", fails)
    assert start(options | {"run.output_dir": str(tmp_path)}) == 0
    captured = capsys.readouterr()
    assert "warning: the report was not written (RuntimeError: no fonts): the run is whole, and `affectgpt report" in (
        captured.err
    )
    assert captured.out.splitlines()[0] == f"run folder: {again}, going on at step 4"
    assert captured.out.splitlines()[-1] == f"run folder: {again}"
    now = contents(again)
    same = [name for name in kept if name not in ("sessions.jsonl", "config.yaml")]
    assert {name: now[name] for name in same} == {name: kept[name] for name in same}
    assert json.loads(now["finished.json"])["max_steps"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["demo-seed0"]


def test_two_ranks_in_think_mode_with_the_format_reward_and_one_of_the_users(finished, tmp_path):
    _, options = finished
    (tmp_path / "mine.py").write_text("def length(completion, labels): return len(completion) / len(labels)\n")
    options = options | {
        "run.output_dir": str(tmp_path),
        "prompt.mode": "think",
        "reward.names": f"[accuracy, format, {tmp_path}/mine.py:length]",
        "controls": "false",
        "algorithm.reward_weights": "{format: 0.2, length: 0.5}",
    }
    result = run("affectgpt_r1.py", options, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (first, *_) = lines(tmp_path / "demo-seed0" / "metrics.jsonl")
    assert first["reward"] == pytest.approx(
        first["rewards/accuracy/mean"] + 0.2 * first["rewards/format/mean"] + 0.5 * first["rewards/length/mean"],
        abs=1e-9,
    )
    completions = lines(tmp_path / "demo-seed0" / "completions.jsonl")
    assert len({row["prompt_id"] for row in completions if row["step"] == 1}) == 6
    for row in completions:
        assert row["rewards"]["length"] == pytest.approx(len(row["text"]) / len(row["ground_truth"]))


def test_one_unreadable_clip_is_reported_and_skipped(finished, clips, tmp_path):
    _, options = finished
    broken = tmp_path / "clips"
    shutil.copytree(clips, broken)
    (broken / "video" / "sample_00000003.mp4").write_bytes(b"no video")
    (broken / "openface_face" / "sample_00000003" / "sample_00000003.npy").write_bytes(b"no faces")
    options = options | {"data.root": str(broken), "run.output_dir": str(tmp_path)}
    del options["data.layout.clips"]  # an option of synthetic clips, which a damaged folder cannot pass for
    options["data.format"] = "mer2025"
    result = run("affectgpt_r1.py", options | {"controls": "false", "run.max_steps": "1", "cold_start.max_steps": "2"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("sample_00000003.npy") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.learning_rat": "1"}, "learning_rate"),
        ({"data.root": "nowhere", "data.format": "mer2025"}, "nowhere"),
        ({"data.labels": "track9.csv", "data.format": "mer2025"}, "track9.csv"),
        ({"model.path": "no_model"}, "no_model"),
        ({"rollout.group_size": "1"}, "group_size"),
        ({"reward.names": "[accuracy, format]"}, "prompt.mode"),
        ({"metric.emotion_wheel": "no_tables"}, "no_tables"),
    ],
)
def test_bad_input_stops_before_work_with_the_key_or_file_and_no_traceback(finished, tmp_path, change, message):
    _, options = finished
    options = options | {"run.output_dir": str(tmp_path)} | change
    if "data.format" in change:
        del options["data.layout.clips"]
    result = run("affectgpt_r1.py", options)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
