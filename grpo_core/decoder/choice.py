"""The token that follows: a row of logits, one uniform number, and the rollout's settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core.config import RolloutConfig

_BLOCK = 64


class TokenChooser:
    """Draws tokens by inverse CDF, or takes the most probable one at temperature 0.

    Args:
        rollout: temperature, truncation and penalty. They apply in transformers' order: penalty, temperature, top-k,
            top-p (of what top-k kept), min-p.
        forbidden: token ids that are never drawn.
        limit: ids from here on are never drawn: rows of the head that the tokenizer has no token for. At most V.
        device: where logits are.
    """

    def __init__(self, rollout: RolloutConfig, forbidden: Sequence[int], limit: int, device: torch.device):
        self.rollout = rollout
        self.limit = limit
        within = sorted({token for token in forbidden if 0 <= token < limit})
        self.forbidden = torch.tensor(within, dtype=torch.int64, device=device) if within else None

    def __call__(self, logits: Tensor, uniforms: Tensor | None, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose a token for each of B rows.

        Args:
            logits: `[B, V]`.
            uniforms: `[B]` in (0, 1); unused when greedy.
            seen: bool `[B, V]`, tokens that the repetition penalty is for.

        Returns:
            int64 `[B]` tokens; float32 `[B]` their log-probabilities under softmax(logits / temperature) over the whole
            vocabulary, before penalty, truncation and forbidden tokens (temperature 1 when greedy).
        """
        temperature = self.rollout.temperature
        logits = logits.float()
        if temperature not in (0.0, 1.0):
            logits = logits / temperature
        scores = logits if seen is None else self._penalised(logits, seen)
        if temperature == 0:
            tokens = self._admissible(scores.clone(), -torch.inf).argmax(dim=-1)
        else:
            weights = torch.softmax(scores, dim=-1)
            tokens = _inverse_cdf(self._truncated(self._admissible(weights, 0.0)), uniforms)
            if seen is None:  # a token that was drawn has a probability that is not 0
                return tokens, weights.gather(1, tokens[:, None])[:, 0].log_()
        return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]

    def _admissible(self, scores: Tensor, nothing: float) -> Tensor:
        """Scores `[B, V]`, overwritten with `nothing` at tokens that are never drawn."""
        if self.limit < scores.shape[1]:
            scores[:, self.limit :] = nothing
        return scores if self.forbidden is None else scores.index_fill_(1, self.forbidden, nothing)

    def _penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        penalty = self.rollout.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _truncated(self, weights: Tensor) -> Tensor:
        """Weights `[B, V]`, 0 where top-k, top-p or min-p drop a token."""
        rollout = self.rollout
        if rollout.top_k and rollout.top_k < weights.shape[1]:
            least = weights.topk(rollout.top_k, dim=-1).values[:, -1:]
            weights = weights.masked_fill(weights < least, 0.0)
        if rollout.top_p < 1:
            ordered, order = weights.sort(dim=-1, descending=True, stable=True)
            sums = ordered.cumsum(dim=-1)
            beyond = sums - ordered >= rollout.top_p * sums[:, -1:]
            weights = torch.zeros_like(weights).scatter_(1, order, ordered.masked_fill_(beyond, 0.0))
        if rollout.min_p > 0:
            weights = weights.masked_fill(weights < rollout.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
        return weights


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the running sum of weights `[B, V]` passes the share `uniforms` `[B]` of the total.

    First the block of 64 tokens, then the token in it: running sums over the whole row cost more than the softmax.
    """
    size = weights.shape[1]
    blocks = F.pad(weights, (0, -size % _BLOCK)) if size % _BLOCK else weights
    blocks = blocks.unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1).cumsum(dim=-1)
    aim = _below(uniforms[:, None].to(sums.dtype) * sums[:, -1:], sums)
    # for rows of NaN, which the caller finds by their log-probs, no sum is above the aim
    block = torch.searchsorted(sums, aim, right=True).clamp_(max=sums.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1)
    beyond = sums.gather(1, block) - aim
    aim = _below((inside[:, -1:] - beyond).clamp_(min=0), inside)
    token = block * _BLOCK + torch.searchsorted(inside, aim, right=True)
    return token[:, 0].clamp_(max=size - 1)


def _below(aim: Tensor, sums: Tensor) -> Tensor:
    """`aim` `[B, 1]`, less than the last of rising `sums` `[B, n]` even if rounding put it there: 1 - 2⁻²³ of it."""
    return torch.minimum(aim, sums[:, -1:] * (1 - torch.finfo(torch.float32).eps))
