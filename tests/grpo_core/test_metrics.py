"""Metrics are true means over all data, and their files survive a kill and a resume."""

import json
import math

import numpy as np
import pytest
import torch

from grpo_core.config import RunConfig
from grpo_core.distributed import Distributed
from grpo_core.storage.jsonl import JsonLines
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.storage.trackers import TRACKERS
from grpo_core.training import accumulator as metrics
from grpo_core.training.accumulator import MetricAccumulator


def test_mean_is_over_values_and_not_over_calls():
    step = MetricAccumulator()
    step.mean("kl", torch.tensor([1.0, 2.0, 3.0]))
    step.mean("kl", 6.0)
    step.mean("masked", torch.tensor([[5.0, math.nan], [7.0, math.inf]]), torch.tensor([[True, False], [True, False]]))
    step.mean("weighted", np.array([1.0, 4.0]), np.array([2.0, 1.0]))
    assert step.reduce() == {"kl": 3.0, "masked": 6.0, "weighted": 2.0}


def test_sums_and_extremes():
    step = MetricAccumulator()
    for values in (torch.tensor([3, -1]), torch.empty(0), torch.tensor(9), 2.0):
        step.sum("tokens", values)
        step.max("longest", values)
        step.min("shortest", values)
    assert step.reduce() == {"tokens": 13.0, "longest": 9.0, "shortest": -1.0}


def test_nan_is_reported_and_not_hidden():
    step = MetricAccumulator()
    for kind in (step.mean, step.sum, step.max, step.min):
        kind(kind.__name__, torch.tensor([1.0, math.nan]))
        kind(kind.__name__, torch.tensor([2.0]))
    assert all(math.isnan(value) for value in step.reduce().values())


def test_metrics_without_data_are_nan_and_a_sum_is_zero():
    step = MetricAccumulator()
    for kind in ("mean", "max", "min", "sum"):
        step.register(kind, kind)
    values = step.reduce()
    assert values.pop("sum") == 0
    assert list(values) == ["mean", "max", "min"]
    assert all(math.isnan(value) for value in values.values())


def test_small_terms_are_not_lost_in_a_large_sum():
    step = MetricAccumulator()
    step.sum("tokens", torch.tensor(2.0**30))
    for _ in range(3):
        step.sum("tokens", torch.tensor(1.0))
    assert step.reduce()["tokens"] == 2**30 + 3


def test_reduce_starts_afresh_and_keeps_no_graph():
    step = MetricAccumulator()
    step.mean("loss", torch.ones(2, requires_grad=True) * 2)
    assert step.reduce() == {"loss": 2.0}
    assert step.reduce() == {}


def test_a_name_has_one_kind():
    step = MetricAccumulator()
    step.mean("kl", 1.0)
    with pytest.raises(ValueError, match="'kl' is a mean and cannot be a max too"):
        step.max("kl", 1.0)


def test_reduce_is_one_collective(monkeypatch):
    calls = []
    gather = metrics.gather_rows
    monkeypatch.setattr(metrics, "gather_rows", lambda row, dist: calls.append(row.shape) or gather(row, dist))
    step = MetricAccumulator()
    for i in range(60):
        getattr(step, ("mean", "sum", "max", "min")[i % 4])(f"metric {i}", torch.tensor([float(i)]))
    assert step.reduce() == {f"metric {i}": float(i) for i in range(60)}
    assert calls == [(1 + 2 * metrics.CAPACITY,)]


@pytest.mark.gpu
def test_adding_never_waits_for_the_device_and_reduce_waits_once(recwarn):
    step = MetricAccumulator(Distributed(device=torch.device("cuda", 0)))
    values = torch.arange(6.0, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            step.mean("masked", values, values > 3)
            for kind in (step.mean, step.sum, step.max, step.min):
                kind(kind.__name__, values)
                kind(kind.__name__, 1.0)
        torch.cuda.set_sync_debug_mode("warn")
        reduced = step.reduce()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reduced == {"masked": 4.5, "mean": 16 / 7, "sum": 32.0, "max": 5.0, "min": 0.0}
    assert sum("called a synchronizing CUDA operation" in str(warning.message) for warning in recwarn) == 1


def test_postfix_shows_only_what_was_reported():
    assert metrics.postfix({"reward": 0.123456, "completions/mean_length": 31.0}, ["reward", "kl"]) == {
        "reward": "0.123"
    }


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


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_resume_reads_a_file_cut_anywhere(tmp_path, cut):
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"step": step, "text": "glücklich"} for step in range(3))
    lines.close()
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole[:-cut])
    JsonLines(lines.path, resume_step=9).close()
    assert lines.path.read_bytes() == whole[: whole.rindex(b"\n", 0, len(whole) - cut) + 1]


def test_a_new_run_starts_an_empty_file(tmp_path):
    MetricsWriter(tmp_path).write(1, {"reward": 1})
    MetricsWriter(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_completions_open_in_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    writer = JsonLines(tmp_path / "completions.jsonl")
    texts = ["happy, \u2028glad\n", '{"angry"}', "😀"]
    writer.append({"step": 4, "prompt_id": "clip", "text": text, "reward": 0.1} for text in texts)
    writer.close()
    frame = pd.read_json(tmp_path / "completions.jsonl", lines=True)
    assert frame.text.tolist() == texts
    assert frame.step.tolist() == [4, 4, 4]


def test_a_registered_tracker_gets_every_step_and_is_closed(tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, folder, resume_step):
            calls.append((folder, resume_step))

        def log(self, step, values):
            calls.append((step, dict(values)))

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(TRACKERS, "_entries", {**TRACKERS._entries, "recorder": Recorder})
    writer = MetricsWriter(tmp_path, 3, RunConfig(trackers=("recorder",)).trackers)
    writer.write(4, {"reward": 0.5})
    writer.close()
    assert calls == [(tmp_path, 3), (4, {"reward": 0.5}), "closed"]


def test_an_unknown_tracker_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"trackers names .wandb., which is not a tracker: choose among tensorboard"):
        RunConfig(trackers=("wandb",))


def test_tensorboard_is_written_where_installed_and_a_clear_error_elsewhere(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
            MetricsWriter(tmp_path, trackers=("tensorboard",))
    else:
        writer = MetricsWriter(tmp_path, trackers=("tensorboard",))
        writer.write(1, {"reward": 0.5})
        writer.close()
        assert list((tmp_path / "tensorboard").glob("events.*"))
