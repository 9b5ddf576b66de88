"""CUDA graphs of decode steps, captured when a kind of step comes for the second time."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class StepGraphs:
    """Runs steps that read and write static memory alone: replayed on a GPU, called on a CPU.

    A kind of step, named by a key, runs as it is the first time. That step counts, and warms up: kernels are compiled
    and libraries make their handles. The second time it is captured, on the same side stream, and replayed from then
    on. All graphs share one pool of memory for what lives within a step, since no two run at once.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do one step of the kind `key`."""
        if not self._cuda:
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                step()
            current.wait_stream(self._stream)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            failure = None
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    step()
                except torch.OutOfMemoryError as error:  # the end of the capture would raise another error over it
                    failure = error
            if failure is not None:
                raise failure
            self._graphs[key] = graph
        graph.replay()

    @property
    def captured(self) -> int:
        """How many kinds of step are replayed."""
        return sum(graph is not None for graph in self._graphs.values())
