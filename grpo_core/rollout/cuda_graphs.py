"""CUDA graphs of decode steps, captured when a step of the same shape is run for the second time."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class StepGraphs:
    """Runs steps that read and write nothing but memory at fixed addresses: replayed on a GPU, called on a CPU.

    Steps with the same key launch the same kernels. The first one is called as it is: it counts, and it warms up, as
    kernels are compiled and libraries make their handles, which a capture may not do. The second is captured, on the
    same side stream, and replayed from then on. All graphs share one pool of memory for what they allocate within a
    step, since no two run at once.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, or replay the graph of an earlier step with the same key."""
        if not self._cuda:
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            # on the stream of the capture: cuBLAS keeps a handle and a workspace for each stream
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
            # thread_local: other threads (a data loader that pins memory) may call CUDA during the capture
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    step()
                except torch.OutOfMemoryError as error:  # the end of a failed capture would raise another error over it
                    failure = error
            if failure is not None:
                raise failure
            self._graphs[key] = graph
        graph.replay()
