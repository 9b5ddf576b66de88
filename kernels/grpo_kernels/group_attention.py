"""Attention over a packed group layout: each prompt once, every completion over its own prompt and itself.

With P prompt and L completion tokens and G members, queries see `P²/2 + G·L·(P + L/2)` keys, where G padded copies
would see `G·(P + L)²/2`, and keys and values of a prompt are computed, and receive their gradient, once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.spans import GroupSpans


def group_attention(q: Tensor, k: Tensor, v: Tensor, spans: GroupSpans, *, scale: float | None = None) -> Tensor:
    """Causal attention over prompts, and over completions with their prompt as prefix; differentiable.

    Args:
        q: `[T, Hq, D]` packed queries, rotary positions already applied.
        k, v: `[T, Hkv, D]`; Hq is a multiple of Hkv.
        spans: where prompts and completions lie on T.
        scale: of the scores; `D^-0.5` unless given.

    Returns:
        `[T, Hq, D]`, in q's dtype.

    Raises:
        ValueError: T differs from the spans' total, or Hq is no multiple of Hkv.
    """
    tokens, query_heads, _ = q.shape
    if tokens != spans.total:
        raise ValueError(f"{tokens} packed rows, but the spans add up to {spans.total}")
    if query_heads % k.shape[1]:
        raise ValueError(f"{query_heads} query heads are no multiple of {k.shape[1]} key/value heads")
    if query_heads != k.shape[1]:
        k = k.repeat_interleave(query_heads // k.shape[1], dim=1)
        v = v.repeat_interleave(query_heads // v.shape[1], dim=1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, T, D]

    outputs = []
    for start, prompt, lengths in zip(spans.prompt_starts, spans.prompt_lengths, spans.completion_lengths, strict=True):
        rows = slice(start, start + prompt)
        prompt_k, prompt_v = k[:, rows], v[:, rows]
        prompt_out = F.scaled_dot_product_attention(
            q[None, :, rows], prompt_k[None], prompt_v[None], is_causal=True, scale=scale
        )
        outputs.append(prompt_out[0])
        if sum(lengths):
            rows = slice(start + prompt, start + prompt + sum(lengths))
            outputs.append(_completions(q[:, rows], k[:, rows], v[:, rows], prompt_k, prompt_v, lengths, scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _completions(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, lengths: tuple[int, ...], scale: float | None
) -> Tensor:
    """One group's completions `[H, ΣL, D]`, padded to the longest, over the prompt `[H, P, D]` and themselves."""
    lengths = tuple(n for n in lengths if n)
    members, longest, prompt = len(lengths), max(lengths), prompt_k.shape[1]
    column = torch.arange(longest, device=q.device)
    taken = column < torch.tensor(lengths, device=q.device)[:, None]  # [G, L]
    uniform = min(lengths) == longest

    def pad(x: Tensor) -> Tensor:  # [H, ΣL, D] -> [G, H, L, D]
        if uniform:
            return x.unflatten(1, (members, longest)).transpose(0, 1)
        padded = x.new_zeros(members, longest, x.shape[0], x.shape[2])
        return padded.masked_scatter(taken[..., None, None], x.transpose(0, 1)).transpose(1, 2)

    # a padded key comes after every real query of its row, so the causal mask hides it too
    mask = torch.ones(longest, prompt + longest, dtype=torch.bool, device=q.device).tril(prompt)
    keys = torch.cat([prompt_k.expand(members, -1, -1, -1), pad(k)], dim=2)
    values = torch.cat([prompt_v.expand(members, -1, -1, -1), pad(v)], dim=2)
    out = F.scaled_dot_product_attention(pad(q), keys, values, attn_mask=mask, scale=scale)
    return out.permute(1, 0, 2, 3)[:, taken]
