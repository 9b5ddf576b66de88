"""What is written to metrics.jsonl survives a kill and a resume."""

import json
import math

import numpy as np
import pytest
import torch

from grpo_core.storage.metrics_writer import MetricsWriter


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_lines_are_strict_json_of_any_number_type(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(
        1, {"kl": math.nan, "ratio": -math.inf, "n": np.int64(3), "x": np.float32(0.5), "t": torch.tensor([1.5])}
    )
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": None, "ratio": None, "n": 3, "x": 0.5, "t": [1.5]}]


def test_resume_drops_later_steps_and_a_torn_end_and_continues(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(5):
        writer.write(step, {"reward": step / 8})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])  # a power cut in the last line
    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.write(3, {"reward": 9})
    writer.close()
    assert [(row["step"], row["reward"]) for row in read(path)] == [(0, 0), (1, 0.125), (2, 0.25), (3, 9)]


def test_a_new_run_starts_an_empty_file(tmp_path):
    MetricsWriter(tmp_path).write(1, {"reward": 1})
    MetricsWriter(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
