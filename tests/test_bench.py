"""The benchmarks run, and what they compare is equal."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # tests run beside each other
SIZES = ["--prompt-tokens", "24", "--completion-tokens", "6", "--group-size", "4", "--device", "cpu"]
ONE_STEP = ["--steps", "1"]


def run(name, tmp_path, *arguments):
    command = [sys.executable, BENCH / name, *SIZES, "--json", tmp_path / "out.json", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "out.json").read_text())


def test_a_training_step_over_shared_prompts_has_the_gradient_of_dense_copies(tmp_path):
    (row,) = run("train_step.py", tmp_path, *ONE_STEP)["rows"]
    assert row["gradient_difference"] < 1e-5
    # 24 + 4·6 tokens instead of 4·30, but for the head, which is the same
    assert 1.2 < row["floor"] < 2.5


def test_a_step_is_timed_with_and_without_sharing(tmp_path):
    result = run("grpo_step.py", tmp_path, *ONE_STEP, "--prompts", "2", "--contenders", "ours", "without_sharing")
    for name in ("ours", "without_sharing"):
        assert result[name]["seconds"] >= sum(result[name]["phases"].values()) * 0.9 > 0
        assert result[name]["peak_bytes"] > 0


def test_a_rollout_is_timed_beside_generate_and_its_floor(tmp_path):
    arguments = ("--prompts", "1", "3", "--rounds", "1", "--contenders", "ours", "generate")
    rows = run("rollout.py", tmp_path, *arguments)["rows"]
    for row, prompts in zip(rows, (1, 3), strict=True):
        assert row["ratio"] == pytest.approx(row["seconds"]["generate"] / row["seconds"]["ours"])
        assert 0 < row["of_floor"] < 1.5
        # keys and values of 4 layers, 2 heads of 64, float32
        assert row["kv_bytes"] == 4 * 2 * 2 * 64 * 4 * prompts * (24 + 4 * 6)
        assert row["kv_bytes_without_sharing"] == 4 * 2 * 2 * 64 * 4 * prompts * 4 * (24 + 6)


# What one GRPO step may be made of; lower them as the step gets simpler, and never raise them without saying why.
# 31 and 150 since a signal may end a step between micro-batches or blocks of decode steps: one file, five functions.
# 151 since one function bounds the ratio for engine and kernels: float32 overflowed, and a clipped token was NaN.
MOST_FILES, MOST_FUNCTIONS = 31, 151


def test_a_step_can_be_walked_through(tmp_path):
    """Few files and functions of ours are executed by one step, and the step's own stages are among them."""
    command = [sys.executable, BENCH / "walk.py", "--json", tmp_path / "walk.json"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=ONE_THREAD)
    walk = json.loads((tmp_path / "walk.json").read_text())
    assert walk["files"] <= MOST_FILES
    assert walk["functions"] <= MOST_FUNCTIONS
    by_file = walk["by_file"]
    assert "GRPOTrainer.step" in by_file["grpo_core/training/grpo.py"]["functions"]
    assert "linear_logprob" in by_file["grpo_kernels/lm_head/logprob.py"]["functions"]  # kernels are traced too
    assert walk["functions"] == sum(len(file["functions"]) for file in by_file.values())


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: `make test-peers` installs it")
def test_a_step_is_timed_beside_trl(tmp_path):
    result = run("grpo_step.py", tmp_path, *ONE_STEP, "--prompts", "2", "--contenders", "ours", "trl")
    assert result["ratio"] == pytest.approx(result["trl"]["seconds"] / result["ours"]["seconds"])


def test_a_gpu_that_is_not_there_is_a_mistake_in_the_arguments(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    common = importlib.import_module("common")
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    common.add_device(parser)
    assert parser.parse_args([]).device == "cpu"
    with pytest.raises(SystemExit) as leaving:
        parser.parse_args(["--device", "cuda"])
    assert leaving.value.code == 2
    assert "argument --device: this machine has no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["bench/common.py", "recipes/examples/trl_trainer.py"])
def test_a_file_to_import_says_so_when_it_is_run(file):
    source = (BENCH.parent / file).read_text()
    assert source.rstrip().splitlines()[-2] == 'if __name__ == "__main__":'
    assert 'raise SystemExit("this file holds' in source.rstrip().splitlines()[-1]
