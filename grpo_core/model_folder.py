"""Check by file names alone that a folder can hold a model, before torch and transformers are imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grpo_core.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
AS_SAVED = "give the folder of a model as save_pretrained writes it"


def check_folder(folder: str | os.PathLike, key: str) -> Path:
    """Check that a folder holds a whole model's config.json, and return it as a path.

    Args:
        key: the option that names the folder, for messages.

    Raises:
        InputError: it is missing, a file, a name on the Hugging Face Hub, an adapter, or without config.json.
    """
    path = Path(folder)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not path.parent.exists():
            raise InputError(
                f"{key}: there is no folder {folder}, and nothing is downloaded: if it is a name on the Hugging Face "
                f"Hub, run `hf download {folder} --local-dir DIR` first, and give DIR"
            )
        raise InputError(f"{key}: there is no folder {folder}: {AS_SAVED}; if it was moved, give its new path")
    if not path.is_dir():
        raise InputError(f"{key}: {folder} is a file: {AS_SAVED}")
    if (path / "config.json").is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{key}: {folder} holds an adapter, not a whole model: give the model that it was merged into "
            "(merge_and_unload, then save_pretrained), or its base"
        )
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    advice = f"give {snapshots[-1].parent}" if snapshots else AS_SAVED  # a folder of the Hub's cache
    raise InputError(f"{key}: {folder} has no config.json: {advice}")


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no whole model."""
    path = Path(folder)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
