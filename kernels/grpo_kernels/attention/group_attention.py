"""Attention over a packed group layout: each prompt once, every completion over its own prompt and itself.

A completion's softmax runs over its prompt's keys and its own. It is taken in two parts, each by a standard attention
kernel, and merged by their log-sum-exps:

    self      every prompt, and every completion, causally over itself                 lse_self,   o_self
    prompt    all completions of a group, as one block of queries, over the prompt     lse_prompt, o_prompt
    lse = log(exp lse_self + exp lse_prompt)     o = exp(lse_self − lse)·o_self + exp(lse_prompt − lse)·o_prompt

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
        out, lse = varlen_forward(q, k, v, spans.self_segments, True, scale)
        if len(spans.prompt_segments):
            prompt_out, prompt_lse = varlen_forward(q, k, v, spans.prompt_segments, False, scale)
            rows = spans.prompt_segments.on(q.device).query_rows  # of all completions: prompts keep what they have
            self_lse = lse[:, rows]
            # exp(lse_prompt) / (exp lse_self + exp lse_prompt), without forming an exponential that may overflow
            share = torch.sigmoid(prompt_lse - self_lse).transpose(0, 1)[..., None]
            # o_self + share·(o_prompt − o_self) in float32, rounded once
            out[rows] = torch.lerp(out[rows].to(share.dtype), prompt_out.to(share.dtype), share).to(out.dtype)
            lse[:, rows] = torch.logaddexp(self_lse, prompt_lse)
        ctx.save_for_backward(q, k, v, out, lse)  # of all parts: `varlen` says why that gives each part its gradient
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), spans = ctx.saved_tensors, ctx.spans
        dq, dk, dv = varlen_backward(grad, q, k, v, out, lse, spans.self_segments, True, ctx.scale)
        if len(spans.prompt_segments):
            prompt_dq, prompt_dk, prompt_dv = varlen_backward(
                grad, q, k, v, out, lse, spans.prompt_segments, False, ctx.scale
            )
            query_rows, key_rows, *_ = spans.prompt_segments.on(grad.device)
            # rows of a span occur once each, so that indexed addition loses none
            dq[query_rows] += prompt_dq
            dk[key_rows] += prompt_dk
            dv[key_rows] += prompt_dv
        return dq, dk, dv, None, None
