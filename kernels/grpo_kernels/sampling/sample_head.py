"""LM head and sampling of one decode step in one GEMM: a token, its log-probs and the entropy, without logits.

Each program multiplies a tile of the vocabulary (on the tensor cores' long axis) with a tile of the batch and reduces
it, still in its accumulators, to a few float32 numbers a row: the maximum, Σ exp z and Σ z exp z at temperature T,
Σ exp x at temperature 1, and the winner of the tile's Gumbel race (`sample_row` says what is drawn). A second, small
kernel folds the tiles: the winner of the winners is the token. The race needs no normaliser, so no logits are kept.

Bytes: the weight once, `V·H·e`, which is all there is to a step of few rows (1.09 GB for V = 152,064, H = 3,584 in
bfloat16), and 36 bytes a row for every 128 tokens of the vocabulary. FLOPs: `2·B·H·V`.

Top-k, top-p, min-p and the repetition penalty need the logits of a whole row: for those it is a GEMM that keeps its
float32 accumulators, then `sample_row`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, TensorDescriptor, choose_backend, interpreted, tl, triton
from grpo_kernels.lm_head._gemm import Head, fits_descriptors
from grpo_kernels.sampling.gumbel import gumbel_noise
from grpo_kernels.sampling.sample_row import (
    SampledTokens,
    SampleOptions,
    check_sampling,
    empty_result,
    sample_row,
    sample_row_reference,
)


@triton.jit
def sample_head_kernel(
    # operands
    hidden,  # descriptor [B, H]
    weight,  # descriptor [V, H]
    bias,  # [V]
    forbidden,  # [V] bytes
    forced,  # [B]
    keys,  # [B]
    positions,  # [B]
    # outputs
    stats,  # [8, B, tiles] float32
    winners,  # [B, tiles] int32
    # shapes
    B,
    V,
    H,
    # numbers
    inverse_temperature,
    # what to do
    GREEDY: tl.constexpr,
    BIAS: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    FORCED: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile; the batch's tiles of one vocabulary tile are neighbours, so that its weights are read once."""
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_v = tl.cdiv(V, BLOCK_V)
    tile_v = tl.program_id(0) // tiles_b
    tile_b = tl.program_id(0) % tiles_b
    x = tl.zeros((BLOCK_V, BLOCK_B), tl.float32)
    for h in range(0, H, BLOCK_H):
        x = tl.dot(weight.load([tile_v * BLOCK_V, h]), hidden.load([tile_b * BLOCK_B, h]).T, x)

    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = b < B
    live = v < V
    if BIAS:
        x += tl.load(bias + v, live, other=0.0).to(tl.float32)[:, None]
    x = tl.where(live[:, None] & ~(x <= -1e29), x, -1e30)  # NaN stays
    # of the whole softmax: m, Σ exp x (at temperature 1), Σ exp z and Σ z exp z
    m = tl.max(x, 0)
    shifted = x - m[None, :]
    s1 = tl.sum(tl.where(live[:, None], tl.exp(shifted), 0.0), 0)
    z = shifted * inverse_temperature
    e = tl.where(live[:, None], tl.exp(z), 0.0)
    s = tl.sum(e, 0)
    q = tl.sum(e * z, 0)
    # of the admissible tokens, which the draw is from: their maximum and Σ exp z
    peak = m
    admitted = s
    admissible = live
    if FORBIDDEN:
        admissible = live & (tl.load(forbidden + v, live, other=1) == 0)
        y = tl.where(admissible[:, None], x, -1e30)
        peak = tl.max(y, 0)  # not m: a forbidden token far ahead would leave exp(y − m) = 0 to all others
        e = tl.exp((y - peak[None, :]) * inverse_temperature)
        admitted = tl.sum(tl.where(admissible[:, None], e, 0.0), 0)
    race = x * inverse_temperature
    if not GREEDY:
        key = tl.load(keys + b, rows, other=0)
        position = tl.load(positions + b, rows, other=0).to(tl.int32)
        race += gumbel_noise(key[None, :], position[None, :], v[:, None])
    race = tl.where(admissible[:, None], race, -float("inf"))
    if FORCED:
        # the forced token wins by 1e30; by 2e30 if it may not be drawn, which its log-prob then tells
        forced_token = tl.load(forced + b, rows, other=-1).to(tl.int32)[None, :]
        wins = tl.where(admissible, 1e30, 2e30)[:, None]
        race = tl.where(forced_token < 0, race, tl.where(v[:, None] == forced_token, wins, -float("inf")))
    best, at = tl.max(race, 0, return_indices=True)
    picked = tl.sum(tl.where(tl.arange(0, BLOCK_V)[:, None] == at[None, :], x, 0.0), 0)

    out = b.to(tl.int64) * tiles_v + tile_v
    plane = B * tiles_v
    tl.store(winners + out, tile_v * BLOCK_V + at, rows)
    tl.store(stats + out, m, rows)
    tl.store(stats + plane + out, s, rows)
    tl.store(stats + 2 * plane + out, q, rows)
    tl.store(stats + 3 * plane + out, s1, rows)
    tl.store(stats + 4 * plane + out, peak, rows)
    tl.store(stats + 5 * plane + out, admitted, rows)
    tl.store(stats + 6 * plane + out, best, rows)
    tl.store(stats + 7 * plane + out, picked, rows)


