"""bfloat16 gradients of the head, computed as on a GPU: only the result's own rounding is to be seen."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import Library

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.lm_head import _gemm, _rows
from grpo_kernels.lm_head._rows_triton import RowLaunch
from grpo_kernels.lm_head.token_loss import LossConfig, LossInputs
from grpo_kernels.testing.interpreter import interpret

from .. import oracles

ONCE = 2e-3
"""Relative norm of one rounding to bfloat16, 1.65e-3 for normal numbers, and of what little else there is."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The CPU takes part in the GPU's way: kernels, GEMMs of bfloat16 operands that give float32 accumulators, and rows
    of weight 0 left in their place."""

    def product(a, b, out_dtype):
        return (a.float() @ b.float()).to(out_dtype)

    aten = Library("aten", "IMPL")
    aten.impl("mm.dtype", product, "CPU")
    aten.impl("mm.dtype_out", lambda a, b, out_dtype, *, out: out.copy_(product(a, b, out_dtype)), "CPU")
    aten.impl(
        "addmm.dtype_out",
        lambda c, a, b, out_dtype, *, beta=1, alpha=1, out: out.copy_(c + product(a, b, out_dtype)),
        "CPU",
    )
    monkeypatch.setattr(_gemm, "OUT_DTYPE_DEVICES", ("cpu",))
    monkeypatch.setattr(sys.modules["grpo_kernels.lm_head.grpo_loss"], "_live_rows", lambda *_: None)
    monkeypatch.setattr(_rows, "launch_rows", lambda: RowLaunch(block=128, warps=1))
    with interpret():
        yield
    aten._destroy()


def relative(value, reference):
    """Norm of the difference over the norm of the reference."""
    return float((value.double() - reference).norm() / reference.norm())


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    reference_hidden: Tensor
    targets: Tensor

    @classmethod
    def make(cls, T, H, V, *, bias=False, distinct=None, shift=0.0, margin=None, confident="target"):
        """In bfloat16, of (a few distinct) targets. Every logit is raised by `shift`; with a margin, the target (or
        another token) is ahead of all others by about that many nats."""
        hidden, weight = noise(T, H, seed=0), noise(V, H, seed=1) / H**0.5
        targets = torch.randint(distinct or V, (T,), generator=torch.Generator().manual_seed(2))
        if margin is not None:
            ahead = targets if confident == "target" else (targets + 1) % V
            hidden = 0.5 * hidden + margin * weight[ahead] / weight[ahead].square().sum(1, keepdim=True)
        if shift:  # exact in bfloat16
            hidden[:, 0], weight[:, 0] = shift, 1.0
        floats = (hidden, weight, noise(V, seed=3) if bias else None, hidden + 0.3 * noise(T, H, seed=4))
        return cls(*(None if x is None else x.bfloat16() for x in floats), targets)

    def leaves(self, frozen=False):
        """What gradients are compared of, in order."""
        tensors = self[:1] if frozen else (x for x in self[:3] if x is not None)
        return [x.requires_grad_() for x in tensors]

    def double(self):
        return Batch(*(None if x is None else x.detach().double() for x in self[:4]), self.targets)

    def outputs(self, temperature=1.0, softcap=None):
        """Log-prob, entropy and KL by their definitions."""

        def log_softmax(hidden):
            z = hidden @ self.weight.T if self.bias is None else hidden @ self.weight.T + self.bias
            return oracles.log_softmax((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature)

        logp, logq = log_softmax(self.hidden), log_softmax(self.reference_hidden).detach()
        logprob = logp.gather(1, self.targets[:, None])[:, 0]
        return {"logprob": logprob, "entropy": oracles.entropy(logp), "kl": oracles.kl(logp, logq)}


class Statistics:
    """Outputs of `linear_logprob`, each weighted by noise."""

    def __init__(self, *names):
        self.names = names

    def definition(self, outputs):
        return sum((noise(len(outputs[name]), seed=len(name)) * outputs[name]).sum() for name in self.names)

    def __call__(self, batch, _, **options):
        if "kl" in self.names:
            options["reference_hidden"] = batch.reference_hidden
        options["entropy"] = "entropy" in self.names
        got = linear_logprob(batch.hidden, batch.weight, batch.targets, bias=batch.bias, **options)
        return self.definition(got._asdict())


class Loss:
    """`linear_grpo_loss` with a KL penalty; some rows have weight 0, and no valid target."""

    def __init__(self, by_completion=False, entropy_coef=0.0):
        self.by_completion, self.config = by_completion, LossConfig(beta=0.05, entropy_coef=entropy_coef)

    def inputs(self, outputs):
        logprob = outputs["logprob"].detach().float()
        T = len(logprob)
        weight = torch.where(torch.arange(T) % 5 == 4, 0.0, noise(T, seed=5).abs() / T)
        old, reference = (logprob + 0.05 * noise(T, seed=seed) for seed in (6, 7))
        index, count = (torch.arange(T) // 4, -(-T // 4)) if self.by_completion else (None, None)
        return LossInputs(weight, noise(T, seed=8), old, reference, index, count, self.config)

    def definition(self, outputs):
        inputs = self.inputs(outputs)
        live = inputs.weight != 0
        loss = inputs.rows(live).loss(outputs["logprob"][live], outputs["entropy"][live]).loss
        return (loss * inputs.weight[live]).sum()

    def __call__(self, batch, outputs, **options):
        options |= self.inputs(outputs)._asdict()
        config, loss_weight = options.pop("config"), options.pop("weight")
        options |= {"beta": config.beta, "entropy_coef": config.entropy_coef, "loss_weight": loss_weight}
        targets = torch.where(loss_weight != 0, batch.targets, -100)
        return linear_grpo_loss(batch.hidden, batch.weight, targets, bias=batch.bias, **options).loss


def errors(objective, *, frozen=False, chunk_bytes=None, temperature=1.0, softcap=None, **shape):
    """Relative norms of the gradients in hidden states and (not frozen) weight and bias."""
    batch = Batch.make(**shape)
    wide = batch.double()
    leaves, wide_leaves = batch.leaves(frozen), wide.leaves(frozen)
    transform = {"temperature": temperature, "softcap": softcap}
    outputs = wide.outputs(**transform)
    objective.definition(outputs).backward()
    objective(batch, outputs, chunk_bytes=chunk_bytes, **transform).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
    return [relative(a.grad, b.grad) for a, b in zip(leaves, wide_leaves, strict=True)]


SHAPE = {"T": 15, "H": 67, "V": 197}
CASES = {
    "odd sizes": SHAPE,
    "one row": {"T": 1, "H": 1023, "V": 131},
    "few distinct targets": SHAPE | {"T": 30, "distinct": 3},
    "bias": SHAPE | {"T": 40, "bias": True},
    "frozen": SHAPE | {"frozen": True},
    "temperature 0.3": SHAPE | {"temperature": 0.3},
    "temperature 2, softcap": SHAPE | {"temperature": 2.0, "softcap": 5.0},
    "logits up by 120": SHAPE | {"shift": 120.0},
    "logits down by 120": SHAPE | {"shift": -120.0},
    **{
        f"{who} ahead by {margin} nats": SHAPE | {"H": 1023, "margin": margin, "confident": who}
        for who in ("target", "another token")
        for margin in (17, 40)
    },
}


OBJECTIVES = {
    "log-prob": Statistics("logprob"),
    "entropy": Statistics("entropy"),
    "KL": Statistics("kl"),
    "loss": Loss(),
    "loss with entropy": Loss(entropy_coef=0.01),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_rounded_once(objective, case):
    assert max(errors(OBJECTIVES[objective], **CASES[case])) < ONCE


@pytest.mark.parametrize("case", ["bias", "frozen", "target ahead by 40 nats"])
@pytest.mark.parametrize(
    "objective",
    [Statistics("logprob", "entropy", "kl"), Loss(by_completion=True), Loss(by_completion=True, entropy_coef=0.01)],
    ids=["all three", "loss of completions", "loss of completions with entropy"],
)
def test_gradients_summed_over_chunks_are_rounded_once(objective, case):
    assert max(errors(objective, **CASES[case], chunk_bytes=5_000)) < ONCE


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
def test_gradients_of_any_magnitude_are_rounded_once(factor):
    """Those of entropy pass through float16, which holds 6e-8 to 65,504."""
    batch = Batch.make(**CASES["bias"])
    leaves, wide = batch.leaves(), batch.double()
    rows = factor * 4.0 ** -torch.arange(15).repeat(3)[:40]  # of unlike weight
    (linear_logprob(*batch[:2], batch.targets, bias=batch.bias, entropy=True).entropy * rows).sum().backward()
    wide_leaves = wide.leaves()
    (wide.outputs()["entropy"] * rows).sum().backward()
    assert max(relative(a.grad, b.grad) for a, b in zip(leaves, wide_leaves, strict=True)) < ONCE


@pytest.mark.parametrize("name", ["logprob", "entropy", "kl"])
@pytest.mark.parametrize(("grad_dtype", "bar"), [(torch.float32, ONCE), (torch.bfloat16, 1.4 * ONCE)])
def test_head_tied_to_the_embedding_adds_two_gradients_that_were_rounded_once(name, grad_dtype, bar):
    """Autograd adds them, and in bfloat16 rounds the sum: then it is 1.65e-3 · √2."""
    batch = Batch.make(**SHAPE)
    objective, ids = Statistics(name), batch.targets.roll(1)
    batch.weight.grad_dtype = grad_dtype
    tied = [x._replace(weight=x.weight.requires_grad_(), hidden=x.weight[ids]) for x in (batch, batch.double())]
    objective(tied[0], None).backward()
    objective.definition(tied[1].outputs()).backward()
    assert tied[0].weight.grad.dtype == grad_dtype
    assert relative(*(x.weight.grad for x in tied)) < bar


def test_rows_all_masked_give_gradients_of_zero():
    batch = Batch.make(5, 16, 70, bias=True)
    leaves, zeros = batch.leaves(), torch.zeros(5)
    linear_grpo_loss(*leaves[:2], batch.targets, zeros + 1, loss_weight=zeros, bias=leaves[2]).loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize("chunk_bytes", [None, 1500])
def test_same_call_gives_the_same_bits(chunk_bytes):
    gradients = []
    for _ in range(2):
        batch = Batch.make(9, 16, 70, bias=True, distinct=2)
        leaves = batch.leaves()
        Statistics("logprob")(batch, None, chunk_bytes=chunk_bytes).backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
