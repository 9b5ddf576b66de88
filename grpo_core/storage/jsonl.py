"""Files of JSON lines, kept step by step: what a killed run leaves is readable, and a resumed run continues it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


class JsonLines:
    """A file of one JSON object a line, each with its `step`, that a killed run leaves readable and a resumed run
    continues.

    JSON has no NaN and no infinity: they are written as null. A line is appended by one write, so a reader never sees
    half of one, unless the machine stops in it; what such an end leaves is dropped on resume.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open `path` for a run that has made `resume_step` steps, and drop later lines; None starts an empty file."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None or not self.path.exists() else _lines_until(self.path, resume_step)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one line a row."""
        lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        data = memoryview("".join(lines).encode())
        while data:  # a disk that fills may take a part
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Whole lines of a step no later than `step`."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and row.get("step", 0) <= step:
            kept.append(line)
    return kept


def jsonable(value: Any) -> Any:
    """The value in JSON's types: arrays and tuples as lists, paths as strings, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
