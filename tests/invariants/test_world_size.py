"""Two gloo processes train like one."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.grpo_core.toy import make_trainer, weights

WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from grpo_core import distributed
sys.path.insert(0, {root!r})
from tests.grpo_core.toy import make_trainer, weights
dist = distributed.init("cpu")
trainer = make_trainer(Path({folder!r}), dist=dist, steps=3, beta=0.05, prompts_per_step=5)
trainer.train()
save_file({{"weights": weights(trainer)}}, f"{folder}/rank{{dist.rank}}.safetensors")
distributed.finalize(dist)
"""


def test_two_ranks_train_like_one(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(root), folder=str(tmp_path / "two")))
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

    alone = make_trainer(tmp_path / "one", steps=3, beta=0.05, prompts_per_step=5)
    before = weights(alone).clone()
    alone.train()
    ranks = [load_file(tmp_path / "two" / f"rank{rank}.safetensors")["weights"] for rank in (0, 1)]
    assert torch.equal(ranks[0], ranks[1])
    change = weights(alone) - before
    assert change.norm() > 1e-3
    assert (ranks[0] - weights(alone)).norm() <= 1e-3 * change.norm()
    one, two = ((tmp_path / part / "toy" / "completions.jsonl").read_text().splitlines() for part in ("one", "two"))
    assert len(one) == 3 * 5 * 4

    def texts(lines):
        return [
            (row["step"], row["prompt_id"], row["member"], row["text"], row["reward"]) for row in map(json.loads, lines)
        ]

    assert texts(one) == texts(two)
