"""The rank that the others wait for is named, with what it was doing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as c10d

from grpo_core.distributed import watchdog
from grpo_core.distributed.watchdog import Activity, Watchdog
from tests.grpo_core.distributed.test_collectives import free_port

ROOT = Path(__file__).parents[3]
RANK = """
import os, signal, sys, time
import torch
from grpo_core import distributed
from grpo_core.distributed.watchdog import activity
dist = distributed.init("cpu", timeout_seconds=3, watchdog_seconds=0.8)
activity.phase = "sample" if dist.rank else "optimizer"
time.sleep(0.5)  # two periods: it has written its phase
distributed.barrier(dist)
if dist.rank:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    distributed.all_reduce_sum(torch.ones(1), dist)
except RuntimeError as error:
    print("ENDED", error, file=sys.stderr, flush=True)
os._exit(0)
"""


def test_a_rank_that_hangs_is_named_and_ends_the_others_after_the_timeout(tmp_path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        said = ranks[0].communicate(timeout=60)[1]
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        ranks[1].kill()
        ranks[1].communicate()
    assert "rank 0 has waited" in said
    assert "in all_reduce_sum (phase optimizer) for rank 1, last in phase sample and silent for" in said
    assert "ENDED all_reduce_sum failed on rank 0 of 2" in said
    assert "run.rank_timeout" in said


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(watchdog, "activity", Activity("update", "barrier", time.monotonic() - 61))
    return c10d.HashStore()


def write(store, rank, **changed):
    state = {"phase": "update", "collective": "barrier", "since": 0.0, "written": time.time()}
    store.set(f"watchdog/{rank}", json.dumps(state | changed))


def report(store, rank, world_size):
    dog = Watchdog(rank, world_size, 60, store)
    dog.stop()
    return dog._report(61)


def test_a_busy_rank_is_named_with_its_phase_by_the_lowest_rank_that_waits(store):
    write(store, 0, phase="reward", collective="")
    write(store, 1)
    write(store, 2)
    assert "for rank 0, busy in phase reward. It waits on until run.rank_timeout" in report(store, 1, 3)
    assert report(store, 2, 3) == ""


def test_a_silent_rank_one_in_another_collective_and_one_that_never_started_are_told_apart(store):
    write(store, 0)
    write(store, 1, written=time.time() - 70, phase="sample")
    write(store, 2, collective="gather_rows", phase="report")
    said = report(store, 0, 4)
    assert (
        "rank 0 has waited 61 s in barrier (phase update) for rank 1, last in phase sample and silent for 70 s" in said
    )
    assert "rank 2, in gather_rows in phase report; rank 3, which has not started" in said
