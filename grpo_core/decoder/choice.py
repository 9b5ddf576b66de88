"""The token that follows: a row of logits, one uniform number, and the rollout's settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.config import RolloutConfig


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
        self.forbidden = torch.tensor(within, dtype=torch.int64, device=device)

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
        rollout = self.rollout
        logits = logits.float()
        if rollout.temperature not in (0.0, 1.0):
            logits = logits / rollout.temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        scores = self._admissible(logprobs if seen is None else self._penalised(logits, seen))
        if rollout.temperature == 0:
            tokens = scores.argmax(dim=-1)
        else:
            tokens = _inverse_cdf(self._weights(scores), uniforms)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _admissible(self, scores: Tensor) -> Tensor:
        """Scores with the tokens that may not be drawn at -inf, cut to the tokenizer's size."""
        scores = scores[:, : self.limit]
        return scores.index_fill(1, self.forbidden, -torch.inf) if len(self.forbidden) else scores

    def _penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        penalty = self.rollout.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _weights(self, scores: Tensor) -> Tensor:
        """Unnormalised probabilities of the tokens that are kept, 0 elsewhere."""
        rollout = self.rollout
        if rollout.top_k and rollout.top_k < scores.shape[1]:
            threshold = scores.topk(rollout.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < threshold, -torch.inf)
        kept = weights = torch.softmax(scores, dim=-1)
        if rollout.top_p < 1:
            ordered, order = weights.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            kept = torch.zeros_like(weights).scatter_(1, order, ordered.masked_fill(before >= rollout.top_p, 0.0))
        if rollout.min_p > 0:
            kept = kept.masked_fill(weights < rollout.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
        return kept


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the running sum of weights `[B, V]` passes the share `uniforms` `[B]` of the total."""
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1]
    # strictly below the total, so that a weight of 0 at the end is never reached
    aim = torch.minimum(uniforms.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    # the clamp is for rows of NaN, which the caller finds by their log-probs
    return torch.searchsorted(sums, aim[:, None], right=True)[:, 0].clamp_(max=sums.shape[1] - 1)
