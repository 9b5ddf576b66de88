"""Trackers that receive a run's metrics beside `metrics.jsonl`; a plug-in may register another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo_core.errors import InputError
from grpo_core.registry import Registry


class Tracker(Protocol):
    """Receives a run's metrics, on the main process."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive the metrics of a step."""

    def close(self) -> None:
        """Flush what is buffered; called once, at the end of the run."""


TRACKERS: Registry[Callable[[Path, int | None], Tracker]] = Registry("tracker")
"""Trackers by name. Each is called with the run's folder and the step that the run resumes from (None: a new run)."""


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Writer of TensorBoard's event files, in the run's folder `tensorboard`.

    Raises:
        InputError: the package is not installed.
    """

    def __init__(self, run_folder: Path, resume_step: int | None):
        # imported here: the package is optional, and options read this module without torch
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "run.trackers has tensorboard, which needs the package `tensorboard`: pip install tensorboard, or "
                "leave it out (metrics.jsonl holds the same numbers)"
            ) from error
        # a resumed run repeats the steps that the killed one logged after its last checkpoint: hide the first ones
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):  # add_scalar raises for None, where a metric could not be computed
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
