"""Set up one process per device under torchrun, and run the few collectives that a step needs.

How many collectives a step makes does not depend on the data: a rank with less work than the others still makes every
call, with zeros, because ranks that make different numbers of them wait for each other until the timeout. Every
function is the identity in a single process.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor

from grpo_core.distributed.watchdog import Watchdog, activity
from grpo_core.errors import InputError

Item = TypeVar("Item")

# 64 MiB of float32: enough for full bandwidth, and small beside the gradients, of which a bucket is a copy
BUCKET_ELEMENTS = 2**24


@dataclass(frozen=True)
class Distributed:
    """Place of this process among the run's processes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0

    @property
    def main_process(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def init(device: str | None = None, timeout_seconds: float = 600.0, watchdog_seconds: float = 60.0) -> Distributed:
    """Join the process group that torchrun describes in the environment; without torchrun, be the only process.

    Args:
        device: "cuda" or "cpu"; None takes CUDA where there is a device. Rank r of a machine uses its r-th CUDA device.
        timeout_seconds: how long a collective waits for the other ranks before it fails.
        watchdog_seconds: after how long in one collective the rank that is waited for is named; 0 for never.

    Raises:
        InputError: CUDA is asked for, and there is no CUDA device, or more processes on this machine than devices.
    """
    device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device_type != "cuda":
        rank_device = torch.device(device_type)
    elif local_rank < torch.cuda.device_count():
        rank_device = torch.device("cuda", local_rank)
        # Triton launches on the current device, whatever device its tensors are on
        torch.cuda.set_device(rank_device)
    elif torch.cuda.device_count() == 0:
        raise InputError("device is 'cuda', but torch sees no CUDA device on this machine: leave it out, or give 'cpu'")
    else:
        raise InputError(
            f"process {local_rank} of this machine has no CUDA device to itself ({torch.cuda.device_count()} found): "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
        )
    # a program that embeds the engine may have made the group already: use it as it is
    if world_size > 1 and not c10d.is_initialized():
        c10d.init_process_group(
            # gloo beside NCCL: what ranks agree on between themselves need not wait for the GPU
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            # NCCL connects here, where a wrong set-up shows, and not in the first collective; Gloo takes no device
            device_id=rank_device if device_type == "cuda" else None,
        )
    if world_size > 1 and watchdog_seconds > 0 and not _watchdogs:
        # a connection of its own: the main thread may be waiting on the other
        store = default_store().clone()
        _watchdogs.append(Watchdog(rank, world_size, watchdog_seconds, store))
    return Distributed(rank, world_size, rank_device, local_rank)


def default_store() -> Any:
    """Return the process group's key-value store, for which torch has no public name."""
    return c10d.distributed_c10d._get_default_store()


_watchdogs: list[Watchdog] = []
"""This process's watchdog, from `init` to `finalize`."""


# At the interpreter's exit too: a thread that is then in the store's client aborts the process.
@atexit.register
def _stop_watchdog() -> None:
    while _watchdogs:
        _watchdogs.pop().stop()


def finalize(dist: Distributed) -> None:
    """Leave the process group."""
    _stop_watchdog()
    if dist.world_size > 1 and c10d.is_initialized():
        c10d.destroy_process_group()


@contextmanager
def _collective(name: str, dist: Distributed) -> Iterator[None]:
    """Name the collective and the rank in an error of the backend, which names neither, and for the watchdog."""
    activity.since, activity.collective = time.monotonic(), name
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} failed on rank {dist.rank} of {dist.world_size}: another rank stopped (its own error comes first "
            "in the log), took longer than the timeout (run.rank_timeout), or made a different collective. "
            f"Backend: {error}"
        ) from error
    finally:
        activity.collective = ""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into buckets of at most BUCKET_ELEMENTS elements; a larger tensor is a bucket alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def all_reduce_gradients(params: Iterable[Tensor], dist: Distributed) -> None:
    """Sum every parameter's gradient over the ranks, in float32, in place.

    A sum and not a mean: each rank's loss is divided by *global* counts (tokens, completions), so its gradient is
    already its share. A parameter without a gradient counts as zeros, so that a rank with no data makes the same
    collectives; where any rank may have one, all ranks have one afterwards.

    Args:
        params: the trainable parameters, the same and in the same order on every rank.
    """
    if dist.world_size == 1:
        return
    # buckets come from the parameters' sizes, not from which have gradients: the same collectives on every rank
    for bucket in _buckets([param for param in params if param.requires_grad]):
        # float32: a bfloat16 sum over many ranks would lose small shares
        gradients = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in bucket]
        # one message a bucket: hundreds of LoRA matrices sent one by one would cost their latency each
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _collective("all_reduce_gradients", dist):
            c10d.all_reduce(flat)
        for param, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(param)
            # copied, which rounds to the gradient's dtype; assigned views would keep the whole bucket alive
            param.grad.copy_(summed.view_as(param))


@torch.no_grad()
def broadcast_parameters(params: Iterable[Tensor], dist: Distributed) -> None:
    """Give every rank rank 0's values, bit for bit."""
    if dist.world_size == 1:
        return
    for param in params:
        with _collective("broadcast_parameters", dist):
            c10d.broadcast(param.data, src=0)  # in place: optimiser and policy hold these tensors


