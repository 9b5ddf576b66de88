"""Score the emotion-wheel F of the answer (accuracy), and of the emotion words in the thinking (dual)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.prompts import Mode, answer_text
from affectgpt.rewards.format import think_text
from affectgpt.rewards.length import LengthPenalty, count_labels
from affectgpt.rewards.registry import register_reward
from affectgpt.rewards.words import EmotionWords

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group

Level = Literal[1, 2]
Unscored = Literal["zero", "skip"]


@register_reward("accuracy")
class AccuracyReward:
    """Emotion-wheel F of a completion's labels against its sample's, mean over the five wheels, in 0…1.

    A sample whose labels are on no wheel cannot be judged: NaN.

    Args:
        wheel: the tables.
        mode: `think` scores the text inside `<answer>`, `no_think` the whole text.
        level: 1 for the inner ring of the wheels (the paper's), 2 for the next.
        unscored: a wheel without the ground truth counts as 0 (`zero`) or is left out of the mean (`skip`).
        penalty: factor for more labels than the ground truth has.
    """

    name: ClassVar[str]

    def __init__(
        self,
        wheel: EmotionWheel,
        mode: Mode = "no_think",
        level: Level = 1,
        unscored: Unscored = "skip",
        penalty: LengthPenalty | None = None,
    ):
        self.wheel, self.mode, self.level, self.unscored = wheel, mode, level, unscored
        self.penalty = penalty or LengthPenalty()

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> AccuracyReward:
        """Make the reward of a run."""
        return cls(context.wheel, context.mode, config.level, config.unscored, config.penalty)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        # all completions of the step in one call, which looks the tables up in NumPy and not answer by answer
        values = wheel_f(self.wheel, groups, answers, self.level, self.unscored, parse="tolerant")
        if self.penalty.kind != "none":
            values *= self.penalty(count_labels(answers, "tolerant"), count_labels(ground_truth(groups), "strict"))
        return values.reshape(len(groups), -1)


@register_reward("dual", needs="think")
class DualReward:
    """Emotion-wheel F of the emotion words in a completion's think block against its sample's labels, in 0…1.

    0 without a closed think block; NaN as in `AccuracyReward`, which has the same arguments.

    Args:
        words: finder of emotion words; by default one on `wheel`'s tables.
    """

    name: ClassVar[str]

    def __init__(
        self,
        wheel: EmotionWheel,
        level: Level = 1,
        unscored: Unscored = "skip",
        penalty: LengthPenalty | None = None,
        words: EmotionWords | None = None,
    ):
        self.wheel, self.level, self.unscored = wheel, level, unscored
        self.penalty, self.words = penalty or LengthPenalty(), words or EmotionWords(wheel)

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> DualReward:
        """Make the reward of a run."""
        return cls(context.wheel, config.level, config.unscored, config.penalty, context.words)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        found = [set(self.words.find(think_text(c.text))) for group in groups for c in group.completions]
        # sorted: equal sets give equal texts, which `masks` parses once; commas, as the strict parser expects
        labels = [",".join(sorted(words)) for words in found]
        values = wheel_f(self.wheel, groups, labels, self.level, self.unscored, parse="strict")
        if self.penalty.kind != "none":
            # different words: a word that the thinking repeats is one label
            counts = np.array([len(words) for words in found], dtype=np.int64)
            values *= self.penalty(counts, count_labels(ground_truth(groups), "strict"))
        return values.reshape(len(groups), -1)


def ground_truth(groups: Sequence[Group]) -> list[str | None]:
    """Return the label string of every completion's sample, `N · G` of them."""
    return [group.prompt.sample.labels for group in groups for _ in group.completions]


def wheel_f(
    wheel: EmotionWheel, groups: Sequence[Group], predicted: Sequence[str], level: Level, unscored: Unscored, parse: str
) -> np.ndarray:
    """Compute the emotion-wheel F, float64 `[N · G]`; NaN if the ground truth is on no wheel."""
    scores = wheel.score(ground_truth(groups), predicted, level, parse=parse)
    values = scores.mean(unscored)
    # also under `zero`, whose mean is 0 there: a 0 for every member would look like a judgement
    values[np.isnan(scores.f1).all(axis=1)] = np.nan
    return values
