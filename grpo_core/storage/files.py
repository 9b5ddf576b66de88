"""Write files so that a reader finds the old text or the new one, whenever the program or the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from grpo_core.config.fields import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `write_file` does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a hidden name, flush it to the disk, and rename it into place."""
    # in the same folder, as a rename is atomic within one file system only; a fixed name, so that what a killed process
    # left is overwritten by the next write
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        flush([temporary])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk gets its space back
    flush([path.parent])  # the new name itself


def flush(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)  # fsync works on read-only handles, and a folder opens no other way
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin where the disk is too full.

    Args:
        folder: a folder to write into; it need not exist yet.
        needed: bytes.
        what: what needs them.

    Raises:
        ConfigError: there is less free space.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free / 1e6:,.0f} MB of free space, and {what} needs about {needed / 1e6:,.0f} MB: make "
            "room, or choose another --run.output_dir"
        )
