"""Loss types: from log-probabilities and advantages to the loss of each token, and how token losses are averaged."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core.algorithm.completions import completion_mean

RatioLevel = Literal["token", "sequence", "sequence_token"]
RATIO_LEVELS = ("token", "sequence", "sequence_token")


class LossType(NamedTuple):
    """What a loss type's name stands for."""

    surrogate: Literal["clip", "cispo", "sapo"]
    """How a token's loss is made from its ratio and advantage: see `policy_loss`."""
    ratio: RatioLevel
    """Whose ratio it is: see `importance_ratio`."""
    average: Literal["sequence", "token", "constant", "sum"]
    """How token losses are averaged: see `token_weights`."""
    clip_range: tuple[float, float] = (0.2, 0.2)
    """Its paper's ε below and above; a sequence's ratio varies a thousand times less than a token's."""


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType("clip", "token", "sequence"),
    "bnpo": LossType("clip", "token", "token"),
    "dapo": LossType("clip", "token", "token", (0.2, 0.28)),
    "dr_grpo": LossType("clip", "token", "constant"),
    "gspo": LossType("clip", "sequence", "sequence", (3e-4, 4e-4)),
    "gspo_token": LossType("clip", "sequence_token", "sequence", (3e-4, 4e-4)),
    "cispo": LossType("cispo", "token", "token"),
    "sapo": LossType("sapo", "token", "sequence"),
    "luspo": LossType("clip", "sequence", "sum", (3e-4, 4e-4)),
}
"""Sources: grpo DeepSeekMath (arXiv 2402.03300); bnpo TRL's name for averaging over tokens, where TRL counts those of a
micro-batch and we those of the whole step, which makes it dapo (arXiv 2503.14476); dr_grpo arXiv 2503.20783; gspo and
gspo_token arXiv 2507.18071; cispo MiniMax-M1 (arXiv 2506.13585); sapo arXiv 2511.20347; luspo (arXiv 2602.05261),
gspo without the division by length."""


def find_loss_type(name: str) -> LossType:
    """A loss type by name.

    Raises:
        ValueError: unknown, listing the names there are.
    """
    if name not in LOSS_TYPES:
        raise ValueError(f"unknown loss type {name!r}: choose one of {', '.join(LOSS_TYPES)}")
    return LOSS_TYPES[name]


def token_weights(
    completion_lengths: Tensor,
    completion_index: Tensor,
    loss_type: str,
    *,
    total_completions: int,
    total_tokens: int,
    max_length: int,
    completion_weights: Tensor | None = None,
) -> Tensor:
    """Weight `[R]` of each token's loss; totals count the whole optimiser step, over micro-batches and ranks.

    By the loss type's `average`, for a token of completion i, of L_i tokens, among M completions and T tokens:
    sequence `1 / (M · L_i)`; token `1 / T`; constant `1 / (M · L_max)`; sum `1 / M`.

    Args:
        completion_lengths: int64 `[M_local]`, tokens of each completion in `completion_index`'s numbering.
        completion_index: int64 `[R]`, the completion that a token belongs to.
        loss_type: a key of `LOSS_TYPES`.
        total_completions: M, with those of weight 0.
        total_tokens: T, without the tokens of completions of weight 0.
        max_length: L_max, the longest completion that can be sampled.
        completion_weights: `[M_local]` further factor of all of a completion's tokens: 0 leaves a completion out, as
            one that was cut off at `max_length` (`mask_truncated_completions`).

    Raises:
        ValueError: an unknown loss type.
    """
    average = find_loss_type(loss_type).average
    lengths = completion_lengths.double()
    if average == "sequence":
        weights = 1.0 / (total_completions * lengths.clamp(min=1.0))
    else:
        count = {"token": total_tokens, "constant": total_completions * max_length, "sum": total_completions}[average]
        weights = torch.full_like(lengths, 1.0 / max(count, 1))
    if completion_weights is not None:
        weights = weights * completion_weights
    return weights.float()[completion_index]


class Surrogate(NamedTuple):
    """`policy_loss`'s result, all `[R]`."""

    loss: Tensor
    """Token losses, differentiable."""
    ratio: Tensor
    """π / π_old, detached; with a sequence's ratio, that of the token's completion."""
    clipped_low: Tensor
    """bool: the lower clip took the gradient away (ratio < 1 − ε, advantage < 0)."""
    clipped_high: Tensor
    """bool: the upper clip took the gradient away (ratio > 1 + ε, advantage > 0); in cispo, the ratio was capped."""


