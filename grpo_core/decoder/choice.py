"""The token that follows: a row of logits, one uniform number, and the rollout's settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        """Scores `[B, limit]`, overwritten with `nothing` at forbidden tokens."""
        scores = scores[:, : self.limit]
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
    whole = size - size % _BLOCK
    blocks = weights[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(dim=-1)
    if whole < size:
        blocks = torch.cat((blocks, weights[:, whole:].sum(dim=-1, keepdim=True)), dim=1)
    sums = blocks.cumsum(dim=-1)
    aim = uniforms[:, None].to(sums.dtype) * sums[:, -1:]
    block = _first_above(sums, aim)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=size - 1)).masked_fill_(columns >= size, 0.0)
    before = sums.gather(1, block) - blocks.gather(1, block)
    token = block * _BLOCK + _first_above(inside.cumsum(dim=-1), aim - before)
    return token[:, 0].clamp_(max=size - 1)  # for rows of NaN, which the caller finds by their log-probs


def _first_above(sums: Tensor, aim: Tensor) -> Tensor:
    """The first of rising `sums` `[B, n]` above `aim` `[B, 1]`, one that rises even if rounding put the aim outside."""
    last = sums[:, -1:]
    aim = torch.minimum(aim.clamp(min=0), torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(sums, aim, right=True).clamp_(max=sums.shape[1] - 1)
