"""What two gloo processes compute, written as JSON by each: run by test_distributed.py with torchrun's environment."""

import json
import math
import sys
from pathlib import Path

import torch

from grpo_core import distributed
from grpo_core.errors import InputError
from grpo_core.training.accumulator import MetricAccumulator


def error_of(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return None


def gradients(dist):
    """Rank 1 has no data: no gradient of its own."""
    params = [
        torch.nn.Parameter(torch.zeros(3, 2)),
        torch.nn.Parameter(torch.zeros(5)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    params[2].requires_grad_(False)
    if dist.rank == 0:
        params[0].grad = torch.arange(6.0).view(3, 2)
    distributed.BUCKET_ELEMENTS = 6
    distributed.all_reduce_gradients(params, dist)
    return [None if p.grad is None else p.grad.tolist() for p in params]


def half_precision_gradients(dist):
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    param.grad = torch.tensor([2.5 if dist.rank else 1.5], dtype=torch.bfloat16)
    distributed.all_reduce_gradients([param], dist)
    return [param.grad.dtype == torch.bfloat16, param.grad.item()]


def metrics(dist):
    step = MetricAccumulator(dist)
    step.register("max", "length/max")
    if dist.rank == 0:
        step.mean("reward", torch.tensor([1.0, 2.0, math.nan]), torch.tensor([1, 1, 0]))
        step.max("length/max", torch.tensor([3, 7]))
    else:
        step.mean("reward", torch.tensor([6.0]))
    step.min("length/min", torch.tensor([4 - dist.rank]))
    step.sum("tokens", 10 + dist.rank)
    step.register("mean", "nobody")
    return step.reduce()


def other_metrics(dist):
    step = MetricAccumulator(dist)
    step.sum("tokens", 1)
    if dist.rank:
        step.sum("surplus", 1)
    return error_of(step.reduce)


def of_main(dist):
    """What rank 0 finds is everyone's; rank 1's own answer, or error, would be another."""

    def mistake():
        raise (InputError if dist.rank == 0 else KeyError)(f"rank {dist.rank} says no")

    def bug():
        raise KeyError(f"rank {dist.rank} has a bug")

    found = [distributed.run_on_main(lambda: {"rank": dist.rank}, dist)]
    for function in (mistake, bug):
        try:
            distributed.run_on_main(function, dist)
        except Exception as error:
            found.append([type(error).__name__, error.args[0]])
    return found


def main(folder):
    dist = distributed.init(device="cpu", timeout_seconds=20)
    torch.manual_seed(dist.rank)
    weights = torch.nn.Linear(4, 4)
    distributed.broadcast_parameters(weights.parameters(), dist)
    found = {
        "place": [dist.rank, dist.world_size, dist.local_rank, str(dist.device), dist.main_process],
        "gradients": gradients(dist),
        "half": half_precision_gradients(dist),
        "weights": [p.tolist() for p in weights.parameters()],
        "sum": distributed.all_reduce_sum(torch.tensor([1, 10 * dist.rank]), dist).tolist(),
        "objects": distributed.gather_objects({"rank": dist.rank, "ids": ["é"] * (3 * dist.rank), "x": 0.1}, dist),
        "same": error_of(lambda: distributed.require_same("seed", 5, dist)),
        "different": error_of(lambda: distributed.require_same("seed", 5 + dist.rank, dist)),
        "of_main": of_main(dist),
        "metrics": metrics(dist),
        "other_metrics": other_metrics(dist),
    }
    distributed.barrier(dist)
    if dist.rank == 1:
        Path(folder, "1.json").write_text(json.dumps(found))
    else:  # rank 1 leaves; rank 0 waits for it in vain
        found["left_alone"] = error_of(lambda: distributed.all_reduce_sum(torch.ones(1), dist))
        Path(folder, "0.json").write_text(json.dumps(found))
    distributed.finalize(dist)  # a gloo group left to the interpreter's exit aborts now and then


main(sys.argv[1])