def importance_ratio(
    logprob: Tensor,
    old_logprob: Tensor,
    completion_index: Tensor,
    num_completions: int,
    level: RatioLevel = "token",
) -> Tensor:
    """π / π_old of each token `[R]`, differentiable in `logprob`.

    With `d_t = logp_t − logp_old_t`: token `exp(d_t)`; sequence `s = exp(mean d over the completion)` (GSPO, arXiv
    2507.18071, eq. 7), the same for all its tokens; sequence_token `sg(s) · π_t / sg(π_t)` (eq. 14): the value of the
    sequence's ratio with the gradient of the token's.

    Args:
        logprob, old_logprob: `[R]`; no gradient flows into the old one.
        completion_index: int64 `[R]`, the completion that a token belongs to, in `[0, num_completions)`.

    Raises:
        ValueError: an unknown level.
    """
    log_ratio = logprob - old_logprob.detach()
    if level == "token":
        return log_ratio.exp()
    if level not in RATIO_LEVELS:
        raise ValueError(f"unknown ratio level {level!r}: choose one of {', '.join(RATIO_LEVELS)}")
    sequence = completion_mean(log_ratio, completion_index, num_completions).to(logprob.dtype)[completion_index]
    if level == "sequence_token":
        sequence = sequence.detach() + (logprob - logprob.detach())
    return sequence.exp()


def policy_loss(
    loss_type: str,
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    completion_index: Tensor,
    num_completions: int,
    *,
    ratio_level: RatioLevel | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    cispo_cap: float = 5.0,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
) -> Surrogate:
    """The loss of each token under a loss type, before averaging; r is its ratio, A its advantage.

    ```
    clip     −min(min(r, δ) · A, clip(r, 1 − ε_low, 1 + ε_high) · A)
    cispo    −sg(min(r, cap)) · A · logp
    sapo     −(4 / τ) · σ(τ · (r − 1)) · A,   τ = τ₊ where A > 0, else τ₋
    ```

    Args:
        loss_type: a key of `LOSS_TYPES`.
        logprob: `[R]` log-probability of each token under the policy.
        old_logprob: `[R]` the same under the policy of the first pass; no gradient flows into it.
        advantages: `[R]`.
        completion_index: int64 `[R]`, the completion that a token belongs to, in `[0, num_completions)`.
        ratio_level: instead of the loss type's own.
        clip_low, clip_high, delta: see `clipped_surrogate`; clip types only.
        cispo_cap: upper bound of the weight, absolute, as TRL's `epsilon_high` is for cispo (ScaleRL's 5, arXiv
            2510.13786); some engines add 1.
        sapo_temperatures: (τ₊, τ₋).

    Raises:
        ValueError: an unknown loss type or ratio level.
    """
    kind = find_loss_type(loss_type)
    ratio = importance_ratio(logprob, old_logprob, completion_index, num_completions, ratio_level or kind.ratio)
    if kind.surrogate == "clip":
        return _clip(ratio, advantages, clip_low, clip_high, delta)
    unclipped = torch.zeros_like(advantages, dtype=torch.bool)
    if kind.surrogate == "cispo":
        loss = -ratio.detach().clamp(max=cispo_cap) * advantages * logprob
        return Surrogate(loss, ratio.detach(), unclipped, (ratio.detach() > cispo_cap) & (advantages > 0))
    temperature = torch.where(advantages > 0, *sapo_temperatures).to(ratio.dtype)
    loss = -4.0 / temperature * torch.sigmoid(temperature * (ratio - 1.0)) * advantages
    return Surrogate(loss, ratio.detach(), unclipped, unclipped)


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
        delta: cap on r in the unclipped branch (two-sided clipping, INTELLECT-2, arXiv 2505.07291). Above 1 + ε_high
            it acts on A < 0 alone and is *dual clip* (arXiv 1912.09729), `−max(min(r·A, clip(r)·A), δ·A)`, in other
            words.
    """
    return _clip(torch.exp(logprob - old_logprob.detach()), advantages, clip_low, clip_high, delta)


def _clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, delta: float | None) -> Surrogate:
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
