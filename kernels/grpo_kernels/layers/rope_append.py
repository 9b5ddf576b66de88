"""What follows a decoder layer's QKV GEMM: head norms, rotary positions, and the new keys and values into the cache.

Each head of D numbers, x = [a | b] in halves, is rotated by its token's position in transformers' convention:

    [a · cos − b · sin | b · cos + a · sin]        cos, sin from tables `[positions, D / 2]`

Queries and keys are first normalised head by head where the model does so (Qwen3). All of it happens in place, in the
GEMM's output, so attention reads its queries there; keys and values also go to their token's place in the cache. Values
are rounded where transformers' modules round. Bytes of one token: `(Hq + 2K)·D` numbers read and written, `2K·D` more
into the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, refuse_gradient, tl, triton


def rope_config(all_heads: int, half: int) -> dict[str, int]:
    """Heads of a token in one program, and its warps, for queries, keys and values of D = 2 · half numbers each."""
    # eight heads of D = 128 are 512 numbers a half: 4 of each half a thread of 4 warps
    heads = min(triton.next_power_of_2(all_heads), 8)
    return dict(BLOCK_HEADS=heads, BLOCK=triton.next_power_of_2(half), num_warps=4)


@triton.jit
def rope_append_kernel(
    # data
    qkv,  # [T, Hq + 2K, D], a token's heads contiguous; changed
    cos,  # [positions, HALF], contiguous
    sin,
    positions,  # [T]
    keys,  # [N, K, S, D], the cache
    values,
    cache_rows,  # [T]; any pointer without SCATTER
    lengths,  # [T]
    q_weight,  # [D]; any pointer without NORM
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
    # what to do, and the block
    HEADS: tl.constexpr,  # Hq
    HALF: tl.constexpr,  # D / 2
    NORM: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of one token: queries first, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (d < HALF) & (head < HEADS + 2 * kv_heads)
    rotated = inside & (head < HEADS + kv_heads)  # queries and keys
    at = qkv + token * qkv_row + head * (2 * HALF) + d
    a0 = tl.load(at, inside, other=0.0)
    b0 = tl.load(at + HALF, inside, other=0.0)
    a = a0.to(tl.float32)
    b = b0.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        query_heads = inside & (head < HEADS)
        key_heads = rotated & (head >= HEADS)
        # a head's weight is the query's or the key's: of two masked loads, one gives 0. `0 * head` broadcasts pointers
        left = tl.load(q_weight + d + 0 * head, query_heads, other=0.0)
        left += tl.load(k_weight + d + 0 * head, key_heads, other=0.0)
        right = tl.load(q_weight + HALF + d + 0 * head, query_heads, other=0.0)
        right += tl.load(k_weight + HALF + d + 0 * head, key_heads, other=0.0)
        # rounded after the norm and after the weight, as transformers' Qwen3RMSNorm rounds
        a = ((a * scale).to(dtype).to(tl.float32) * left.to(tl.float32)).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * right.to(tl.float32)).to(dtype).to(tl.float32)
    angle = tl.load(positions + token).to(tl.int64) * HALF + d
    c = tl.load(cos + angle, d < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, d < HALF, other=0.0).to(tl.float32)
    # each product is rounded before the sum, as torch rounds `q * cos + rotate_half(q) * sin`
    left = ((a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)).to(dtype)
    right = ((b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)).to(dtype)
    tl.store(at, left, rotated)
    tl.store(at + HALF, right, rotated)
    row = token
    if SCATTER:
        row = tl.load(cache_rows + token).to(tl.int64)
    column = tl.load(lengths + token).to(tl.int64) - 1
    key = keys + row * k_row + (head - HEADS) * k_head + column * k_token + d
    tl.store(key, left, rotated & (head >= HEADS))
    tl.store(key + HALF, right, rotated & (head >= HEADS))
    value = values + row * v_row + (head - HEADS - kv_heads) * v_head + column * v_token + d
    tl.store(value, a0, inside & (head >= HEADS + kv_heads))
    tl.store(value + HALF, b0, inside & (head >= HEADS + kv_heads))


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
    """Rotate queries and keys in place, and write keys and values to the cache. Without gradient.

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
        ValueError: shapes or layouts do not fit each other, or a gradient is wanted of the kernel, which has none.
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
    refuse_gradient("rope_append", qkv, q_norm, k_norm)
    config = rope_config(all_heads, width // 2)
    rope_append_kernel[tokens, triton.cdiv(all_heads, config["BLOCK_HEADS"])](
        qkv=qkv,
        cos=cos,
        sin=sin,
        positions=positions,
        keys=keys,
        values=values,
        cache_rows=lengths if cache_rows is None else cache_rows,  # a pointer of the right type, not read
        lengths=lengths,
        q_weight=qkv if q_norm is None else q_norm,
        k_weight=qkv if k_norm is None else k_norm,
        kv_heads=kv_heads,
        qkv_row=qkv.stride(0),
        k_row=keys.stride(0),
        k_head=keys.stride(1),
        k_token=keys.stride(2),
        v_row=values.stride(0),
        v_head=values.stride(1),
        v_token=values.stride(2),
        eps=eps,
        HEADS=heads,
        HALF=width // 2,
        NORM=q_norm is not None,
        SCATTER=cache_rows is not None,
        **config,
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
    rotated = qkv[:, : heads + kv_heads]  # queries and keys, a view
    if q_norm is not None and k_norm is not None:
        wide = rotated.to(torch.promote_types(qkv.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        weights = torch.cat([q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)])
        rotated.copy_(wide.to(qkv.dtype) * weights.to(qkv.dtype))
    a, b = rotated.chunk(2, dim=-1)
    c, s = cos[positions.long(), None], sin[positions.long(), None]
    rotated.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))
    row = torch.arange(len(qkv), device=qkv.device) if cache_rows is None else cache_rows.long()
    keys[row, :, lengths.long() - 1] = qkv[:, heads : heads + kv_heads]
    values[row, :, lengths.long() - 1] = qkv[:, heads + kv_heads :]
    return qkv[:, :heads]
