"""Stop every rank together, where nothing is lost, when a signal asks one of them to end.

A signal only leaves a note. Ranks look for it between micro-batches (`until_stopped`) and between blocks of decode
steps (`poll`), and leave that work early; but a step is dropped only where the work would have ended, by one small
collective in which all ranks agree. So ranks never differ in the collectives they make, whichever of them got the
signal. What is dropped has changed nothing, and random numbers are keyed by seed and step: the step gives the same
numbers when it is made again.

A signal of one rank reaches the others through the process group's key-value store, which costs a look every tenth of
a second. In a single process there is no collective and no look.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

from grpo_core.distributed.collectives import Distributed, default_store, max_over_ranks

Item = TypeVar("Item")

# By name, since Windows lacks two of them. SIGUSR1 is what Slurm sends ahead of a time limit (`--signal=USR1@300`),
# SIGHUP what a closed terminal sends.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
_LOOK_SECONDS = 0.1


class Stopped(SystemExit):
    """A signal has ended the program: exit status 128 + signal, as a shell reports it."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StepDropped(BaseException):
    """Work was dropped on every rank because a signal asks to stop; nothing that it would have changed has changed.

    No `Exception`, so that no handler of errors on the way takes it for one.
    """

    def __init__(self, signum: int):
        super().__init__(f"{signal.Signals(signum).name} asked to stop")
        self.signum = signum


class _LeaveEarly(BaseException):
    """Leave `stoppable` work, for the agreement at its end."""


class _Request:
    """What this process knows of a request to stop. Signals belong to the process, so there is one of these."""

    signum = 0  # the first signal, of this rank or as another one announced it; 0 for none
    droppable = False  # inside `stoppable`
    store: Any = None  # where ranks announce a signal; None in a single process
    key = ""
    looked_at = 0.0
    loops = 0  # loops that have listened: the announcement of one must not stop the next


_request = _Request()


@contextmanager
def listen(dist: Distributed) -> Iterator[None]:
    """Note signals inside the block instead of ending the process; a second SIGINT ends it at once.

    A signal that nobody has acted on by the end of the block is delivered then. Signals that are ignored (`nohup`,
    background jobs of a shell) stay so; outside the main thread, which alone may set handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.signum, _request.looked_at = 0, 0.0
    _request.loops += 1
    _request.key = f"stop/{_request.loops}"  # ranks enter the same loops in the same order
    _request.store = default_store() if dist.world_size > 1 else None
    earlier: dict[int, Any] = {}
    for signum in SIGNALS:
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
            earlier[signum] = signal.signal(signum, _note)
    # Python calls a handler only between two bytecodes, which a process that waits in a collective for a dead rank
    # never reaches. The interpreter's C handler writes each signal into this pipe at once, and a thread reads it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # a connection of its own: the main thread may be waiting on the other
    store = _request.store.clone() if _request.store is not None else None
    thread = threading.Thread(target=_hear, args=(reading, store, _request.key), name="signals", daemon=True)
    thread.start()
    late = 0
    try:
        yield
        late = _request.signum
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)
        _request.signum, _request.store = 0, None
    if late:
        os.kill(os.getpid(), late)


def _note(signum: int, frame: FrameType | None) -> None:
    if not _request.signum:
        _request.signum = signum


def _hear(pipe: int, store: Any, key: str) -> None:
    """Announce signals to the other ranks, and end the process at the second SIGINT."""
    interrupts = 0
    while (byte := os.read(pipe, 1)) not in (b"", b"\0"):
        signum = byte[0]
        interrupts += signum == signal.SIGINT
        if interrupts == 2:
            # not sys.exit: the main thread may never come back from where it is
            os._exit(128 + signal.SIGINT)
        if store is not None and signum in SIGNALS:
            with suppress(RuntimeError):  # the store's process has ended: so will this one, in its next collective
                store.set(key, str(signum))


def requested() -> int:
    """Return the signal that asks this rank, or another one that has said so, to stop; 0 for none."""
    now = time.monotonic()
    if _request.store is not None and not _request.signum and now - _request.looked_at > _LOOK_SECONDS:
        _request.looked_at = now
        if _request.store.check([_request.key]):
            _request.signum = int(_request.store.get(_request.key))
    return _request.signum


def poll() -> None:
    """Leave the `stoppable` work around this line if a rank is asked to stop; outside of one, do nothing."""
    if _request.droppable and requested():
        raise _LeaveEarly


@contextmanager
def stoppable(dist: Distributed) -> Iterator[None]:
    """Mark local work that may be dropped: it makes no collective and changes no weights.

    One collective of two numbers a rank at its end; none in a single process.

    Raises:
        FloatingPointError: on every rank, if the work raised one on any of them.
        StepDropped: on every rank, if any of them is asked to stop.
    """
    _request.droppable = True
    failure: FloatingPointError | None = None
    try:
        yield
    except _LeaveEarly:
        pass
    except FloatingPointError as error:  # one rank's prompts may show it alone: the others would wait for that rank
        failure = error
    finally:
        _request.droppable = False
    signum, failed = max_over_ranks([_request.signum, int(failure is not None)], dist)
    if failed:
        raise failure or FloatingPointError("another rank's numbers are not finite: its own error says which")
    if signum:
        raise StepDropped(signum)


def until_stopped(items: Iterable[Item], dist: Distributed) -> Iterator[Item]:
    """Iterate over local work that may be dropped, as `stoppable` does, with a poll before each item.

    Raises:
        StepDropped: after the last item or early, on every rank, if any of them is asked to stop.
    """
    with stoppable(dist):
        for item in items:
            poll()
            yield item


def exit_on_signals() -> None:
    """End the program by `Stopped` at a signal, so that what is half done is cleaned up on the way out.

    This is for the parts of a program that have nothing to save; `listen` replaces it inside training loops. A second
    signal of the same kind ends the process at once.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
            signal.signal(signum, _exit)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_DFL)
    raise Stopped(signum)


def say(message: str) -> None:
    """Print a line about a stop, below a progress bar that may be there."""
    print(f"\n{message}", file=sys.stderr, flush=True)
