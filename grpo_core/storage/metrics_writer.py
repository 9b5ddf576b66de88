"""Write a run's metrics: one line per step in `metrics.jsonl`, and to the trackers that the run names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_core.storage.jsonl import JsonLines
from grpo_core.storage.trackers import TRACKERS


class MetricsWriter:
    """Writes `metrics.jsonl` of a run's folder, and sends the same metrics to each tracker.

    Args:
        run_folder: the run's folder.
        resume_step: as in `JsonLines`.
        trackers: names in `TRACKERS`.

    Raises:
        InputError: a tracker's package is not installed.
    """

    def __init__(self, run_folder: Path, resume_step: int | None = None, trackers: Sequence[str] = ()) -> None:
        folder = Path(run_folder)
        # trackers first: one whose package is missing raises before an old metrics.jsonl is cleared
        self._trackers = [TRACKERS[name](folder, resume_step) for name in trackers]
        self._lines = JsonLines(folder / "metrics.jsonl", resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a step's metrics: `{"step": step, **values}`."""
        # the file before the trackers: a tracker whose server is down must not cost the step's line
        self._lines.append([{"step": step, **values}])
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()
