"""Attention of segments of packed queries over segments of packed keys, with log-sum-exps; forward and backward apart.

The two directions are plain functions, so that several softmax parts over the same queries can be merged: given the
output and log-sum-exp of *all* parts, the backward of each part alone gives exactly its share of the gradients,

    P = exp(scale·QKᵀ − lse)    dV = PᵀdO    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))    dQ = scale·dS K    dK = scale·dSᵀQ,

which is also how ring attention (arXiv 2310.01889) adds up its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from grpo_kernels.attention.segments import Batch, Segments

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MATMUL_SCORES = 2**26
"""Scores that the matmul fallback holds at once: 256 MiB in float32, for each of the few tensors of that size."""


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the segments' query rows.

    Args:
        q: `[T, Hq, D]`; k, v: `[U, Hkv, D]`, Hq a multiple of Hkv.
        segments: S ≥ 1 segments; with `causal` a segment's query and key lengths must agree.
        causal: the i-th query of a segment sees its first i + 1 keys, else all of them.
        scale: of the scores.

    Returns:
        Output `[R, Hq, D]` and natural log-sum-exp `[Hq, R]` (float32, or float64 for float64 q) of the R query rows.
    """
    if not _flash_takes(q):
        return _forward_by_batch(q, k, v, segments, causal, scale)
    query_rows, key_rows, cu_q, cu_k = segments.on(q.device)
    q, k, v = q[query_rows], k[key_rows], v[key_rows]
    package = _flash_package()
    if package:
        out, lse, *_ = package._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, *segments.longest, dropout_p=0.0, softmax_scale=scale, causal=causal
        )
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, *segments.longest, 0.0, causal, False, scale=scale
        )
    return out, lse


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one softmax part, from the output and log-sum-exp of all parts.

    Args:
        grad, q, out: `[T, Hq, D]`; k, v: `[U, Hkv, D]`; lse: `[Hq, T]`.
        segments, causal, scale: as in `varlen_forward`.

    Returns:
        Gradients of the query rows `[R, Hq, D]`, and of the key rows `[K, Hkv, D]` as keys and as values.
    """
    if not _flash_takes(q):
        return _backward_by_batch(grad, q, k, v, out, lse, segments, causal, scale)
    query_rows, key_rows, cu_q, cu_k = segments.on(q.device)
    grad, q, out = (x[query_rows] for x in (grad, q, out))
    k, v, lse = k[key_rows], v[key_rows], lse[:, query_rows].contiguous()
    package = _flash_package()
    if package:
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        package._flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *gradients,
            cu_q,
            cu_k,
            *segments.longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is 0, but has no default
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, *segments.longest, 0.0, causal, unused, unused, scale=scale
    )


def _flash_takes(q: Tensor) -> bool:
    """Whether the CUDA flash operators take these queries."""
    return (
        q.is_cuda
        and q.dtype in _FLASH_DTYPES
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


@cache
def _flash_package() -> ModuleType | None:
    """The `flash_attn` package's functions (version 2.7 on), if it is installed and loads."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:
        return None
    return flash_attn_interface


# Elsewhere: a few calls, each for a batch of segments of one length.


def _forward_by_batch(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    forward = _cpu_forward if q.device.type == "cpu" else _matmul_forward
    batches, order = segments.batches(q.device, causal)
    outs, lses = [], []
    for batch in batches:
        queries, keys = _cutters(batch)
        out, lse = forward(queries(q), keys(k), keys(v), causal, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    return _join(outs, 0, order), _join(lses, 1, order)


def _backward_by_batch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _cpu_backward if q.device.type == "cpu" else _matmul_backward
    batches, order = segments.batches(q.device, causal)
    lse = lse.transpose(0, 1)[..., None]  # [T, Hq, 1]
    gradients = []
    for batch in batches:
        queries, keys = _cutters(batch)
        upstream = queries(grad)
        if batch.valid is not None:  # a repeated row has no gradient of its own
            upstream *= batch.valid.view(batch.count, 1, -1, 1)
        of_batch = backward(upstream, queries(q), keys(k), keys(v), queries(out), queries(lse)[..., 0], causal, scale)
        gradients.append([x.transpose(1, 2).flatten(0, 1) for x in of_batch])
    dq, dk, dv = (_join(list(pieces), 0, order) for pieces in zip(*gradients, strict=True))
    return dq, dk, dv


def _cutters(batch: Batch) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions that cut a batch's queries and keys, `[n, H, L, D]`, out of packed rows `[T, H, D]`."""

    def cut(rows: slice | Tensor, length: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x[rows].unflatten(0, (batch.count, length)).transpose(1, 2)

    return cut(batch.query_rows, batch.query_length), cut(batch.key_rows, batch.key_length)


def _join(pieces: list[Tensor], dim: int, order: Tensor | None) -> Tensor:
    """Batches' results as packed rows, padding left out."""
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return joined if order is None else joined.index_select(dim, order)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`[n, Hq, L, D]` and log-sum-exp `[n, Hq, L]` by torch's flash kernel, which takes GQA without copies."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_cpu_forward`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _matmul_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`[n, Hq, L, D]` and log-sum-exp `[n, Hq, L]` by plain products, for dtypes and head sizes without a kernel."""
    k, v = _expand_heads(k, q), _expand_heads(v, q)
    outs, lses = [], []
    for rows in _row_chunks(q, k):
        scores = _scores(q, k, rows, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp().to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _matmul_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_matmul_forward`, by the formulas at the top of this file."""
    wide_k, wide_v = _expand_heads(k, q), _expand_heads(v, q)
    dq = []
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for rows in _row_chunks(q, k):
        p = (_scores(q, wide_k, rows, causal, scale) - lse[:, :, rows, None]).exp()
        g = grad[:, :, rows]
        delta = (g * out[:, :, rows]).sum(-1, keepdim=True, dtype=p.dtype)
        ds = (p * (g @ wide_v.transpose(-1, -2) - delta) * scale).to(q.dtype)
        dq.append(ds @ wide_k)
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
        dv += p.to(q.dtype).transpose(-1, -2) @ g
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))  # over the query heads of a key/value head
    return torch.cat(dq, 2), dk, dv


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    """A copy of each key/value head for each of its query heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _row_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Query rows, as many at a time as keep scores within `_MATMUL_SCORES`."""
    step = max(1, _MATMUL_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[2], step))


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """Scaled scores of some query rows over all keys, in float32 or wider."""
    scores = (q[:, :, rows] @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        query = torch.arange(q.shape[2], device=q.device)[rows]
        key = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(key > query[:, None], -torch.inf)
    return scores
