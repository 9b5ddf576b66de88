"""Penalise a completion by its tokens alone: for running up to the length limit, and for repeating itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from affectgpt.rewards.registry import register_reward
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group


@register_reward("overlong")
class SoftOverlongPunishment:
    """0 up to `max_length − cache` tokens, then falling evenly to −1 at `max_length` (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        max_length: most tokens of a completion, `rollout.max_new_tokens`.
        cache: number of tokens over which the reward falls.

    Raises:
        InputError: cache is not within 1…max_length.
    """

    name: ClassVar[str]

    def __init__(self, max_length: int, cache: int):
        if not 1 <= cache <= max_length:
            raise InputError(
                f"overlong cache is {cache} tokens of {max_length}: set it between 1 and the longest length"
            )
        self.max_length, self.cache = max_length, cache

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> SoftOverlongPunishment:
        """Make the reward of a run."""
        return cls(context.max_length, config.overlong_cache)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        lengths = [len(c.token_ids) for group in groups for c in group.completions]
        excess = np.array(lengths, dtype=np.float64) - (self.max_length - self.cache)
        return -np.clip(excess / self.cache, 0.0, 1.0).reshape(len(groups), -1)


@register_reward("repetition")
class RepetitionPenalty:
    """−(1 − distinct / all) of a completion's n-grams of tokens, in −1…0 (arXiv 2502.03373, appendix C.2; TRL's).

    Args:
        ngram_size: n; a completion with fewer tokens gets 0.

    Raises:
        InputError: n is below 1.
    """

    name: ClassVar[str]

    def __init__(self, ngram_size: int = 3):
        if ngram_size < 1:
            raise InputError(f"repetition n-gram size is {ngram_size}: set it to 1 or more")
        self.ngram_size = ngram_size

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> RepetitionPenalty:
        """Make the reward of a run."""
        return cls(config.repetition_ngram)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = [self._repeated(c.token_ids) for group in groups for c in group.completions]
        return -np.array(values, dtype=np.float64).reshape(len(groups), -1)

    def _repeated(self, tokens: Sequence[int]) -> float:
        # over token ids and not words: it needs no tokenizer, and Chinese has no blanks to split at
        total = len(tokens) - self.ngram_size + 1
        if total < 1:  # too short to repeat an n-gram: judged as 0, not as NaN
            return 0.0
        return 1.0 - len(set(zip(*(tokens[i:] for i in range(self.ngram_size)), strict=False))) / total
