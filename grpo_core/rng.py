"""Counter-based random numbers: pure functions of (seed, step, prompt, member, token), so nothing depends on batch
split, world size, call order or resume point.

The generator is Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11), the
one that `triton.language.philox` computes. A draw takes two steps, so that a kernel needs only one 64-bit key per row:

    row key = words 0 and 1 (low, high) of   philox(key = seed,    counter = (prompt low, prompt high, step, member))
    draw    = word 0 of                      philox(key = row key, counter = (token, column, 0, 0))
    uniform = (draw + 0.5) / 2³²             exact in float64, in the open interval (0, 1)
                                             (in float32 the largest 2⁻²⁵ of them round to 1)

In Triton: `draw, _, _, _ = tl.philox(row_key, token, column, zero, zero)` with uint32 counters. `token` counts a
completion's sampled tokens from 0. `column` is 0 for one draw per token (inverse CDF) and the vocabulary index for one
draw per logit (Gumbel-max). Both interfaces take a 64-bit key, whose words are (low, high) = (k0, k1). A member of
2³² - 1 is kept for data order.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_DATA_ORDER = 0xFFFFFFFF


def philox(counter: tuple[ArrayLike, ...], key: int | ArrayLike) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four arrays of 32-bit words, broadcast against each other and the key.
        key: 64-bit integers; signed ones are taken modulo 2⁶⁴.

    Returns:
        Four uint64 arrays of the broadcast shape, each holding a 32-bit word.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    # NumPy would refuse a Python integer that is negative or has more than 64 bits
    keys = np.asarray(key & (2**64 - 1) if isinstance(key, int) else key).astype(np.uint64)
    k0, k1 = keys & _MASK, keys >> _32
    for round_ in range(10):
        r0 = (k0 + np.uint64(round_ * _WEYL[0] & 0xFFFFFFFF)) & _MASK
        r1 = (k1 + np.uint64(round_ * _WEYL[1] & 0xFFFFFFFF)) & _MASK
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 × 32 → 64 bits, no overflow
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ r0, p1 & _MASK, (p0 >> _32) ^ c3 ^ r1, p0 & _MASK
    return c0, c1, c2, c3


def prompt_key(prompt_id: str) -> int:
    """A prompt's 64-bit key: BLAKE2b of its UTF-8 id, so it is the same in every process and on every machine."""
    return int.from_bytes(blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


def row_key(seed: int, step: int, prompt_key: ArrayLike, member: ArrayLike) -> NDArray[np.uint64]:
    """The 64-bit Philox key of every row that is decoded.

    Args:
        seed: the run's seed, any integer (modulo 2⁶⁴).
        step: the optimiser step the rollout belongs to, 0 ≤ step < 2³².
        prompt_key: `[rows]` from `prompt_key(prompt.id)`, uint64.
        member: `[rows]` index in the group, 0 ≤ member < 2³² - 1.

    Returns:
        uint64 `[rows]` (the arguments' broadcast shape). For torch, `torch.from_numpy(keys.view(np.int64))`.
    """
    prompts = np.asarray(prompt_key).astype(np.uint64)
    words = philox((prompts & _MASK, prompts >> _32, np.asarray(step) & 0xFFFFFFFF, np.asarray(member)), seed)
    return words[0] | words[1] << _32


def uniform(
    seed: int, step: int, prompt_key: ArrayLike, member: ArrayLike, token: ArrayLike, column: ArrayLike = 0
) -> NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1), float64, one for every element of the arguments' broadcast shape.

    A sampler may draw token by token (`[rows]`), or a whole rollout in one call with `member[:, None]` and
    `token = np.arange(max_new_tokens)`: the numbers are the same.

    Args:
        seed, step, prompt_key, member: as for `row_key`.
        token: index of the sampled token in its completion, 0 ≤ token < 2³².
        column: which of several draws for that token; the vocabulary index for Gumbel-max.
    """
    return row_uniform(row_key(seed, step, prompt_key, member), token, column)


def row_uniform(row_key: ArrayLike, token: ArrayLike, column: ArrayLike = 0) -> NDArray[np.float64]:
    """`uniform` of rows whose keys are known: uint64 `row_key`, broadcast against `token` and `column`."""
    draw, _, _, _ = philox((token, column, 0, 0), row_key)
    return (draw.astype(np.float64) + 0.5) * 2.0**-32


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch number `epoch` visits n samples: int64 `[n]`, a permutation of 0 … n - 1.

    Samples are sorted by 64 random bits of their own, so the order is the same on every platform and version of NumPy.
    """
    samples = np.arange(n, dtype=np.uint64)
    words = philox((samples & _MASK, samples >> _32, epoch & 0xFFFFFFFF, _DATA_ORDER), seed)
    return np.argsort(words[0] | words[1] << _32, kind="stable").astype(np.int64)
