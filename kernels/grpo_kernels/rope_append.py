"""What follows a decoder layer's QKV GEMM: head norms, rotary positions, and the new keys and values into the cache.

Each head of D numbers, x = [a | b] in halves, is turned by its token's position in transformers' convention:

    [a · cos − b · sin | b · cos + a · sin]        cos, sin from tables `[positions, D / 2]`

Queries and keys are first normalised head by head where the model does so (Qwen3). All of it happens in place, in the
GEMM's output, so attention reads its queries there; keys and values also go to their token's place in the cache. Values
are rounded where transformers' modules round. Bytes of one token: `(Hq + 2K)·D` numbers read and written, `2K·D` more
into the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.backend import Backend, choose_backend


@triton.jit
def _turned(x, y, cos, sin, sign, dtype: tl.constexpr):
    """x · cos + sign · y · sin, both products rounded."""
    return ((x * cos).to(dtype).to(tl.float32) + sign * (y * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def rope_append_kernel(
    qkv,
    cos,
    sin,
    positions,
    keys,
    values,
    cache_rows,
    lengths,
    q_weight,
    k_weight,
    # shapes and strides
    kv_heads,
    qkv_row,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    # numbers
    eps,
    # meta-parameters
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype: tl.constexpr = qkv.dtype.element_ty
    d = tl.arange(0, BLOCK)
    inside = d < HALF
    at = qkv + token * qkv_row + head * 2 * HALF + d
    a = tl.load(at, inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, inside, other=0.0).to(tl.float32)
    if head < HEADS + kv_heads:
        if NORM:
            scale = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
            weight = k_weight
            if head < HEADS:
                weight = q_weight
            a = (a * scale).to(dtype).to(tl.float32) * tl.load(weight + d, inside, other=0.0).to(tl.float32)
            b = (b * scale).to(dtype).to(tl.float32) * tl.load(weight + HALF + d, inside, other=0.0).to(tl.float32)
            a = a.to(dtype).to(tl.float32)
            b = b.to(dtype).to(tl.float32)
        turn = tl.load(positions + token).to(tl.int64) * HALF + d
        c = tl.load(cos + turn, inside, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, inside, other=0.0).to(tl.float32)
        left = _turned(a, b, c, s, -1.0, dtype)
        right = _turned(b, a, c, s, 1.0, dtype)
        tl.store(at, left, inside)
        tl.store(at + HALF, right, inside)
    else:
        left = a.to(dtype)
        right = b.to(dtype)
    if head >= HEADS:
        row = token
        if SCATTER:
            row = tl.load(cache_rows + token).to(tl.int64)
        column = tl.load(lengths + token).to(tl.int64) - 1
        if head < HEADS + kv_heads:
            to = keys + row * k_row + (head - HEADS) * k_head + column * k_token + d
        else:
            to = values + row * v_row + (head - HEADS - kv_heads) * v_head + column * v_token + d
        tl.store(to, left, inside)
        tl.store(to + HALF, right, inside)


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    cache_rows: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    """Turn queries and keys in place, and write keys and values to the cache. Without gradient.

    Args:
        qkv: `[T, Hq + 2K, D]`, each token's query, key and value heads, contiguous but for the first stride. Changed.
        cos, sin: `[positions, D / 2]`, contiguous, in qkv's dtype.
        positions: integer `[T]`.
        keys, values: `[N, K, S, D]`, the layer's cache; any views whose last stride is 1.
        lengths: integer `[T]`, tokens of the cache's row once this one is there: it goes to column `length − 1`.
        cache_rows: integer `[T]`, which of the N rows; unset, token t goes to row t.
        q_norm, k_norm: `[D]`, weights of the head norms, both or none.
        eps: of the head norms.
        backend: `triton`, `torch`, or None: Triton on CUDA.

    Indices are not checked, since that would synchronise. No two tokens may go to the same place.

    Returns:
        The queries, `[T, Hq, D]`, a view of qkv.

    Raises:
        ValueError: shapes or layouts do not fit each other.
    """
    tokens, all_heads, width = qkv.shape
    kv_heads = keys.shape[1]
    heads = all_heads - 2 * kv_heads
    if keys.shape != values.shape or keys.shape[3] != width or width % 2 or heads < 1:
        raise ValueError(
            f"qkv is {list(qkv.shape)}: need an even D, and keys and values [N, K, S, D] with 2K below the number of "
            f"heads, got {list(keys.shape)} and {list(values.shape)}"
        )
    if positions.shape != (tokens,) or lengths.shape != (tokens,) or (cache_rows is None and len(keys) < tokens):
        raise ValueError(
            f"need positions and lengths [{tokens}], and that many cache rows, got {list(positions.shape)}, "
            f"{list(lengths.shape)} and {len(keys)}"
        )
    if cos.shape != sin.shape or cos.shape[1:] != (width // 2,) or (q_norm is None) != (k_norm is None):
        raise ValueError(f"need cos and sin [positions, {width // 2}], and both head norms or none")
    if qkv.stride()[1:] != (width, 1) or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("a token's heads must be contiguous, and the cache have a last stride of 1")
    if choose_backend(qkv.device, backend, qkv.dtype) == "torch":
        return rope_append_reference(
            qkv, cos, sin, positions, keys, values, lengths,
            cache_rows=cache_rows, q_norm=q_norm, k_norm=k_norm, eps=eps,
        )  # fmt: skip
    rope_append_kernel[tokens, all_heads](
        *(qkv, cos, sin, positions, keys, values),
        *(lengths if cache_rows is None else cache_rows, lengths),
        *((qkv, qkv) if q_norm is None else (q_norm, k_norm)),
        *(kv_heads, qkv.stride(0), *keys.stride()[:3], *values.stride()[:3]),
        eps,
        HEADS=heads,
        HALF=width // 2,
        NORM=q_norm is not None,
        SCATTER=cache_rows is not None,
        BLOCK=triton.next_power_of_2(width // 2),
        num_warps=1,
    )
    return qkv[:, :heads]


def rope_append_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    cache_rows: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rope_append` in plain torch."""
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    turned = qkv[:, : heads + kv_heads]
    if q_norm is not None:
        wide = turned.to(torch.promote_types(qkv.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        weights = torch.cat([q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)])
        turned.copy_(wide.to(qkv.dtype) * weights.to(qkv.dtype))
    a, b = turned.chunk(2, dim=-1)
    c, s = cos[positions.long(), None], sin[positions.long(), None]
    turned.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))
    row = torch.arange(len(qkv), device=qkv.device) if cache_rows is None else cache_rows.long()
    keys[row, :, lengths.long() - 1] = qkv[:, heads : heads + kv_heads]
    values[row, :, lengths.long() - 1] = qkv[:, heads + kv_heads :]
    return qkv[:, :heads]