def all_reduce_sum(values: Tensor, dist: Distributed) -> Tensor:
    """Sum a small tensor of counts or sums over the ranks, into a new tensor of the same shape and dtype."""
    total = values.clone()  # also with one rank, so that the caller may write to the result everywhere
    if dist.world_size > 1:
        with _collective("all_reduce_sum", dist):
            c10d.all_reduce(total)
    return total


def max_over_ranks(values: Sequence[int], dist: Distributed) -> list[int]:
    """Return the largest of each number over the ranks: how ranks agree on what one of them has found.

    Numbers go from host to host, so that no rank waits for its GPU.
    """
    if dist.world_size == 1:
        return list(values)
    # a group that the embedding program made may be of NCCL alone, which has no tensors of the host
    on_host = "cpu:" in c10d.get_backend_config()
    numbers = torch.tensor(values, device="cpu" if on_host else dist.device)
    with _collective("max_over_ranks", dist):
        c10d.all_reduce(numbers, op=c10d.ReduceOp.MAX)
    return numbers.tolist()


def gather_rows(row: Tensor, dist: Distributed) -> Tensor:
    """Gather every rank's row `[K]` (same K and dtype everywhere) as `[world_size, K]`, in one collective."""
    if dist.world_size == 1:
        return row.clone()[None]
    rows = row.new_empty(dist.world_size * row.numel())
    with _collective("gather_rows", dist):
        c10d.all_gather_into_tensor(rows, row.contiguous())  # the backends read memory and know no strides
    return rows.view(dist.world_size, -1)


def gather_objects(value: Any, dist: Distributed) -> list[Any]:
    """Gather every rank's value, by rank, in two collectives.

    Values travel as JSON and not as pickles, so they must be what `json` can write. Floats come back bit for bit, NaN
    and infinities included; tuples come back as lists.
    """
    if dist.world_size == 1:
        # through JSON here too: a value that works with one process then works with several
        return [json.loads(json.dumps(value))]
    # bytearray: torch warns about memory that it may not write to
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(dist.device)
    # lengths first: the second collective needs rows of one length
    sizes = gather_rows(torch.tensor([data.numel()], device=dist.device), dist).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=dist.device)
    padded[: data.numel()] = data
    rows = gather_rows(padded, dist).cpu()  # one copy, not one for each rank
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def send_to_main(name: str, value: Any, dist: Distributed) -> list[Any] | None:
    """Send every rank's value to the main process, which gets them by rank; the others get None.

    Values travel as JSON, as in `gather_objects`.

    It goes through the process group's key-value store: no collective, and no rank waits for its device. Only the main
    process waits, for ranks that have not written yet.

    Args:
        name: unique to this call, the same on every rank.
    """
    if dist.world_size == 1:
        return [json.loads(json.dumps(value))]
    store = default_store()
    if not dist.main_process:
        store.set(f"{name}/{dist.rank}", json.dumps(value))
        return None
    values = [json.loads(json.dumps(value))]
    with _collective("send_to_main", dist):
        for rank in range(1, dist.world_size):
            values.append(json.loads(store.get(f"{name}/{rank}")))  # waits until the key is set, or the timeout
            store.delete_key(f"{name}/{rank}")  # the store lives as long as the run: it would keep every step
    return values


def run_on_main(function: Callable[[], Item], dist: Distributed) -> Item:
    """Call a function on the main process, and give its value (in JSON's types) to every rank.

    Raises:
        Exception: what the function raised, on the main process; on the others the same message, so that none is left
            waiting for a rank that has stopped.
    """
    if dist.world_size == 1:
        return function()
    answer: dict[str, Any] = {}
    raised: Exception | None = None
    if dist.main_process:
        try:
            answer = {"value": function()}
        except Exception as error:
            raised, answer = error, {"error": str(error), "kinds": [cls.__name__ for cls in type(error).__mro__]}
    answer = gather_objects(answer, dist)[0]
    if raised is not None:
        raise raised
    if "error" in answer:
        # those that a program reports in one line; the traceback of any other is the main process's
        reported = next((cls for cls in (InputError, ValueError, OSError) if cls.__name__ in answer["kinds"]), None)
        raise (reported or RuntimeError)(answer["error"])
    value: Item = answer["value"]
    return value


def require_same(what: str, value: Any, dist: Distributed) -> None:
    """Stop all ranks if they disagree about a value (in JSON's types), naming each rank's.

    Raises:
        RuntimeError: on every rank, so that none is left waiting.
    """
    values = gather_objects(value, dist)
    if any(other != values[0] for other in values):
        listing = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise RuntimeError(f"ranks disagree about {what}: {listing}")


def barrier(dist: Distributed) -> None:
    """Wait until every rank is here."""
    if dist.world_size > 1:
        with _collective("barrier", dist):
            c10d.barrier()


def shard(sequence: Sequence[Item], rank: int, world_size: int) -> Sequence[Item]:
    """Return the slice of a sequence that belongs to rank `rank`.

    Slices are contiguous, their lengths differ by at most one, and joined in rank order they are the sequence again.
    """
    n = len(sequence)
    # both bounds by one formula: rank r ends exactly where r + 1 begins, for any n
    return sequence[n * rank // world_size : n * (rank + 1) // world_size]
