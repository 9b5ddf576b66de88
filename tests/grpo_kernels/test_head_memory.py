"""At T = 2048, H = 512, V = 32,768 the head needs a sixth of plain torch's memory and no more of its processor time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "kernels.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_head_needs_a_sixth_of_the_memory_and_no_more_processor_time():
    names = ("torch: log_softmax + gather", "ours: linear_grpo_loss")
    results = []
    for name in names:
        command = [sys.executable, BENCH, "--rounds", "1", "--worker", name]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    plain, ours = results
    assert ours["peak_mib"] <= plain["peak_mib"] / 6
    # not the clock, which other processes disturb
    assert ours["cpu_seconds"] <= 1.1 * plain["cpu_seconds"]
