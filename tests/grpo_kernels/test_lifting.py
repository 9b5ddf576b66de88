"""An operation can be copied out of the package with exactly the files that docs/kernels.md names."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels/grpo_kernels"


def documented() -> dict[str, list[str]]:
    """Each operation of the section's table, and its files."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    section = text.partition("## Lifting one operation\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|$", section, re.MULTILINE)
    return {name: re.findall(r"`(.+?)`", files) for names, files in rows for name in re.findall(r"`(.+?)`", names)}


LIFTED = documented()


def imported(path: Path) -> set[str]:
    """Files of the package that a file imports when it runs: not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[2].replace(".", "/") + ".py" for name in names if name.startswith("grpo_kernels.")}


def closure(path: str) -> set[str]:
    found, pending = {path}, [path]
    while pending:
        new = imported(PACKAGE / pending.pop()) - found
        found |= new
        pending += new
    return found


def test_the_table_is_read():
    assert len(LIFTED["linear_logprob"]) <= 6
    assert len(LIFTED["selective_logprob"]) <= 4
    assert len(LIFTED["sample_head"]) <= 5
    assert len(LIFTED["group_attention"]) == 2
    assert len(LIFTED["rms_norm"]) == 2


@pytest.mark.parametrize("name", LIFTED)
def test_the_named_files_are_all_that_an_operation_imports(name):
    files = LIFTED[name]
    assert f"def {name}(" in (PACKAGE / files[0]).read_text(encoding="utf-8")
    assert sorted(files) == sorted(closure(files[0]))


RUN = {
    "linear_logprob": """
from grpo_kernels.lm_head.logprob import linear_logprob
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
targets = torch.randint(30, (5,))
want = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(5), targets]
gradients = torch.autograd.grad(want.sum(), (hidden, weight))
got = linear_logprob(hidden, weight, targets, entropy=True)
torch.testing.assert_close(got.logprob, want)
torch.testing.assert_close(torch.autograd.grad(got.logprob.sum(), (hidden, weight)), gradients)
""",
    "sample_head": """
from grpo_kernels.sampling.sample_head import SampleOptions, sample_head
hidden, weight, zeros = torch.randn(5, 8), torch.randn(30, 8), torch.zeros(5, dtype=torch.int64)
got = sample_head(hidden, weight, zeros, zeros, SampleOptions(temperature=0.0))
assert torch.equal(got.token, (hidden @ weight.T).argmax(1))
drawn = sample_head(hidden[:1].expand(2000, -1), weight, torch.arange(2000), torch.zeros(2000, dtype=torch.int64))
p = torch.softmax(hidden[0] @ weight.T, -1)
assert (torch.bincount(drawn.token, minlength=30) / 2000 - p).abs().max() < 0.05
""",
}


@pytest.mark.parametrize("name", RUN)
def test_a_lifted_operation_runs_alone(name, tmp_path):
    for file in LIFTED[name]:
        target = tmp_path / "grpo_kernels" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, target)
    program = f"import sys, torch\nsys.path.insert(0, {str(tmp_path)!r})\ntorch.manual_seed(0)\n{RUN[name]}"
    program += "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('grpo_') and m.__file__))\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -P keeps out the folder it runs in. Our own install, if there is one, comes after `tmp_path`: the files tell
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = {Path(file).relative_to(tmp_path / "grpo_kernels").as_posix() for file in done.stdout.split()}
    assert used == set(LIFTED[name])
