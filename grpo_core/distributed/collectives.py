"""Several processes, one per device: set-up under torchrun, and the few collectives a step needs, each of a fixed
count.

A rank with less work than the others still makes every call, with zeros: ranks that make different numbers of
collectives wait for each other until the timeout. Every function is the identity in a single process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor

Item = TypeVar("Item")

BUCKET_ELEMENTS = (
    2**24
)  # 64 MiB of fp32: large enough for full bandwidth, small enough to be no second copy of the gradients


@dataclass(frozen=True)
class Distributed:
    """This process's place among the run's processes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0

    @property
    def main_process(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def init(device: str | None = None, timeout_seconds: float = 600.0) -> Distributed:
    """Join the process group that torchrun describes in the environment; without torchrun, be the only process.

    Args:
        device: "cuda" or "cpu"; None takes CUDA where there is a device. Rank r of a machine uses its r-th CUDA device.
        timeout_seconds: how long a collective waits for the other ranks before it fails.

    Raises:
        RuntimeError: more processes on this machine than CUDA devices.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind != "cuda":
        place = torch.device(kind)
    elif local_rank < torch.cuda.device_count():
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    else:
        raise RuntimeError(
            f"process {local_rank} of this machine has no CUDA device of its own ({torch.cuda.device_count()} found): "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
        )
    if world_size > 1 and not c10d.is_initialized():
        c10d.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=place if kind == "cuda" else None,
        )
    return Distributed(rank, world_size, place, local_rank)


def finalize(dist: Distributed) -> None:
    """Leave the process group."""
    if dist.world_size > 1 and c10d.is_initialized():
        c10d.destroy_process_group()


@contextmanager
def _collective(name: str, dist: Distributed) -> Iterator[None]:
    """Say which collective failed on which rank: the backends name neither."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} failed on rank {dist.rank} of {dist.world_size}: another rank stopped (its own error comes first "
            f"in the log), took longer than the timeout, or made other collectives than this one. Backend: {error}"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together at most BUCKET_ELEMENTS elements; a larger one goes alone."""
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
    """Sum every parameter's gradient over the ranks, in fp32, in place.

    A sum and not a mean: each rank's loss is divided by *global* counts (tokens, completions), so its gradient is
    already its share. A parameter without a gradient counts as zeros, so that a rank with no data makes the same
    collectives; where any rank may have one, all ranks have one afterwards.

    Args:
        params: the trainable parameters, the same and in the same order on every rank.
    """
    if dist.world_size == 1:
        return
    for bucket in _buckets([param for param in params if param.requires_grad]):
        pieces = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in bucket]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        with _collective("all_reduce_gradients", dist):
            c10d.all_reduce(flat)
        for param, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(summed.view_as(param))


@torch.no_grad()
def broadcast_parameters(params: Iterable[Tensor], dist: Distributed) -> None:
    """Give every rank rank 0's values, bit for bit."""
    if dist.world_size == 1:
        return
    for param in params:
        with _collective("broadcast_parameters", dist):
            c10d.broadcast(param.data, src=0)


def all_reduce_sum(values: Tensor, dist: Distributed) -> Tensor:
    """The sum over ranks of a small tensor of counts or sums, as a new tensor of the same shape and dtype."""
    total = values.clone()
    if dist.world_size > 1:
        with _collective("all_reduce_sum", dist):
            c10d.all_reduce(total)
    return total


def gather_rows(row: Tensor, dist: Distributed) -> Tensor:
    """Every rank's row `[K]` (same K and dtype everywhere) as `[world_size, K]`, in one collective."""
    if dist.world_size == 1:
        return row.clone()[None]
    rows = row.new_empty(dist.world_size * row.numel())
    with _collective("gather_rows", dist):
        c10d.all_gather_into_tensor(rows, row.contiguous())
    return rows.view(dist.world_size, -1)


def gather_objects(value: Any, dist: Distributed) -> list[Any]:
    """Every rank's value, by rank; two collectives. Values travel as JSON, so they are what `json` can write, and no
    pickle.

    Floats come back bit for bit, NaN and infinities included; tuples come back as lists.
    """
    if dist.world_size == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(dist.device)
    sizes = gather_rows(torch.tensor([data.numel()], device=dist.device), dist).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=dist.device)
    padded[: data.numel()] = data
    rows = gather_rows(padded, dist).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def send_to_main(name: str, value: Any, dist: Distributed) -> list[Any] | None:
    """Every rank's value, by rank, on the main process; None elsewhere. JSON, as in `gather_objects`.

    It goes through the process group's key-value store: no collective, and no rank waits for its device. Only the main
    process waits, for ranks that have not written yet.

    Args:
        name: unique to this call, the same on every rank.
    """
    if dist.world_size == 1:
        return [json.loads(json.dumps(value))]
    store = c10d.distributed_c10d._get_default_store()  # torch has no public name for the store it made
    if not dist.main_process:
        store.set(f"{name}/{dist.rank}", json.dumps(value))
        return None
    values = [json.loads(json.dumps(value))]
    with _collective("send_to_main", dist):
        for rank in range(1, dist.world_size):
            values.append(json.loads(store.get(f"{name}/{rank}")))
            store.delete_key(f"{name}/{rank}")
    return values


def require_same(what: str, value: Any, dist: Distributed) -> None:
    """Stop all ranks where they disagree about a value that JSON can write, naming each rank's.

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
    """Rank `rank`'s part of a sequence: contiguous, lengths differing by at most one, joined in rank order the whole
    again.
    """
    n = len(sequence)
    return sequence[n * rank // world_size : n * (rank + 1) // world_size]
