"""Writes `metrics.jsonl` of a run folder, and TensorBoard's files on request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_core.storage.jsonl import JsonLines


class MetricsWriter:
    """Writes `metrics.jsonl` of a run folder, and TensorBoard's files beside it when asked to."""

    def __init__(self, run_dir: Path, resume_step: int | None = None, tensorboard: bool = False) -> None:
        """See `JsonLines` for `resume_step`. TensorBoard's files go to `run_dir/tensorboard`.

        Raises:
            ModuleNotFoundError: TensorBoard is asked for and not installed.
        """
        self._lines = JsonLines(Path(run_dir) / "metrics.jsonl", resume_step)
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ModuleNotFoundError(
                    "TensorBoard output needs the package `tensorboard`: pip install tensorboard, or switch it off "
                    "(metrics.jsonl holds the same numbers)"
                ) from error
            self._board = SummaryWriter(
                str(Path(run_dir) / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a step's metrics: `{"step": step, **values}`."""
        self._lines.append([{"step": step, **values}])
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()
