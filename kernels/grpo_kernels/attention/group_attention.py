"""Attention over a packed group layout: each prompt once, every completion over its own prompt and itself.

A completion's softmax runs over its prompt's keys and its own. It is taken in two parts, each by a standard attention
kernel, and merged by their log-sum-exps:

    own     every prompt, and every completion, causally over itself                 lse_own,  o_own
    over    all completions of a group, as one block of queries, over the prompt     lse_over, o_over
    lse = log(exp lse_own + exp lse_over)        o = exp(lse_own − lse)·o_own + exp(lse_over − lse)·o_over

The backward runs both parts' backward kernels with the merged `o` and `lse` and adds the results.

With P prompt and L completion tokens and G members, queries see `P²/2 + G·L·(P + L/2)` keys, where G padded copies
would see `G·(P + L)²/2`; keys and values of a prompt are neither computed nor stored nor read from memory per member,
and receive one gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.attention.spans import GroupSpans
from grpo_kernels.attention.varlen import varlen_backward, varlen_forward


def group_attention(q: Tensor, k: Tensor, v: Tensor, spans: GroupSpans, *, scale: float | None = None) -> Tensor:
    """Causal attention over prompts, and over completions with their prompt as prefix; differentiable.

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
        out, lse = varlen_forward(q, k, v, spans.own, True, scale)
        if len(spans.over_prompt):
            over, over_lse = varlen_forward(q, k, v, spans.over_prompt, False, scale)
            rows = spans.over_prompt.on(q.device).query_rows  # of all completions: prompts keep what they have
            own_lse = lse[:, rows]
            # exp(lse_over) / (exp lse_own + exp lse_over), without forming an exponential that may overflow
            share = torch.sigmoid(over_lse - own_lse).transpose(0, 1)[..., None]
            # o_own + share·(o_over − o_own) in float32, rounded once
            out[rows] = torch.lerp(out[rows].to(share.dtype), over.to(share.dtype), share).to(out.dtype)
            lse[:, rows] = torch.logaddexp(own_lse, over_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), spans = ctx.saved_tensors, ctx.spans
        dq, dk, dv = varlen_backward(grad, q, k, v, out, lse, spans.own, True, ctx.scale)
        if len(spans.over_prompt):
            over_dq, over_dk, over_dv = varlen_backward(grad, q, k, v, out, lse, spans.over_prompt, False, ctx.scale)
            query_rows, key_rows, *_ = spans.over_prompt.on(grad.device)
            dq[query_rows] += over_dq
            dk[key_rows] += over_dk
            dv[key_rows] += over_dv
        return dq, dk, dv, None, None
