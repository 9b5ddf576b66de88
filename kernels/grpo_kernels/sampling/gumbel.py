"""Gumbel noise that is a pure function of (row key, token, column), on a GPU and in plain torch.

The draw is word 0 of Philox4x32-10 (Salmon et al., SC'11) under a row's 64-bit key, with counter (token, column, 0, 0):
`token` counts a completion's sampled tokens from 0, `column` is the vocabulary index. Then

    u = (draw + ½) / 2³²        E = −ln u        gumbel = −ln E        argmax(z + gumbel) ~ softmax(z).

Near u = 1, where float32 has only 2⁻²⁴ steps and the largest noise would be infinite, E comes from 1 − u, which the
complement of the draw gives exactly: −ln(1 − t) = t + t²/2 + t³/3 + …
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import tl, triton

_MASK = 0xFFFFFFFF
"""Of a 32-bit word."""
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
"""Philox4x32's constants (Salmon et al., SC'11): multipliers, and what the key grows by, golden ratio and √3 − 1."""


@triton.jit
def gumbel_noise(key, token, column):
    """float32 noise of the broadcast shape: int64 keys, int32 tokens, int32 columns."""
    column = column + 0 * token  # broadcasts: philox takes words of one shape
    zero = column * 0
    draw, _, _, _ = tl.philox(key, token + zero, column, zero, zero)
    u = draw.to(tl.float32) * 2.0**-32 + 2.0**-33
    # t = 1 − u from the complement of the draw. Below 1/64 five terms leave out less than 2⁻³² of −ln(1 − t)
    t = (draw ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + 2.0**-33
    series = t * (1.0 + t * (0.5 + t * (1.0 / 3.0 + t * (0.25 + t * 0.2))))
    return -tl.log(tl.where(t < 1.0 / 64.0, series, -tl.log(u)))


def gumbel_noise_reference(keys: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
    """float64 noise of the broadcast shape of int64 tensors."""
    k0, k1 = keys & _MASK, keys >> 32 & _MASK
    c0, c1, c2, c3 = tokens & _MASK, columns & _MASK, torch.zeros_like(tokens), torch.zeros_like(tokens)
    for _ in range(10):  # rounds
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits, wrapping: the words are the same
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return -torch.log(-torch.log1p(-((c0 ^ _MASK).double() + 0.5) * 2.0**-32))
