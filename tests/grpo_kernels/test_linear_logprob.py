"""`linear_logprob` against a float64 softmax: values, every gradient, bad input, bounds on memory."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import linear_logprob

OUTPUTS = ("logprob", "entropy", "kl")


def oracle(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, reference_hidden=None):
    """Definitions, written out in the dtype given."""

    def log_softmax(h, w, b):
        logits = h @ w.T
        logits = logits if b is None else logits + b
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits / temperature, -1)

    logp = log_softmax(hidden, weight, bias)
    result = {
        "logprob": logp.gather(1, targets[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    if reference_hidden is not None:
        with torch.no_grad():
            logq = log_softmax(reference_hidden, weight, bias)
        result["kl"] = (logp.exp() * (logp - logq)).sum(-1)
    return result


def relative(value, reference):
    """Norm of the difference over the norm of the reference."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def make(T, H, V, dtype=torch.float32, seed=0, bias=False, reference=False, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, H, generator=g) * spread).to(dtype)
    weight = (torch.randn(V, H, generator=g) / H**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    return (
        hidden,
        weight,
        targets,
        torch.randn(V, generator=g).to(dtype) if bias else None,
        (hidden + 0.3 * torch.randn(T, H, generator=g).to(dtype)) if reference else None,
    )


def compare(T, H, V, *, dtype=torch.float32, bias=False, reference=False, frozen=False, upstream=OUTPUTS, **options):
    """Errors of values (largest absolute) and gradients (relative norm) against float64."""
    hidden, weight, targets, b, ref = make(T, H, V, dtype, bias=bias, reference=reference)
    leaves = [hidden, *([] if frozen else [weight] + ([b] if bias else []))]
    for leaf in leaves:
        leaf.requires_grad_()
    got = linear_logprob(hidden, weight, targets, bias=b, reference_hidden=ref, entropy=True, **options)
    double = [None if t is None else t.detach().double() for t in (hidden, weight, b, ref)]
    wide = [double[0], *([] if frozen else [double[1]] + ([double[2]] if bias else []))]
    for leaf in wide:
        leaf.requires_grad_()
    options = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    want = oracle(double[0], double[1], targets, double[2], reference_hidden=double[3], **options)
    g = torch.Generator().manual_seed(1)
    names = [name for name in upstream if getattr(got, name) is not None]
    coefficients = {name: torch.randn(T, generator=g) for name in names}
    sum((getattr(got, n) * coefficients[n]).sum() for n in names).backward()
    sum((want[n] * coefficients[n].double()).sum() for n in names).backward()
    values = {
        n: float((getattr(got, n).double() - want[n]).detach().abs().max())
        for n in OUTPUTS
        if getattr(got, n) is not None
    }
    gradients = [relative(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    assert all(a.grad.dtype == a.dtype for a in leaves)
    return values, gradients


@pytest.mark.parametrize("upstream", [("logprob",), ("entropy",), ("kl",), OUTPUTS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "temperature": 0.3},
        {"softcap": 5.0, "temperature": 2.0},
        {"softcap": 5.0, "bias": True, "chunk_bytes": 4096},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(options, frozen, upstream):
    values, gradients = compare(37, 19, 131, reference=True, frozen=frozen, upstream=upstream, **options)
    assert max(values.values()) < 1e-5
    # KL weighs differences of two log-probs, each with the rounding of its logits
    assert max(gradients) < (1e-6 if "kl" not in upstream else 4e-6)


def test_float64_stays_float64():
    values, gradients = compare(9, 8, 33, dtype=torch.float64, reference=True, bias=True, chunk_bytes=600)
    assert max(values.values()) < 1e-12
    assert max(gradients) < 1e-12


def test_bfloat16_operands_keep_float32_accumulators():
    values, gradients = compare(40, 96, 997, dtype=torch.bfloat16, reference=True, chunk_bytes=30_000)
    assert max(values.values()) < 1e-4
    assert max(gradients) < 2e-3
