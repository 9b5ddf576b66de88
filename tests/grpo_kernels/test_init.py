"""The package's front: names loaded on first use, and everything on torch where Triton is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels

ROOT = Path(__file__).parents[2]


def run(program: str) -> list[str]:
    """Words that a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_brings_neither_torch_nor_triton():
    loaded = run("import sys, grpo_kernels\nprint(*sys.modules)")
    assert "grpo_kernels" in loaded
    assert not {"torch", "triton", "numpy"} & set(loaded)


def test_one_operation_brings_no_other():
    loaded = run("import sys\nfrom grpo_kernels import rms_norm\nprint(*(m for m in sys.modules if 'grpo_k' in m))")
    assert set(loaded) == {
        "grpo_kernels",
        "grpo_kernels._backend",
        "grpo_kernels.layers",
        "grpo_kernels.layers.rms_norm",
    }


def test_the_product_imports_no_test_tool():
    loaded = run("import sys, grpo_kernels as k\n[getattr(k, n) for n in k.__all__]\nprint(*sys.modules)")
    assert "grpo_kernels.lm_head.logprob" in loaded
    assert not [name for name in loaded if name.startswith("grpo_kernels.testing")]


def test_type_checkers_and_the_loader_know_the_same_names():
    tree = ast.parse(Path(grpo_kernels.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING:
    shown = {
        node.module.removeprefix("grpo_kernels."): {alias.name for alias in node.names}
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert shown == {module: set(names.split()) for module, names in grpo_kernels._MODULES.items()}
    assert set(grpo_kernels.__all__) == {"__version__"}.union(*shown.values())


@pytest.mark.parametrize("name", grpo_kernels.__all__)
def test_every_public_name_loads(name):
    assert getattr(grpo_kernels, name) is not None
    assert name in dir(grpo_kernels)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'grpo_kernels' has no attribute 'linear_logprobs'"):
        _ = grpo_kernels.linear_logprobs


def test_the_distribution_has_the_packages_version():
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == grpo_kernels.__version__


WITHOUT_TRITON = """
import sys
import warnings

warnings.simplefilter("ignore")  # torch's, that it found no numpy
sys.modules["numpy"] = None  # as if it were not installed

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
import grpo_kernels as k

for name in k.__all__:
    getattr(k, name)
assert "triton" not in sys.modules

torch.manual_seed(0)
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
targets, advantages, loss_weight = torch.randint(30, (5,)), torch.randn(5), torch.full((5,), 0.2)
k.linear_logprob(hidden, weight, targets, entropy=True).logprob.sum().backward()
want = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(5), targets]
gradients = torch.autograd.grad(want.sum(), (hidden, weight))
torch.testing.assert_close((hidden.grad, weight.grad), gradients)
logits = (hidden @ weight.T).detach().requires_grad_()
loss = k.grpo_loss(logits, targets, advantages, loss_weight=loss_weight).loss
loss.backward()
torch.testing.assert_close(loss.detach(), -(loss_weight * advantages).sum())
q, kv = torch.randn(9, 4, 8, requires_grad=True), torch.randn(9, 2, 8, requires_grad=True)
k.group_attention(q, kv, kv, k.GroupSpans([3], [[2, 4]])).sum().backward()
assert q.grad.isfinite().all() and kv.grad.isfinite().all()
drawn = k.sample_row(logits.detach(), torch.arange(5), torch.zeros(5, dtype=torch.int64), k.SampleOptions(top_k=3))
assert ((logits.detach() > logits.detach().gather(1, drawn.token[:, None])).sum(1) < 3).all()
same = k.sample_head(hidden.detach(), weight.detach(), torch.arange(5), torch.zeros(5, dtype=torch.int64))
assert same.token.shape == (5,)
normed, summed = k.rms_norm(hidden.detach(), torch.ones(8), 0.0)
torch.testing.assert_close(normed.square().mean(-1), torch.ones(5))
try:
    k.rms_norm(hidden.detach(), torch.ones(8), 1e-6, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_numpy_every_operation_loads():
    program = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["numpy"] = None
import grpo_kernels as k
for name in k.__all__:
    getattr(k, name)
from grpo_kernels.sampling.sample_row import sample_row_kernel
from grpo_kernels.testing.sm90 import compile_sm90  # which compiles, and interprets nothing
print("triton" in sys.modules, sys.modules["numpy"])
"""
    assert run(program) == ["True", "None"]


def test_without_triton_and_numpy_everything_imports_and_runs_on_torch():
    said = " ".join(run(WITHOUT_TRITON))
    assert said == "backend='triton' needs Triton, which is not installed here: use backend='torch' or None"
