"""Attention over a packed group layout: each prompt once, every completion over its own prompt and itself.

A completion's softmax runs over its prompt's keys and its own. It is taken in two parts, each by a standard attention
kernel, and merged by their log-sum-exps:

    self      every prompt, and every completion, causally over itself                 lse_self,   o_self
    prompt    all completions of a group, as one block of queries, over the prompt     lse_prompt, o_prompt
    lse = log(exp lse_self + exp lse_prompt)     o = exp(lse_self − lse)·o_self + exp(lse_prompt − lse)·o_prompt

The backward runs both parts' backward kernels with the merged `o` and `lse` and adds the results: given the output and
log-sum-exp of *all* parts, the backward of each part alone is exactly its share of the gradients,

    P = exp(scale·QKᵀ − lse)    dV = PᵀdO    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))    dQ = scale·dS K    dK = scale·dSᵀQ,

which is also how ring attention (arXiv 2310.01889) adds up its blocks.

With P prompt and L completion tokens and G members, queries see `P²/2 + G·L·(P + L/2)` keys, where G padded copies
would see `G·(P + L)²/2`; keys and values of a prompt are neither computed nor stored nor read from memory per member,
and receive one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.attention.spans import Batch, GroupSpans, Segments

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MATMUL_SCORES = 2**26
"""Scores that the matmul fallback holds at once: 256 MiB in float32, for each of the few tensors of that size."""


def group_attention(q: Tensor, k: Tensor, v: Tensor, spans: GroupSpans, *, scale: float | None = None) -> Tensor:
    """Causal attention over prompts, and over completions with their prompt as prefix; differentiable, once.

    Args:
        q: `[T, Hq, D]` packed queries, rotary positions already applied; any strides whose last is 1.
        k, v: `[T, Hkv, D]`; Hq is a multiple of Hkv.
        spans: where prompts and completions lie on T. Keep one object for all layers: it carries row indices.
        scale: of the scores; `D^-0.5` unless given.

    Returns:
        `[T, Hq, D]`, in q's dtype.

    Raises:
        ValueError: T differs from the spans' total, Hq is not a multiple of Hkv, or k and v do not fit q.
    """
    tokens, query_heads, width = q.shape
    if tokens != spans.total:
        raise ValueError(f"{tokens} packed rows, but the spans add up to {spans.total}")
    if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != width:
        raise ValueError(f"q is {list(q.shape)}, so k and v must be [{tokens}, heads, {width}], got {list(k.shape)}")
    if query_heads % k.shape[1]:
        raise ValueError(f"{query_heads} query heads are not a multiple of {k.shape[1]} key/value heads")
    return _GroupAttention.apply(q, k, v, spans, width**-0.5 if scale is None else scale)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: GroupSpans, scale: float) -> Tensor:
        out, lse = part_forward(q, k, v, spans.self_segments, scale)
        if spans.prompt_segments is not None:
            prompt_out, prompt_lse = part_forward(q, k, v, spans.prompt_segments, scale)
            rows = spans.prompt_segments.on(q.device)[0].rows  # of all completions: prompts keep what they have
            self_lse = lse[:, rows]
            # exp(lse_prompt) / (exp lse_self + exp lse_prompt), without forming an exponential that may overflow
            share = torch.sigmoid(prompt_lse - self_lse).transpose(0, 1)[..., None]
            # o_self + share·(o_prompt − o_self) in float32, rounded once
            out[rows] = torch.lerp(out[rows].to(share.dtype), prompt_out.to(share.dtype), share).to(out.dtype)
            lse[:, rows] = torch.logaddexp(self_lse, prompt_lse)
        ctx.save_for_backward(q, k, v, out, lse)  # of both parts: each part's backward needs the whole
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled()
        ):  # part_backward takes `out` and `lse` for constants, and its operators give no graph
            raise RuntimeError("group_attention has no second derivative: call backward without create_graph")
        (q, k, v, out, lse), spans = ctx.saved_tensors, ctx.spans
        dq, dk, dv = part_backward(grad, q, k, v, out, lse, spans.self_segments, ctx.scale)
        if spans.prompt_segments is not None:
            prompt_dq, prompt_dk, prompt_dv = part_backward(grad, q, k, v, out, lse, spans.prompt_segments, ctx.scale)
            queries, keys = spans.prompt_segments.on(grad.device)
            # rows of a span occur once each, so that indexed addition loses none
            dq[queries.rows] += prompt_dq
            dk[keys.rows] += prompt_dk
            dv[keys.rows] += prompt_dv
        return dq, dk, dv, None, None


def part_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Compute one softmax part: attention of the segments' query rows over their key rows.

    Args:
        q: `[T, Hq, D]`; k, v: `[U, Hkv, D]`, Hq a multiple of Hkv.
        scale: of the scores.

    Returns:
        Output `[R, Hq, D]` and natural log-sum-exp `[Hq, R]` (float32, or float64 for float64 q) of the R query rows.
    """
    if _flash_takes(q):
        queries, keys = segments.on(q.device)
        q, k, v = q[queries.rows], k[keys.rows], v[keys.rows]
        lengths = queries.ends, keys.ends, queries.longest, keys.longest
        package = _flash_package()
        if package:
            out, lse, *_ = package._flash_attn_varlen_forward(
                q, k, v, *lengths, dropout_p=0.0, softmax_scale=scale, causal=segments.causal
            )
        else:
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, *lengths, 0.0, segments.causal, False, scale=scale
            )
        return out, lse
    batches, order = segments.batches(q.device)
    outs, lses = [], []
    for batch in batches:
        qkv = _cut(q, batch.query_rows, batch), _cut(k, batch.key_rows, batch), _cut(v, batch.key_rows, batch)
        if q.device.type == "cpu":  # torch's flash kernel, which takes GQA without copies
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *qkv, 0.0, segments.causal, scale=scale
            )
        else:
            out, lse = _matmul_forward(*qkv, segments.causal, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    return _join(outs, 0, order), _join(lses, 1, order)


def part_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of one softmax part, from the output and log-sum-exp of all parts.

    Args:
        grad, q, out: `[T, Hq, D]`; k, v: `[U, Hkv, D]`; lse: `[Hq, T]`.
        segments, scale: as in `part_forward`.

    Returns:
        Gradients of the query rows `[R, Hq, D]`, and of the key rows `[K, Hkv, D]` as keys and as values.
    """
    if _flash_takes(q):
        queries, keys = segments.on(q.device)
        grad, q, out = grad[queries.rows], q[queries.rows], out[queries.rows]
        k, v = k[keys.rows], v[keys.rows]
        lse = lse[:, queries.rows].contiguous()  # the operators read lse as [Hq, R] packed
        lengths = queries.ends, keys.ends, queries.longest, keys.longest
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
                *lengths,
                dropout_p=0.0,
                softmax_scale=scale,
                causal=segments.causal,
                window_size_left=-1,
                window_size_right=-1,
                softcap=0.0,
                alibi_slopes=None,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
            return gradients
        # the random state of a dropout, which is 0 here; the operator has no default for it
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, segments.causal, unused, unused, scale=scale
        )
    batches, order = segments.batches(q.device)  # the forward's, not made anew
    lse = lse.transpose(0, 1)[..., None]  # [T, Hq, 1], to be cut as queries are
    gradients_by_batch = []
    for batch in batches:
        upstream, batch_q, batch_out, batch_lse = (_cut(x, batch.query_rows, batch) for x in (grad, q, out, lse))
        if batch.valid is not None:  # a repeated row has no gradient of its own; cut by indices, `upstream` is a copy
            upstream *= batch.valid.view(batch.count, 1, -1, 1)
        batch_k, batch_v = _cut(k, batch.key_rows, batch), _cut(v, batch.key_rows, batch)
        saved = batch_q, batch_k, batch_v, batch_out, batch_lse[..., 0]
        if q.device.type == "cpu":
            batch_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream, *saved, 0.0, segments.causal, scale=scale
            )
        else:
            batch_gradients = _matmul_backward(upstream, *saved, segments.causal, scale)
        gradients_by_batch.append([x.transpose(1, 2).flatten(0, 1) for x in batch_gradients])
    dq, dk, dv = (_join(list(pieces), 0, order) for pieces in zip(*gradients_by_batch, strict=True))
    return dq, dk, dv


def _flash_takes(q: Tensor) -> bool:
    """Whether the CUDA flash operators take these queries."""
    return (  # FlashAttention-2's limits: Ampere or later, D a multiple of 8 up to 256
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


def _cut(x: Tensor, rows: slice | Tensor, batch: Batch) -> Tensor:
    """A batch's `[count, heads, length, D]`, cut out of packed rows `[T, heads, D]`; a view if its rows are a slice."""
    return x[rows].unflatten(0, (batch.count, -1)).transpose(1, 2)


def _join(pieces: list[Tensor], dim: int, order: Tensor | None) -> Tensor:
    """Batches' results as packed rows, padding left out."""
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return joined if order is None else joined.index_select(dim, order)


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
