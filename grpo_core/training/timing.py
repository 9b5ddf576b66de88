"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


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
