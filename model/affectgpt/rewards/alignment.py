"""Reward completions whose thinking and answer name the same emotions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.rewards.format import FormatRule, check_rule, split_think_answer
from affectgpt.rewards.registry import register_reward
from affectgpt.rewards.words import EmotionWords
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group


@register_reward("alignment", needs="think")
class AlignmentReward:
    """Agreement of the emotion words of the think block with those of the answer, in 0…1, whatever the ground truth.

    0 for a completion without the think-answer form, or with no word of the wheels on either side.

    Args:
        wheel: the tables.
        form: `jaccard`, the mean over wheels of |T∩A| / |T∪A| of the cluster sets; `threshold`, 1 where the mean of
            their F, 2|T∩A| / (|T| + |A|), reaches `threshold`, else 0. Which form the paper uses is not known.
        threshold: threshold of that form.
        level: 1 for the inner ring of the wheels, 2 for the next.
        unscored: a wheel that has neither side counts as 0 (`zero`) or is left out of the mean (`skip`).
        rule: reading of the think-answer form, see `split_think_answer`.
        words: finder of emotion words in the thinking; by default one on `wheel`'s tables.

    Raises:
        InputError: the form, `unscored` or the rule is unknown.
    """

    name: ClassVar[str]

    def __init__(
        self,
        wheel: EmotionWheel,
        form: Literal["jaccard", "threshold"] = "jaccard",
        threshold: float = 0.5,
        level: Literal[1, 2] = 1,
        unscored: Literal["zero", "skip"] = "skip",
        rule: FormatRule = "full",
        words: EmotionWords | None = None,
    ):
        if form not in ("jaccard", "threshold"):
            raise InputError(f"unknown form of the alignment reward {form!r}: choose jaccard or threshold")
        if unscored not in ("zero", "skip"):
            raise InputError(f"unscored={unscored!r}: choose zero or skip")
        check_rule(rule)
        self.wheel, self.form, self.threshold, self.level = wheel, form, threshold, level
        self.unscored, self.rule, self.words = unscored, rule, words or EmotionWords(wheel)

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> AlignmentReward:
        """Make the reward of a run."""
        return cls(
            context.wheel,
            form=config.alignment,
            threshold=config.alignment_threshold,
            level=config.level,
            unscored=config.unscored,
            rule=config.format_rule,
            words=context.words,
        )

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        # a completion without the form counts as one without words on either side, whose agreement is 0
        blocks = [split_think_answer(c.text, self.rule) or ("", "") for group in groups for c in group.completions]
        thoughts = [",".join(self.words.find(think)) for think, _ in blocks]
        think = self.wheel.masks(thoughts, self.level)
        answer = self.wheel.masks([answer for _, answer in blocks], self.level, parse="tolerant")
        # bit w of a mask is cluster w, so sizes of intersections and unions are counts of bits
        common = np.bitwise_count(think & answer).astype(np.float64)
        union = np.bitwise_count(think | answer).astype(np.float64)
        if self.form == "jaccard":
            agreement = common / np.maximum(union, 1)
        else:
            # |T| + |A| = |T∪A| + |T∩A|
            agreement = 2 * common / np.maximum(union + common, 1)
        wheels = np.full(len(blocks), union.shape[1]) if self.unscored == "zero" else (union > 0).sum(axis=1)
        values = agreement.sum(axis=1) / np.maximum(wheels, 1)
        if self.form == "threshold":
            values = (values >= self.threshold).astype(np.float64)
        return values.reshape(len(groups), -1)
