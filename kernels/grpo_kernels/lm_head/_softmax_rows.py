"""Softmax of rows of logits: log-prob of a target, entropy, KL, and their gradient written over the logits.

With raw logits x, z = softcap·tanh(x / softcap) / temperature (softcap optional), m = max z, s = Σ exp(z − m) and
p = exp(z − m) / s:

    log p_y = −log(1 + exp(log s_o + m − z_y))      s_o = Σ_{v≠y} exp(z_v − m)
    H       = log s + Σ p (m − z)
    KL      = Σ p (log p − log q)                    q: the same softmax of reference logits, a constant
            = log(1 + Σ p (exp(−d) − 1 + d))         δ = (z − z_ref) less that of a v with z_v = m,  d = δ − Σ p δ
    ∂/∂z_v  = g_logp ([v = y] − p_v) − g_H p_v (log p_v + H) + g_KL p_v d_v

Summing the other tokens apart keeps log p_y and 1 − p_y = s_o / s exact for confident tokens, where `z_y − lse` is 0
from a margin of some 15 nats in float32. Both terms of H are ≥ 0 and free of the logits' offset, so nothing cancels.
KL and its gradient know the reference by δ alone, which is given as a difference of raw logits: two models that are
close to each other would lose it between the roundings of two logits, and KL between two normalisers. Where one token
has nearly all of p, d there is a sum of what little the others have, and not the difference of two equal numbers.

A gradient narrower than its logits is a GEMM's operand, and takes one of two forms, so that its product is as good as
its own rounding. A log-prob's has one or two entries that outweigh the rest of a row: `LargeEntries` stay in float32,
and are 0 in their place. Entropy's and KL's have none: they are float16, whose eleven bits suffice, with a power of two
a row, found from a bound on the row's entries: |g_logp| (1 − p_y) + |g_H| H + |g_KL| times a function of KL.
"""

from __future__ import annotations

from grpo_kernels._backend import Backend
from grpo_kernels.lm_head._rows_torch import TorchRows
from grpo_kernels.lm_head._rows_triton import TritonRows

Rows = TritonRows | TorchRows
"""A chunk of rows, on either backend."""


def make_rows(backend: Backend, *arguments, **options) -> Rows:
    """A chunk of rows on the given backend."""
    return (TritonRows if backend == "triton" else TorchRows)(*arguments, **options)
