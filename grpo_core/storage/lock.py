"""Keep a second process out of a run's folder while the first is alive."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has other locks; a run goes on without one, and says so
    fcntl = None  # type: ignore[assignment]

# held by another process; anything else that lockf raises means that this file system has no locks
_HELD = (errno.EACCES, errno.EAGAIN)

# A process loses its record locks on a file as soon as it closes any handle of that file, so one that holds a lock must
# not open the file again: a second run in the same process shares the handle of the first.
_handles: dict[str, int] = {}


class LockHeld(RuntimeError):
    """Another process holds the lock; the message names it."""


class FileLock:
    """A lock on a file, which holds who has it. It ends with its process, however that ends, or with `release`.

    A POSIX record lock (`fcntl.lockf`): a forked child does not inherit it, so a worker that outlives its parent keeps
    nobody out, and the start after a SIGKILL finds it free. Over NFS it also keeps out other hosts.
    """

    def __init__(self, path: Path, wait_seconds: float = 0.0):
        """Take the lock, waiting for another process to end.

        Raises:
            LockHeld: another process still has it after `wait_seconds`.
            OSError: the file cannot be written.
        """
        self.path = Path(path)
        self._key = os.path.realpath(path)
        if self._key in _handles:
            return
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(handle, self.path, wait_seconds)
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(me) + "\n").encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        _handles[self._key] = handle

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        # the file stays: whoever deleted it might delete one that a third process has just locked
        if (handle := _handles.pop(self._key, None)) is not None:
            os.close(handle)


def _take(handle: int, path: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    said = False
    while True:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "this system has no record locks")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                warnings.warn(
                    f"{path} cannot be locked ({error.strerror}): nothing keeps a second run out of its folder",
                    stacklevel=4,
                )
                return
        holder = _holder(handle)
        if time.monotonic() >= deadline:
            raise LockHeld(holder)
        if not said:
            print(f"{path.parent} is in use by {holder}: waiting up to {wait_seconds:g} s for it to end", flush=True)
            said = True
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0.0)))


def _holder(handle: int) -> str:
    try:
        found: Any = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(found['pid'])} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):  # caught between its lock and its name
        return "another process"