@triton.jit
def combine_samples_kernel(
    # of `sample_head_kernel`
    stats,  # [8, B, tiles]
    winners,  # [B, tiles]
    # outputs, [B] each
    token_ptr,
    logprob_ptr,
    tempered_ptr,
    raw_ptr,
    entropy_ptr,
    # shapes
    B,
    tiles,
    # numbers
    inverse_temperature,
    # what to do, and the block
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold the tiles of one row, of which BLOCK holds all."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    live = tile < tiles
    plane = B * tiles
    at = row * tiles + tile
    m = tl.load(stats + at, live, other=-1e30)
    s = tl.load(stats + plane + at, live, other=0.0)
    q = tl.load(stats + 2 * plane + at, live, other=0.0)
    s1 = tl.load(stats + 3 * plane + at, live, other=0.0)
    peak = tl.load(stats + 4 * plane + at, live, other=-1e30)
    admitted = tl.load(stats + 5 * plane + at, live, other=0.0)
    best = tl.load(stats + 6 * plane + at, live, other=-float("inf"))
    picked = tl.load(stats + 7 * plane + at, live, other=0.0)

    highest = tl.max(m, 0)
    shift = (m - highest) * inverse_temperature
    shrink = tl.exp(shift)
    total = tl.sum(s * shrink, 0)
    moment = tl.sum((q + s * shift) * shrink, 0)
    total1 = tl.sum(s1 * tl.exp(m - highest), 0)
    top = tl.max(peak, 0)
    total_admitted = tl.sum(admitted * tl.exp((peak - top) * inverse_temperature), 0)
    most = tl.max(best, 0)
    lead = tl.min(tl.where(best == most, tile, BLOCK), 0)  # of equal ones the first
    x = tl.sum(tl.where(tile == lead, picked, 0.0), 0)
    token = tl.load(winners + row * tiles + lead, lead < tiles, other=0).to(tl.int64)
    # what `SampledTokens` says of rows that are no distribution, or of which no token may be drawn
    broken = (total != total) | (highest <= -1e29)
    unknown = broken | (x <= -1e29) | (most == -float("inf"))
    x = tl.where(x <= -1e29, -float("inf"), x)
    logprob = (x - top) * inverse_temperature - tl.log(total_admitted)
    if FORCED:  # 1e30, or 2e30: it was no admissible token
        logprob = tl.where(most > 1.5e30, -float("inf"), logprob)
        unknown = broken | (unknown & (most < 5e29))
        token = tl.where(unknown & (most < 5e29), 0, token)
    else:
        token = tl.where(unknown, 0, token)
    tl.store(token_ptr + row, token)
    nan = float("nan")
    tl.store(logprob_ptr + row, tl.where(unknown, nan, logprob))
    tl.store(tempered_ptr + row, tl.where(unknown, nan, (x - highest) * inverse_temperature - tl.log(total)))
    tl.store(raw_ptr + row, tl.where(unknown, nan, x - highest - tl.log(total1)))
    tl.store(entropy_ptr + row, tl.where(broken, nan, tl.log(total) - moment / total))


def head_config(batch: int) -> dict[str, int]:
    """Block sizes of `sample_head_kernel` for B rows; small ones in the interpreter, so that tests cross their borders.

    A block of more than 64 rows spills in the race.
    """
    if interpreted():
        return dict(BLOCK_V=64, BLOCK_B=16, BLOCK_H=32, num_warps=1, num_stages=1)
    block_b = min(max(triton.next_power_of_2(batch), 16), 64)
    return dict(BLOCK_V=128, BLOCK_B=block_b, BLOCK_H=64, num_warps=8 if block_b == 64 else 4, num_stages=4)


def sample_head(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    positions: Tensor,
    options: SampleOptions | None = None,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
    forced: Tensor | None = None,
    backend: Backend | None = None,
) -> SampledTokens:
    """Draw the next token of each row from its last hidden state. Without gradient.

    Args:
        hidden: `[B, H]`, after the final norm.
        weight: `[V, H]` of the LM head; bias: `[V]`.
        keys, positions, options, seen, forbidden, forced, backend: as in `sample_row`.

    Returns:
        `SampledTokens`. For the same logits the same tokens as `sample_row`'s.

    Raises:
        ValueError: shapes do not fit each other, or a penalty without `seen`.
    """
    options = options or SampleOptions()
    seen = seen if options.repetition_penalty != 1 else None
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [B, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    batch, vocabulary = hidden.shape[0], weight.shape[0]
    check_sampling(batch, vocabulary, keys, positions, options, seen, forbidden, forced)
    backend = choose_backend(hidden.device, backend, hidden.dtype)
    fused = hidden.dtype in (torch.float16, torch.bfloat16) and fits_descriptors(hidden, weight)
    if backend == "torch" or not (fused and options.whole):
        logits = _logits(hidden, weight, bias)
        return sample_row(
            logits, keys, positions, options, seen=seen, forbidden=forbidden, forced=forced, backend=backend
        )
    config = head_config(batch)
    tiles_v = triton.cdiv(vocabulary, config["BLOCK_V"])
    stats = torch.empty(8, batch, tiles_v, dtype=torch.float32, device=hidden.device)
    winners = torch.empty(batch, tiles_v, dtype=torch.int32, device=hidden.device)
    result = empty_result(batch, hidden.device)
    sample_head_kernel[(triton.cdiv(batch, config["BLOCK_B"]) * tiles_v,)](
        hidden=TensorDescriptor(
            hidden, list(hidden.shape), list(hidden.stride()), [config["BLOCK_B"], config["BLOCK_H"]]
        ),
        weight=TensorDescriptor(
            weight, list(weight.shape), list(weight.stride()), [config["BLOCK_V"], config["BLOCK_H"]]
        ),
        bias=bias,
        forbidden=None if forbidden is None else forbidden.view(torch.uint8),
        forced=forced,
        keys=keys,
        positions=positions,
        stats=stats,
        winners=winners,
        B=batch,
        V=vocabulary,
        H=hidden.shape[1],
        inverse_temperature=options.inverse_temperature,
        GREEDY=options.temperature == 0,
        BIAS=bias is not None,
        FORBIDDEN=forbidden is not None,
        FORCED=forced is not None,
        **config,
    )
    combine_samples_kernel[(batch,)](
        stats=stats,
        winners=winners,
        token_ptr=result.token,
        logprob_ptr=result.logprob,
        tempered_ptr=result.tempered_logprob,
        raw_ptr=result.raw_logprob,
        entropy_ptr=result.entropy,
        B=batch,
        tiles=tiles_v,
        inverse_temperature=options.inverse_temperature,
        FORCED=forced is not None,
        BLOCK=triton.next_power_of_2(tiles_v),
        num_warps=4,
    )
    return result


def sample_head_reference(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    positions: Tensor,
    options: SampleOptions | None = None,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
    forced: Tensor | None = None,
) -> SampledTokens:
    """`sample_head` in plain torch."""
    logits = _logits(hidden, weight, bias)
    return sample_row_reference(logits, keys, positions, options, seen=seen, forbidden=forbidden, forced=forced)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[B, V]` in accumulator precision."""
    head = Head(hidden, weight)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=head.accumulator, device=hidden.device)
    logits = head.logits(hidden, logits)
    return logits if bias is None else logits.add_(bias)
