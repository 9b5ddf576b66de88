"""Shared by the tests of the head: random heads, the definitions in a given dtype, and the error measure."""

from __future__ import annotations

import torch

from .. import oracles

OUTPUTS = ("logprob", "entropy", "kl")


def oracle(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, reference_hidden=None):
    """Definitions, written out in the dtype given."""

    def log_softmax(h, w, b):
        logits = h @ w.T
        logits = logits if b is None else logits + b
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return oracles.log_softmax(logits / temperature)

    logp = log_softmax(hidden, weight, bias)
    result = {"logprob": logp.gather(1, targets[:, None])[:, 0], "entropy": oracles.entropy(logp)}
    if reference_hidden is not None:
        with torch.no_grad():
            logq = log_softmax(reference_hidden, weight, bias)
        result["kl"] = oracles.kl(logp, logq)
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
