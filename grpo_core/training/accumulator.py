"""Collects a step's metrics and phase times on the device, and reduces them over all ranks in one collective."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grpo_core.distributed import Distributed, gather_rows
from grpo_core.distributed.watchdog import activity

Kind = Literal["mean", "sum", "max", "min"]
Values = Tensor | np.ndarray | float
# Metrics in a step. The packed row has this size whatever a rank registered, so ranks that disagree can still say so.
CAPACITY = 256


class MetricAccumulator:
    """Accumulates a step's metrics where their values are computed, and reduces them over all ranks at once.

    `mean`, `sum`, `max` and `min` never wait for the device; `reduce` makes one collective and one copy to the host.
    All kinds share that collective because it *gathers* each rank's packed float64 row, `[world_size, 1 + 2·256]` (4
    KiB a rank), and every rank combines the rows itself: an all-reduce would need one call for sums and one for
    maxima.

    Every rank must register the same names with the same kinds in a step. A rank without data registers with an empty
    tensor (or `register`) and contributes weight zero; a metric without data on any rank is NaN (a sum: 0).
    """

    def __init__(self, dist: Distributed | None = None) -> None:
        self.dist = dist or Distributed()
        self._entries: dict[str, tuple[Kind, Tensor, Tensor]] = {}  # name → kind, value, weight; float64 scalars

    def register(self, kind: Kind, *names: str) -> None:
        """Announce metrics that this rank may have no data for.

        Raises:
            ValueError: a name of another kind already, or more than `CAPACITY` names.
        """
        start = {"max": -math.inf, "min": math.inf}.get(kind, 0.0)
        for name in names:
            zero = torch.zeros((), dtype=torch.float64)
            registered, _, _ = self._entries.setdefault(name, (kind, zero + start, zero))
            if registered != kind:
                raise ValueError(f"metric {name!r} is a {registered} and cannot be a {kind} too: give it another name")
        if len(self._entries) > CAPACITY:
            raise ValueError(f"more than {CAPACITY} metrics in a step: raise grpo_core.training.accumulator.CAPACITY")

    def mean(self, name: str, values: Values, weights: Tensor | np.ndarray | None = None) -> None:
        """Mean over everything added by any rank; `weights` (or a mask) have the values' shape.

        A value of weight 0 is left out even if it is NaN.
        """
        self._add("mean", name, values, weights)

    def sum(self, name: str, values: Values) -> None:
        """Sum over everything added by any rank."""
        self._add("sum", name, values)

    def max(self, name: str, values: Values) -> None:
        """Maximum over everything added by any rank; NaN if any value is."""
        self._add("max", name, values)

    def min(self, name: str, values: Values) -> None:
        """Minimum over everything added by any rank; NaN if any value is."""
        self._add("min", name, values)

    def _add(self, kind: Kind, name: str, values: Values, weights: Tensor | np.ndarray | None = None) -> None:
        self.register(kind, name)
        values = torch.as_tensor(values).detach().to(torch.float64)
        _, so_far, weight = self._entries[name]
        if kind in ("max", "min"):
            if not values.numel():
                return
            both = torch.stack([_on(values.device, so_far), values.amax() if kind == "max" else values.amin()])
            self._entries[name] = (kind, both.amax() if kind == "max" else both.amin(), weight + values.numel())
        elif weights is None:
            self._entries[name] = (kind, so_far + values.sum(), weight + values.numel())
        else:
            weights = torch.as_tensor(weights).detach().to(values.device, torch.float64)
            weighted = torch.where(weights == 0, 0.0, values * weights).sum()  # 0 · NaN would be NaN
            self._entries[name] = (kind, so_far + weighted, weight + weights.sum())

    def reduce(self) -> dict[str, float]:
        """All metrics over all ranks, in the order of registration, and a fresh start. One collective, one host copy.

        Raises:
            RuntimeError: ranks registered different metrics.
        """
        names = sorted(self._entries)  # packed by name, so ranks may register in any order
        # 52 bits that identify names and kinds: exact in float64, so they travel in the same row as the values
        text = json.dumps([(name, self._entries[name][0]) for name in names])
        signature = float(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 12)
        row = torch.zeros(1 + 2 * CAPACITY, dtype=torch.float64, device=self.dist.device)
        row[0] = signature
        if names:
            packed = [_on(row.device, scalar) for name in names for scalar in self._entries[name][1:]]
            row[1 : 1 + len(packed)] = torch.stack(packed)
        rows = gather_rows(row, self.dist).cpu().numpy()
        if (rows[:, 0] != rows[0, 0]).any():
            other = int(np.flatnonzero(rows[:, 0] != rows[0, 0])[0])
            raise RuntimeError(
                f"ranks 0 and {other} registered different metrics in this step; rank {self.dist.rank} has "
                f"{', '.join(names)}. Register every metric on every rank, with no data where there is none"
            )
        table = rows[:, 1:].reshape(len(rows), CAPACITY, 2)
        reduced = {}
        for name, (numbers, weights) in zip(names, table.transpose(1, 2, 0), strict=False):  # by rank
            kind = self._entries[name][0]
            if kind == "sum":
                reduced[name] = float(numbers.sum())
            elif not weights.any():
                reduced[name] = math.nan
            elif kind == "mean":
                reduced[name] = float(numbers.sum() / weights.sum())
            else:
                reduced[name] = float(numbers.max() if kind == "max" else numbers.min())
        values = {name: reduced[name] for name in self._entries}
        self._entries = {}
        return values


def _on(device: torch.device, scalar: Tensor) -> Tensor:
    """Move a scalar to a device; one of the host is filled in there, because a copy from pageable memory would wait."""
    if scalar.device == device:
        return scalar
    if scalar.device.type == "cpu":
        return torch.full((), scalar.item(), dtype=scalar.dtype, device=device)
    return scalar.to(device)


def postfix(values: Mapping[str, float], names: Iterable[str]) -> dict[str, str]:
    """The chosen metrics, short enough for tqdm's `set_postfix`; names that were not reported are left out."""
    return {name.rsplit("/", 1)[-1]: f"{values[name]:.3g}" for name in names if name in values}


class PhaseClock:
    """Seconds of a step's phases. On CUDA these are the device's, from events that wait for nothing until `read`.

    Args:
        phases: their names, in order.
        device: where the work is done.
    """

    def __init__(self, phases: Sequence[str], device: torch.device):
        self.phases, self.on_device = tuple(phases), device.type == "cuda"
        self._seconds = dict.fromkeys(self.phases, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        activity.phase = name  # for the watchdog
        if self.on_device:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last call, and a fresh start. On CUDA it waits for the last phase's end."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, dict.fromkeys(self.phases, 0.0), []
        return seconds
