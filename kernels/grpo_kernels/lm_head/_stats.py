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
from torch import Tensor

from grpo_kernels._backend import TensorDescriptor, interpreted, tl, triton
from grpo_kernels.lm_head._rows import RowStatistics, Transform
from grpo_kernels.lm_head._rows_triton import log1p, transform_logits


@triton.jit
def lm_head_stats_kernel(
    # operands
    hidden,  # descriptor [T, H]
    weight,  # descriptor [V, H]
    bias_ptr,  # [V]
    targets,  # [T]
    # outputs, float32
    tile_max,  # [tiles of V, T], as the next two
    tile_sum,
    tile_moment,
    target_logit,  # [T], written by the one tile that holds the target
    # shapes
    T,
    V,
    H,
    # numbers
    inverse_temperature,
    softcap,
    # what to do
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    # tile
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
    # half by half: the accumulators take 128 registers of a thread's 255, so three whole tiles of intermediates spill
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
    # a row without a logit that counts holds −1e30 alone: above that maximum exp(z − m) is 0, not 1
    m = tl.maximum(tl.max(z, 1), -1e29)
    z -= m[:, None]
    e = tl.exp(z)
    q = m
    if ENTROPY:
        q = tl.sum(e * z, 1)
    return m, tl.sum(e, 1), q, z_y


@triton.jit
def combine_stats_kernel(
    # of `lm_head_stats_kernel`
    tile_max,  # [tiles, T], as the next two
    tile_sum,
    tile_moment,
    target_logit,  # [T]; NaN where no tile held the target
    # outputs, [T] float32 each
    logprob_ptr,
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    # shapes
    T,
    tiles,
    # what to do, and the tile
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
    total = others + e_y
    log_sum = tl.log(total)
    gap = tl.log(others) + (highest - z_y)
    logprob = -(tl.maximum(gap, 0.0) + log1p(tl.exp(-tl.abs(gap))))
    logprob = tl.where(z_y <= -1e30, -float("inf"), logprob)
    # no token is possible, as in `softmax_rows_kernel`: tiles keep −1e29, whose sums are 0. And NaN stays
    logprob = tl.where(total > 0.0, logprob, float("nan"))
    tl.store(logprob_ptr + t, logprob, t < T)
    tl.store(row_max_ptr + t, highest, t < T)
    tl.store(log_sum_ptr + t, log_sum, t < T)
    if ENTROPY:
        moment = tl.sum((q + s * shift) * shrink, 0) + e_y * (z_y - highest)
        tl.store(entropy_ptr + t, log_sum - moment / total, t < T)


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
    if interpreted():
        return HeadTile(block_t=32, block_v=64, block_h=32, group=2, warps=1, stages=1)
    return HeadTile()


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
        hidden, weight: of one dtype, fit for descriptors (`_gemm.fits_descriptors`).
        targets: int64 or int32 `[T]`.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    tile = head_tile()
    tiles_v = triton.cdiv(vocabulary, tile.block_v)
    entropy = stats.entropy is not None
    tile_max, tile_sum, tile_moment = (hidden.new_empty(tiles_v, rows, dtype=torch.float32) for _ in range(3))
    # a target out of range is in no tile: its row becomes NaN
    target_logit = hidden.new_full((rows,), float("nan"), dtype=torch.float32)
    lm_head_stats_kernel[(triton.cdiv(rows, tile.block_t) * tiles_v,)](
        hidden=TensorDescriptor(hidden, [rows, width], [hidden.stride(0), 1], [tile.block_t, tile.block_h]),
        weight=TensorDescriptor(weight, [vocabulary, width], [weight.stride(0), 1], [tile.block_v, tile.block_h]),
        bias_ptr=bias,
        targets=targets,
        tile_max=tile_max,
        tile_sum=tile_sum,
        tile_moment=tile_moment,
        target_logit=target_logit,
        T=rows,
        V=vocabulary,
        H=width,
        inverse_temperature=1.0 / transform.temperature,
        softcap=transform.softcap or 1.0,
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
        tile_max=tile_max,
        tile_sum=tile_sum,
        tile_moment=tile_moment,
        target_logit=target_logit,
        logprob_ptr=stats.logprob,
        row_max_ptr=stats.row_max,
        log_sum_ptr=stats.log_sum,
        entropy_ptr=stats.entropy,
        T=rows,
        tiles=tiles_v,
        ENTROPY=entropy,
        **COMBINE,
        num_warps=4,
    )
