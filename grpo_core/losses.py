"""The mathematics of the loss, as pure functions on log-probabilities: the one place where it is written.

R predicted tokens of M completions are given flat. A loss is `Σ_t weight_t · loss_t`: what distinguishes averaging by
sequence, by token or by a constant length is the weight alone, which is known before the first backward pass and counts
the whole optimiser step, so that micro-batches and ranks only add up.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """`clipped_surrogate`'s result, all `[R]`."""

    loss: Tensor
    """Token losses, differentiable."""
    ratio: Tensor
    """π / π_old, detached."""
    clipped_low: Tensor
    """bool: the lower clip took the gradient away (ratio < 1 − ε, advantage < 0)."""
    clipped_high: Tensor
    """bool: the upper clip took the gradient away (ratio > 1 + ε, advantage > 0)."""


def clipped_surrogate(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
) -> Surrogate:
    """PPO's clipped surrogate: `−min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A)` with `r = exp(logp − logp_old)`.

    Args:
        logprob: `[R]` log-probability of each token under the policy.
        old_logprob: `[R]` the same under the policy that sampled it; no gradient flows into it.
        advantages: `[R]`.
        clip_low, clip_high: ε below and above (clip-higher: DAPO, arXiv 2503.14476, eq. 10).
        delta: cap on r in the unclipped branch (two-sided clipping, INTELLECT-2, arXiv 2505.07291), for A < 0.
    """
    ratio = torch.exp(logprob - old_logprob.detach())
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(unclipped * advantages, clipped * advantages)
    ratio = ratio.detach()
    return Surrogate(
        loss,
        ratio,
        (ratio < 1.0 - clip_low) & (advantages < 0),
        (ratio > 1.0 + clip_high) & (advantages > 0),
    )


def kl_penalty(logprob: Tensor, reference_logprob: Tensor, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Per-token estimate `[R]` of KL(policy ‖ reference) on tokens sampled from the policy (Schulman's k1, k2, k3).

    With `d = logp − logp_ref`: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d. k3 is unbiased and never negative; as a
    penalty, though, only k2's *gradient* is an unbiased gradient of the reverse KL on-policy.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = logprob - reference_logprob.detach()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def token_weights(
    completion_lengths: Tensor,
    completion_index: Tensor,
    loss_type: Literal["grpo", "dapo", "dr_grpo"],
    *,
    total_completions: int,
    total_tokens: int,
    max_length: int,
) -> Tensor:
    """Weight `[R]` of each token's loss; totals count the whole optimiser step, over micro-batches and ranks.

    grpo: `1 / (M · L_i)` (DeepSeekMath); dapo: `1 / T` (DAPO, token-level loss); dr_grpo: `1 / (M · L_max)` (Dr. GRPO,
    arXiv 2503.20783).

    Args:
        completion_lengths: int64 `[M_local]`, tokens of each completion in `completion_index`'s numbering.
        completion_index: int64 `[R]`, the completion that a token belongs to.

    Raises:
        ValueError: an unknown loss type.
    """
    if loss_type == "grpo":
        per_completion = 1.0 / (total_completions * completion_lengths.clamp(min=1).double())
        return per_completion.float()[completion_index]
    if loss_type == "dapo":
        weight = 1.0 / max(total_tokens, 1)
    elif loss_type == "dr_grpo":
        weight = 1.0 / (total_completions * max_length)
    else:
        raise ValueError(f"unknown loss type {loss_type!r}: choose grpo, dapo or dr_grpo")
    return torch.full_like(completion_index, weight, dtype=torch.float32)
