"""Describe what a run was started with: command, machine, and the versions that its numbers depend on."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("grpo-core", "torch", "triton", "transformers", "peft", "numpy")


def software_versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that a run's numbers depend on, as far as installed."""
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache  # of the code as it was imported; it costs two processes
def git_commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, `…+changes` if files differ from it."""
    checkout = Path(__file__).parents[2]
    # an installed package may lie in an environment inside some other project's checkout, which says nothing of us
    if not (checkout / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that it refuses to read
        return None
    return commit + "+changes" * bool(changes)


def describe_session(device: str, ranks: int) -> dict[str, Any]:
    """Describe this process for a run's log, in JSON's types."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": ranks,
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "git": git_commit(),
        "versions": software_versions(),
    }
