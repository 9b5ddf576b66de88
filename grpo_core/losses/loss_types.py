"""The registry of loss types: which surrogate, the ratio of what, and averaged how."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

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
