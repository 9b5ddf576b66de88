"""Where Triton is not installed, all three packages import, and GRPO trains to the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.grpo_core.toy import make_trainer

ROOT = Path(__file__).parents[2]
HIDE_TRITON = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
IMPORT_EVERYTHING = """
import importlib, pkgutil

count = 0
for package in map(importlib.import_module, ("grpo_kernels", "grpo_core", "affectgpt")):
    for name in package.__all__:
        getattr(package, name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # programs run when they are imported; what tests use of Triton cannot do without it
        if not module.name.endswith("__main__") and "grpo_kernels.testing." not in module.name:
            importlib.import_module(module.name)
            count += 1
assert "triton" not in sys.modules
print(count)
"""
TRAIN = """
from pathlib import Path
from tests.grpo_core.toy import make_trainer

make_trainer(Path(sys.argv[1]), steps=2, beta=0.05, group_size=8).train()
assert "triton" not in sys.modules
"""


def run(program: str, *arguments: str) -> str:
    """What a fresh Python without Triton prints."""
    command = [sys.executable, "-c", HIDE_TRITON + program, *arguments]
    # -c puts the current folder on the path, which has to be the one that holds tests/
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "toy/metrics.jsonl").read_text().splitlines()]
    clocked = ("time", "second")
    return [{key: value for key, value in row.items() if not any(word in key for word in clocked)} for row in rows]


def test_every_module_of_the_three_packages_imports():
    assert int(run(IMPORT_EVERYTHING)) > 60


def test_two_steps_of_grpo_give_the_same_metrics_and_completions(tmp_path):
    run(TRAIN, str(tmp_path / "without"))
    make_trainer(tmp_path / "with", steps=2, beta=0.05, group_size=8).train()
    without, usual = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert [row["step"] for row in usual] == [1, 2]
    assert {"loss", "kl", "reward", "grad_norm", "entropy"} <= usual[0].keys()
    assert usual[1]["grad_norm"] > 1e-3  # the second step had something to learn
    assert without == usual
    files = [(tmp_path / name / "toy/completions.jsonl").read_text() for name in ("without", "with")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 2 * 4 * 8
