"""A run that is killed at a random moment, and started again by the same command, is the run that nobody killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kills.py"


def kill(tmp_path, *arguments):
    command = [sys.executable, SCRIPT, "--json", tmp_path / "kills.json", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    kills = json.loads((tmp_path / "kills.json").read_text()) if (tmp_path / "kills.json").exists() else []
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not [each for each in kills if each["differences"]]
    return kills


def test_six_killed_runs_end_bit_for_bit_as_the_uninterrupted_ones(tmp_path):
    kills = kill(tmp_path, "--kills", "3", "--launch", "fork")
    assert len(kills) == 6
    assert {each["signal"] for each in kills} == {"SIGKILL", "SIGTERM"}
    assert {each["ranks"] for each in kills} == {1, 2}


@pytest.mark.long
def test_forty_killed_runs_end_bit_for_bit_as_the_uninterrupted_ones(tmp_path):
    kills = kill(tmp_path, "--kills", "20")
    for recipe in ("affectgpt_r1", "text_grpo"):
        some = [each for each in kills if each["recipe"] == recipe]
        assert [sum(each["signal"] == name for each in some) for name in ("SIGKILL", "SIGTERM")] == [10, 10]
        assert [sum(each["ranks"] == ranks for each in some) for ranks in (1, 2)] == [10, 10]
        assert len({each["aimed_at"] for each in some}) >= 5
