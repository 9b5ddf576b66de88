"""Look up names of ours that text mentions."""

from __future__ import annotations

from importlib import import_module


def missing_name(dotted: str) -> str | None:
    """Look a dotted name of ours up, modules first and then attributes; return the part that is not there, or None."""
    parts = dotted.split(".")
    found: object = None
    for end, part in enumerate(parts, 1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            if not hasattr(found, part):
                return ".".join(parts[:end])
            found = getattr(found, part)
    return None
