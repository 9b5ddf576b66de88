"""Say which rank the others wait for, and what it was doing, long before a collective's timeout ends the run.

A thread on every rank writes what its main thread does to the process group's key-value store, a few times a minute. A
rank that has been in one collective for too long reads what the others wrote: a rank that is stopped or has died writes
no more, and one that is only busy names the phase that it is in. No collective is made and no device waited for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Activity:
    """What the main thread of this process does; written by whoever does it, read by the watchdog."""

    phase: str = "start"
    collective: str = ""
    """The collective that it is in; empty outside of one."""
    since: float = 0.0
    """`time.monotonic()` when it entered the collective."""


activity = Activity()


class Watchdog:
    """Watches this rank's collectives from a thread of its own.

    Args:
        rank, world_size: this process's place.
        seconds: how long a collective may take before the ranks that are missing are named.
        store: the ranks' key-value store, which has `set`, `get` and `check`.
    """

    def __init__(self, rank: int, world_size: int, seconds: float, store: Any):
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        # at least once a quarter of a minute, so that "no sign of life" means something after a minute
        self.period = min(seconds / 4, 15.0)
        self._store = store
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        named = 0.0  # the collective that has been reported, by when it began
        while True:
            now = asdict(activity)
            try:
                self._store.set(f"watchdog/{self.rank}", json.dumps(now | {"written": time.time()}))
                waited = time.monotonic() - now["since"]
                if now["collective"] and waited > self.seconds and now["since"] != named:
                    named = now["since"]
                    if report := self._report(waited):
                        print(f"\n{report}", file=sys.stderr, flush=True)
            except RuntimeError:  # the store's process has ended, and this run with it
                return
            if self._stopped.wait(self.period):
                return

    def _report(self, waited: float) -> str:
        """Name the ranks that are missing; empty where a lower rank does so."""
        missing = []
        for rank in range(self.world_size):
            key = f"watchdog/{rank}"
            state = json.loads(self._store.get(key)) if self._store.check([key]) else None
            silent = time.time() - state["written"] if state else 0.0  # clocks of machines agree to a second or so
            if state is None:
                missing.append(f"rank {rank}, which has not started")
            elif silent > 2.5 * self.period:
                missing.append(f"rank {rank}, last in phase {state['phase']} and silent for {silent:.0f} s")
            elif state["collective"] != activity.collective:
                where = f"in {state['collective']}" if state["collective"] else "busy"
                missing.append(f"rank {rank}, {where} in phase {state['phase']}")
            elif rank < self.rank:
                return ""  # it waits too, and says so
        return (
            f"rank {self.rank} has waited {waited:.0f} s in {activity.collective} (phase {activity.phase}) for "
            f"{'; '.join(missing) or 'no rank in particular: all are in it, so look at the network'}. It waits on "
            "until run.rank_timeout"
        )
