"""Log-prob and entropy of an LM head in one GEMM that writes statistics instead of logits; forward only.

Each program multiplies a tile of hidden states with a tile of the vocabulary and reduces it, still in its
accumulators, to three numbers a row: m = max z, Σ exp(z − m), Σ exp(z − m)(z − m), the target left out, whose own logit
is stored apart. A second, small kernel folds the tiles. No loop runs across tiles, so any GEMM skeleton will do and
results do not depend on the order of programs.

Bytes for T rows: hidden and weight once (weight from L2 while `GROUP` row tiles sweep it), 12·T·V / BLOCK_V of
statistics: 7 KB a row at V = 152,064, where float32 logits are 608 KB. FLOP: 2·T·H·V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_kernels.lm_head._rows import RowStatistics, Transform
from grpo_kernels.lm_head._rows_triton import log1p, transform_logits
from grpo_kernels.testing.interpreter import interpreted


@triton.jit
def lm_head_stats_kernel(
    hidden,  # descriptor [T, H]
    weight,  # descriptor [V, H]
    bias_ptr,
    targets,
    tile_max,  # [tiles of V, T], as the next two
    tile_sum,
    tile_moment,
    target_logit,  # [T]
    T,
    V,
    H,
    inverse_temperature,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Statistics of one tile; GROUP row tiles sweep the vocabulary together, so that a weight tile is read once."""
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_v = tl.cdiv(V, BLOCK_V)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_v) * GROUP
    members = min(tiles_t - first, GROUP)
    within = program % (GROUP * tiles_v)
    tile_t = first + within % members
    tile_v = within // members

    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for h in range(0, H, BLOCK_H):
        x = hidden.load([tile_t * BLOCK_T, h])
        w = weight.load([tile_v * BLOCK_V, h])
        logits = tl.dot(x, w.T, logits)

    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = t < T
    y = tl.load(targets + t, rows, other=-1)
    # half by half: the accumulators and three whole tiles of intermediates would not fit into the registers
    left, right = logits.reshape(BLOCK_T, 2, BLOCK_V // 2).permute(0, 2, 1).split()
    v = tile_v * BLOCK_V
    m, s, q, z_y = _reduce(left, v, y, bias_ptr, V, inverse_temperature, softcap, BIAS, SOFTCAP, ENTROPY, BLOCK_V // 2)
    tl.debug_barrier()  # keeps the compiler from interleaving the halves again
    v += BLOCK_V // 2
    m_right, s_right, q_right, z_y_right = _reduce(
        right, v, y, bias_ptr, V, inverse_temperature, softcap, BIAS, SOFTCAP, ENTROPY, BLOCK_V // 2
    )
    highest = tl.maximum(m, m_right)
    shrink, shrink_right = tl.exp(m - highest), tl.exp(m_right - highest)
    out = tile_v.to(tl.int64) * T + t
    tl.store(tile_max + out, highest, rows)
    tl.store(tile_sum + out, s * shrink + s_right * shrink_right, rows)
    if ENTROPY:
        q = (q + s * (m - highest)) * shrink + (q_right + s_right * (m_right - highest)) * shrink_right
        tl.store(tile_moment + out, q, rows)
    in_tile = (y >= tile_v * BLOCK_V) & (y < tl.minimum((tile_v + 1) * BLOCK_V, V))
    tl.store(target_logit + t, z_y + z_y_right, rows & in_tile)


@triton.jit
def _reduce(
    logits,
    start,
    y,
    bias_ptr,
    V,
    inverse_temperature,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of logits `[T, WIDTH]` of tokens from `start` on: m, Σ exp(z − m), Σ exp(z − m)(z − m), and z_y (else 0)."""
    v = start + tl.arange(0, WIDTH)
    if BIAS:
        logits += tl.load(bias_ptr + v, v < V, other=0.0).to(tl.float32)[None, :]
    z = transform_logits(logits, inverse_temperature, softcap, SOFTCAP)
    is_target = v[None, :] == y[:, None]
    z_y = tl.sum(tl.where(is_target, z, 0.0), 1)
    # loads past V give zeros, and a zero is a logit like any other: such columns must not count
    z = tl.where(is_target | (v >= V)[None, :], -1e30, z)
    m = tl.maximum(tl.max(z, 1), -1e29)  # so that a row without a logit that counts has sum 0
    z -= m[:, None]
    e = tl.exp(z)
    q = m
    if ENTROPY:
        q = tl.sum(e * z, 1)
    return m, tl.sum(e, 1), q, z_y


@triton.jit
def combine_stats_kernel(
    tile_max,
    tile_sum,
    tile_moment,
    target_logit,
    logprob_ptr,
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    T,
    tiles,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Fold the tiles of BLOCK_T rows, BLOCK_TILES at a time, lane by lane; then the lanes; then the target."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, BLOCK_TILES)
    m = tl.full((BLOCK_TILES, BLOCK_T), -1e30, tl.float32)
    s = tl.zeros((BLOCK_TILES, BLOCK_T), tl.float32)
    q = tl.zeros((BLOCK_TILES, BLOCK_T), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + lanes
        live = (tile < tiles)[:, None] & (t < T)[None, :]
        at = tile.to(tl.int64)[:, None] * T + t[None, :]
        m_new = tl.load(tile_max + at, live, other=-1e30)
        s_new = tl.load(tile_sum + at, live, other=0.0)
        n = tl.maximum(m, m_new)
        shrink = tl.exp(m - n)
        shrink_new = tl.exp(m_new - n)
        if ENTROPY:
            q_new = tl.load(tile_moment + at, live, other=0.0)
            q = (q + s * (m - n)) * shrink + (q_new + s_new * (m_new - n)) * shrink_new
        s = s * shrink + s_new * shrink_new
        m = n
    z_y = tl.load(target_logit + t, t < T, other=0.0)
    highest = tl.maximum(tl.max(m, 0), z_y)
    shift = m - highest[None, :]
    shrink = tl.exp(shift)
    others = tl.sum(s * shrink, 0)
    e_y = tl.exp(z_y - highest)
    log_sum = tl.log(others + e_y)
    gap = tl.log(others) + highest - z_y
    tl.store(logprob_ptr + t, -(tl.maximum(gap, 0.0) + log1p(tl.exp(-tl.abs(gap)))), t < T)
    tl.store(row_max_ptr + t, highest, t < T)
    tl.store(log_sum_ptr + t, log_sum, t < T)
    if ENTROPY:
        moment = tl.sum((q + s * shift) * shrink, 0) + e_y * (z_y - highest)
        tl.store(entropy_ptr + t, log_sum - moment / (others + e_y), t < T)


COMBINE = {"BLOCK_T": 16, "BLOCK_TILES": 32}
"""Tile of `combine_stats_kernel`."""


@dataclass(frozen=True)
class HeadTile:
    """How `lm_head_stats_kernel` is tiled and launched."""

    block_t: int = 128
    block_v: int = 256
    block_h: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3


def head_tile() -> HeadTile:
    """The shipped configuration; small tiles in the interpreter, so that tests cross their borders."""
    return HeadTile(32, 64, 32, 2, 1, 1) if interpreted() else HeadTile()


def can_describe(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can be made: 16-byte aligned rows of half precision or float32, equal in dtype."""
    return all(
        t.dtype == tensors[0].dtype
        and t.stride(1) == 1
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        for t in tensors
    )


def lm_head_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    transform: Transform,
    stats: RowStatistics,
    bias: Tensor | None = None,
) -> None:
    """Fill `stats` (log-prob, normaliser, entropy if it has room) of `[T, H]` hidden states and a `[V, H]` head.

    Args:
        hidden, weight: of one dtype, fit for descriptors (`can_describe`).
        targets: int64 or int32 `[T]`.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = head_tile()
    tiles_v = triton.cdiv(vocabulary, tile.block_v)
    entropy = stats.entropy is not None
    tile_max, tile_sum, tile_moment = (hidden.new_empty(tiles_v, rows, dtype=torch.float32) for _ in range(3))
    target_logit = hidden.new_full((rows,), float("nan"), dtype=torch.float32)
    lm_head_stats_kernel[(triton.cdiv(rows, tile.block_t) * tiles_v,)](
        TensorDescriptor(hidden, [rows, width], [hidden.stride(0), 1], [tile.block_t, tile.block_h]),
        TensorDescriptor(weight, [vocabulary, width], [weight.stride(0), 1], [tile.block_v, tile.block_h]),
        bias,
        targets,
        tile_max,
        tile_sum,
        tile_moment,
        target_logit,
        rows,
        vocabulary,
        width,
        1.0 / transform.temperature,
        transform.softcap or 1.0,
        BIAS=bias is not None,
        SOFTCAP=transform.softcap is not None,
        ENTROPY=entropy,
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_H=tile.block_h,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    combine_stats_kernel[(triton.cdiv(rows, COMBINE["BLOCK_T"]),)](
        tile_max,
        tile_sum,
        tile_moment,
        target_logit,
        stats.logprob,
        stats.row_max,
        stats.log_sum,
        stats.entropy,
        rows,
        tiles_v,
        ENTROPY=entropy,
        **COMBINE,
        num_warps=4,
    )
