"""Drawing tokens for rows under way: what a rollout asks of a decoder, and how it is done where logits are at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_core import rng
from grpo_core.config.options import RolloutConfig

_DRAWN_AHEAD = 16
_DROP_SHARE = 16

Drawn = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Waits for some steps to be done: int64 tokens and float32 log-probs of theirs, `[steps, B]` each."""


@dataclass(frozen=True)
class DrawRules:
    """What tokens are drawn by.

    Attributes:
        rollout: temperature, truncation, penalty, group size and longest completion.
        forbidden: token ids that are never drawn.
        limit: ids from here on are never drawn; at most V.
        end: bool `[≥ V]`, tokens that end a row.
    """

    rollout: RolloutConfig
    forbidden: tuple[int, ...]
    limit: int
    end: np.ndarray


class Drawer(Protocol):
    """Draws the tokens of B rows, numbered in the order in which they were admitted.

    Attributes:
        steps_per_read: steps to ask for at a time.
        lag: how many `Drawn` may be open: with one, steps run while the tokens of those before are looked at.
    """

    steps_per_read: int
    lag: int

    def admit(self, embeds: Sequence[Tensor], keys: np.ndarray) -> Drawn:
        """Add groups with prompts `[P_n, H]` and the first token of their rows, whose keys are uint64 `[rows]`."""

    def advance(self, steps: int) -> Drawn:
        """Draw `steps` tokens for every row. Rows that have ended may draw anything."""

    def shrinks(self, rows: int, left: int) -> bool:
        """Whether steps of `left` rows cost so much less than steps of `rows` that the others should be dropped."""

    def keep(self, rows: np.ndarray) -> None:
        """Make row `rows[i]` row i and drop all others, and every group that has no row left."""


class LogitsDecoder(Protocol):
    """A decoder that gives logits."""

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        """Add N groups with prompts `[P_n, H]`, each with group_size rows: logits `[N, V]` that follow the prompts."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token `[B]` to every row: logits `[B, V]` of the next ones."""

    def keep(self, rows: np.ndarray) -> None:
        """As in `Drawer`."""


class LogitsDrawer:
    """Draws from logits, one number from the host for each token.

    Args:
        decoder: gives the logits.
        rules: what tokens are drawn by.
        device: where the logits are.
    """

    lag = 0

    def __init__(self, decoder: LogitsDecoder, rules: DrawRules, device: torch.device):
        self.decoder, self.rollout, self.device = decoder, rules.rollout, device
        self.steps_per_read = 1 if device.type == "cpu" else 8
        self.choose = TokenChooser(rules.rollout, rules.forbidden, rules.limit, device)
        self._keys = np.zeros(0, dtype=np.uint64)
        self._count = np.zeros(0, dtype=np.int64)  # tokens drawn by each row
        self._ahead, self._ahead_from = self._draw_ahead(self._keys, self._count), self._count
        self._last = torch.zeros(0, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None

    def admit(self, embeds: Sequence[Tensor], keys: np.ndarray) -> Drawn:
        logits = self.decoder.prefill(embeds).repeat_interleave(self.rollout.group_size, dim=0)
        first, none = len(self._keys), np.zeros(len(keys), dtype=np.int64)
        self._keys = np.r_[self._keys, keys]
        self._count = np.r_[self._count, none]
        self._ahead = np.r_[self._ahead, self._draw_ahead(keys, none)]
        self._ahead_from = np.r_[self._ahead_from, none]
        if self.rollout.repetition_penalty != 1:
            blank = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            self._seen = blank if self._seen is None else torch.cat((self._seen, blank))
        drawn = self._choose(logits, slice(first, None))
        self._last = torch.cat((self._last, drawn[0]))
        return _read([drawn])

    def advance(self, steps: int) -> Drawn:
        if (self._count - self._ahead_from).max() + steps > _DRAWN_AHEAD:
            self._ahead, self._ahead_from = self._draw_ahead(self._keys, self._count), self._count
        drawn = []
        for _ in range(steps):
            drawn.append(self._choose(self.decoder.step(self._last), slice(None)))
            self._last = drawn[-1][0]
        return _read(drawn)

    def shrinks(self, rows: int, left: int) -> bool:
        return (rows - left) * _DROP_SHARE >= rows

    def keep(self, rows: np.ndarray) -> None:
        self.decoder.keep(rows)
        self._keys, self._count = self._keys[rows], self._count[rows]
        self._ahead, self._ahead_from = self._ahead[rows], self._ahead_from[rows]
        index = torch.from_numpy(rows).to(self.device)
        self._last = self._last[index]
        self._seen = None if self._seen is None else self._seen[index]

    def _choose(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The next tokens of `rows` and their log-probs."""
        uniforms = None
        if self.rollout.temperature > 0:
            index = self._count[rows] - self._ahead_from[rows]
            drawn = self._ahead[rows][np.arange(len(index)), index]
            uniforms = torch.from_numpy(drawn).to(self.device)
        seen = None if self._seen is None else self._seen[rows]
        tokens, logprobs = self.choose(logits, uniforms, seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        count = self._count.copy()
        count[rows] += 1
        self._count = count
        return tokens, logprobs

    def _draw_ahead(self, keys: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Uniform numbers float32 `[rows, _DRAWN_AHEAD]` for the next tokens."""
        if self.rollout.temperature == 0:
            return np.zeros((len(keys), 0))
        return rng.row_uniform(keys[:, None], count[:, None] + np.arange(_DRAWN_AHEAD)).astype(np.float32)


def _read(drawn: list[tuple[Tensor, Tensor]]) -> Drawn:
    tokens, logprobs = (torch.stack(column) for column in zip(*drawn, strict=True))
    return lambda: (tokens.cpu().numpy(), logprobs.cpu().numpy())


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
