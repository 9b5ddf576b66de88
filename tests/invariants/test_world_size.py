"""Two gloo processes train like one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_core.errors import TrainingStopped
from tests.grpo_core.toy import make_trainer, weights

# What a rank finds among its own groups, and what it must be agreed upon: parts of a step, and groups that teach.
RUNS = {
    "plain": {"steps": 3, "beta": 0.05, "prompts_per_step": 5},
    "parts": {"steps": 3, "steps_per_generation": 2, "prompts_per_step": 5},
    "more_parts_than_groups": {"steps": 2, "steps_per_generation": 3, "prompts_per_step": 3, "num_iterations": 2},
    "chosen": {
        "steps": 3,
        "steps_per_generation": 2,
        "dynamic_sampling": True,
        "reserve_prompts": 4,
        "prompts_per_step": 4,
        "scale_rewards": "batch",
        "lora": False,
    },
    "fewer_groups_than_ranks": {
        "steps": 2,
        "prompts_per_step": 1,
        "dynamic_sampling": True,
        "reserve_prompts": 1,
        "top_entropy_quantile": 0.5,
    },
    # a reward that raises on prompt p3 alone, which one rank has: both stop, or both go on
    "fails": {"steps": 9, "prompts_per_step": 5, "max_reward_failures": 0.1, "fails": True},
    "fails_a_little": {"steps": 3, "prompts_per_step": 5, "max_reward_failures": 0.3, "fails": True},
    "diverges": {"steps": 9, "prompts_per_step": 4, "beta": 1e30, "max_nonfinite_steps": 2},
}

WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from grpo_core import distributed
sys.path.insert(0, {root!r})
from tests.invariants.test_world_size import RUNS, run
dist = distributed.init("cpu", timeout_seconds=60)
for name in RUNS:
    folder = Path({folder!r}, name)
    _, after, error = run(folder, name, dist)
    save_file({{"weights": after}}, f"{{folder}}-{{dist.rank}}.safetensors")
    Path(f"{{folder}}-{{dist.rank}}.txt").write_text(error)
distributed.finalize(dist)
"""


def run(folder, name, dist=None):
    """Weights before and after a run, and the message with which it stopped."""
    options = dict(RUNS[name])
    fails = options.pop("fails", False)
    trainer = make_trainer(folder, dist=dist, check_first_step=False, **options)
    before, error = weights(trainer).clone(), ""
    if fails:
        sevens = trainer.rewards[0]

        class Fails:
            name = "sevens"

            def __call__(self, groups):
                if any(group.id == "p3" for group in groups):
                    raise KeyError("no answer to p3")
                return sevens(groups)

        trainer.rewards = [Fails()]
    try:
        trainer.train()
    except TrainingStopped as stopped:
        error = str(stopped)
    return before, weights(trainer), error


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of all runs, made by two processes."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2]), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_like_one(two, tmp_path, name):
    before, alone, error = run(tmp_path, name)
    ranks = [load_file(f"{two / name}-{rank}.safetensors")["weights"] for rank in (0, 1)]
    assert torch.equal(ranks[0], ranks[1])
    change = alone - before
    if name not in ("fails", "diverges"):  # these may stop before they have learned anything
        assert change.norm() > 1e-3
    assert (ranks[0] - alone).norm() <= 1e-3 * change.norm()

    rows, of_two = (
        [json.loads(line) for line in (folder / "toy" / "completions.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two / name)
    )
    kept = ("step", "prompt_id", "member", "text", "reward")
    assert [[row[key] for key in kept] for row in rows] == [[row[key] for key in kept] for row in of_two]

    # both ranks stop where one would have, and the main process says why
    messages = [Path(f"{two / name}-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == error
    assert bool(messages[1]) == bool(error)


def test_a_rank_whose_reward_is_well_says_that_another_ones_is_not(two):
    messages = [(two / f"fails-{rank}.txt").read_text() for rank in (0, 1)]
    assert "such as prompt 'p3', completion 0: KeyError: 'no answer to p3'" in messages[0]
    assert "the main process says which, and how" in messages[1]
    assert not (two / "fails_a_little-0.txt").read_text()
    assert "no gradient was finite in 2 steps in a row" in (two / "diverges-1.txt").read_text()
    assert {path.name[-10:] for path in (two / "diverges" / "toy").glob("nonfinite-*")} == {"rank0.json", "rank1.json"}
