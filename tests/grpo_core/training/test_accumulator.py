"""Metrics are true means over all data, reduced by one collective."""

import math

import numpy as np
import pytest
import torch

from grpo_core.distributed import Distributed
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
