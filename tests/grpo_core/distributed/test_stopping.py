"""A signal of one rank stops all ranks at the same step, and what they dropped comes again bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_core.distributed import Distributed, stopping
from grpo_core.distributed.stopping import StepDropped, Stopped, listen, poll, stoppable, until_stopped

ROOT = Path(__file__).parents[3]
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from grpo_core import distributed
from grpo_core.training import loop
from tests.grpo_core.toy import make_trainer, weights
folder, dist = Path({folder!r}), distributed.init("cpu", timeout_seconds=60)
loop.finalize = lambda dist: None  # one process group for the three runs
OPTIONS = dict(dist=dist, steps=3, beta=0.05, max_new_tokens=12, prompts_per_step=4)
whole = make_trainer(folder / "whole", **OPTIONS)
whole.train()

stopped, calls = make_trainer(folder / "parts", **OPTIONS), 0
decode = stopped.sampler.decoder.step
def slow(tokens):
    global calls
    if stopped.step_index == 1:
        calls += 1
        time.sleep(0.05)
        if calls == 2 and dist.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
    return decode(tokens)
stopped.sampler.decoder.step = slow
try:
    stopped.train()
    code = 0
except SystemExit as leaving:
    code = leaving.code
resumed = make_trainer(folder / "parts", **OPTIONS)
saved = resumed.checkpoints.newest().name
resumed.train()
found = dict(code=code, calls=calls, saved=saved, equal=bool((weights(resumed) == weights(whole)).all()))
(folder / f"{{dist.rank}}.json").write_text(json.dumps(found))
distributed.finalize(dist)
"""


def test_a_signal_of_one_rank_drops_the_step_on_both_within_a_block_of_decode_steps(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["code"] == 128 + signal.SIGUSR1
        assert found["saved"] == "step-000001"
        assert found["equal"]
        assert found["calls"] < 11  # the rank that got no signal left its rollout early, too
    one, two = ((tmp_path / part / "toy" / "completions.jsonl").read_bytes() for part in ("whole", "parts"))
    assert one == two


def test_work_is_dropped_between_its_items_and_nothing_is_dropped_without_a_signal():
    dist, made = Distributed(), []
    with listen(dist):
        assert list(until_stopped(range(3), dist)) == [0, 1, 2]

        def work():
            for item in until_stopped(range(3), dist):
                made.append(item)
                if item == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        def work_that_polls():
            with stoppable(dist):
                poll()
                made.append("after a poll")

        with pytest.raises(StepDropped) as dropped:
            work()
        assert (made, dropped.value.signum) == ([0, 1], signal.SIGTERM)
        poll()  # outside of stoppable work: whoever is here may not leave, or the others would wait for this rank
        with pytest.raises(StepDropped):
            work_that_polls()
        stopping._request.signum = 0  # acted upon
    assert made == [0, 1]
    with stoppable(dist):
        poll()


def test_outside_of_loops_a_signal_unwinds_what_is_half_done_and_exits_with_its_status(tmp_path):
    code = "\n".join(
        [
            "import os, time, sys",
            "from grpo_core.distributed.stopping import exit_on_signals",
            "exit_on_signals()",
            "try:",
            "    print('ready', flush=True)",
            "    time.sleep(60)",
            "finally:",
            "    print('cleaned up', flush=True)",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "cleaned up\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert Stopped(signal.SIGINT).code == 130


def test_outside_the_main_thread_nothing_is_changed():
    import threading

    handler, seen = signal.getsignal(signal.SIGTERM), []

    def train():
        with listen(Distributed()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_a_poll_costs_nothing_to_speak_of():
    dist = Distributed()
    with listen(dist), stoppable(dist):
        started = time.perf_counter()
        for _ in range(10_000):
            poll()
        assert time.perf_counter() - started < 0.5  # 50 µs each at the most; about 0.3 µs


@pytest.mark.parametrize("rank", [0, 1])
def test_numbers_of_one_rank_that_are_not_finite_end_the_work_on_every_rank(monkeypatch, rank):
    """Rank 1 draws NaN. It joins the collective at the work's end first, or rank 0 would wait there for it."""
    sent = []

    def agree(values, dist):
        sent.append(values)
        return [0, 1]

    def draw():
        with stoppable(Distributed()):
            if rank == 1:
                raise FloatingPointError("logits of rank 1")

    monkeypatch.setattr(stopping, "max_over_ranks", agree)
    with pytest.raises(FloatingPointError, match="of rank 1" if rank == 1 else "another rank"):
        draw()
    assert sent == [[0, rank]]
