"""Write files of JSON lines that stay readable when a run is killed, and that a resumed run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from grpo_core.storage.files import write_file


class JsonLines:
    """A file with one JSON object per line, each with its `step`.

    JSON has no NaN and no infinity: they are written as null. A line is appended by one write, so a reader never sees
    half a line unless the machine stops during that write; resuming drops such a line.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open `path` for a run that has made `resume_step` steps and drop later lines; None starts an empty file."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None or not self.path.exists() else _lines_until(self.path, resume_step)
        # written anew and renamed, not truncated in place: a kill in between leaves the old file
        write_file(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))
        # a plain descriptor: Python's buffered files write when their buffer is full, in the middle of a line.
        # O_APPEND writes at the end even if something else (an editor, a copy) has changed the file's length
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per row."""
        # ensure_ascii=False: Chinese completions stay readable. allow_nan=False: Python's bare NaN is not JSON
        lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        data = memoryview("".join(lines).encode())
        while data:  # os.write may write less than it is given, on a disk that fills up
            try:
                data = data[os.write(self._file, data) :]
            except OSError as error:  # of a descriptor, so it names no file
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Return the complete lines of steps up to `step`."""
    kept = []
    # bytes: a line cut within a UTF-8 character cannot be decoded, and text would also be split at U+2028
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        # a cut line may lack its line end alone: it is valid JSON, but the next append would continue it
        if line.endswith(b"\n") and isinstance(row, dict) and row.get("step", 0) <= step:
            kept.append(line)
    return kept


def jsonable(value: Any) -> Any:
    """Convert a value to JSON's types: arrays and tuples to lists, paths to strings, NaN and infinities to None."""
    if isinstance(value, Mapping):
        # str here, because json.dumps accepts only some types as keys
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return jsonable(value.tolist())  # may give a plain number, or hold NaN
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
