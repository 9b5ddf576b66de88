"""Reward answers to data with closed labels: one basic emotion per sample (hit rate), or a sentiment value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.prompts import Mode, answer_text
from affectgpt.rewards.registry import register_reward
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group

# sectors of the wheels' inner rings
POSITIVE = frozenset(["happy", "joyful", "joy", "powerful", "peaceful", "genius"])
NEGATIVE = frozenset(["mad", "angry", "anger", "disgusted", "disgust", "sad", "scared", "fearful", "fear", "bad"])
NEITHER = frozenset({"surprised"})  # may be either, so it does not count
_SENTIMENT = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


@register_reward("hit_rate")
class HitRateReward:
    """Share of wheels on which the true label's cluster is among the answer's (MER-UniBench's hit rate).

    NaN for a sample whose label is on no wheel, as `neutral` is.

    Args:
        wheel: the tables.
        mode: `think` scores the text inside `<answer>`, `no_think` the whole text.
        candidates: the dataset's labels; with them a hit is divided by the number of their clusters that the answer
            names (upstream's "mscore"), so that naming them all does not pay.
        unscored: a wheel without the true label counts as 0 (`zero`) or is left out of the mean (`skip`).
    """

    name: ClassVar[str]

    def __init__(
        self,
        wheel: EmotionWheel,
        mode: Mode = "no_think",
        candidates: Sequence[str] = (),
        unscored: Literal["zero", "skip"] = "skip",
    ):
        if unscored not in ("zero", "skip"):
            raise InputError(f"unscored={unscored!r}: choose zero or skip")
        self.wheel, self.mode, self.candidates, self.unscored = wheel, mode, tuple(candidates), unscored

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> HitRateReward:
        """Make the reward of a run."""
        return cls(context.wheel, context.mode, config.candidates, config.unscored)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        truth = [_single_label(group) for group in groups for _ in group.completions]
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        hits = hit_rates(self.wheel, truth, answers, self.candidates)
        scored = ~np.isnan(hits)
        wheels = np.full(len(hits), hits.shape[1]) if self.unscored == "zero" else scored.sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no wheel has the label: NaN, as is set below for `zero` too
            values = np.where(scored, hits, 0.0).sum(axis=1) / wheels
        values[~scored.any(axis=1)] = np.nan
        return values.reshape(len(groups), -1)


@register_reward("sentiment")
class SentimentReward:
    """1 if the answer's sentiment and the sample's value are both positive or both not, else 0 (MOSI's metric).

    The sample's `labels` hold the value, a number or positive / negative / neutral. A value of 0 is not judged (NaN),
    as the metric drops such samples. The answer's sentiment is the one that it names or, if it names none, that of its
    labels: clusters of happy sectors against clusters of unhappy ones, over all wheels (published figures ask a second
    LLM instead).

    Raises:
        InputError: the wheel has a sector of unknown sentiment.
    """

    name: ClassVar[str]

    def __init__(self, wheel: EmotionWheel, mode: Mode = "no_think"):
        self.wheel, self.mode = wheel, mode
        sectors = [wheel.sectors(w) for w in range(len(wheel.names))]
        if unknown := {s for row in sectors for s in row} - POSITIVE - NEGATIVE - NEITHER:
            raise InputError(f"the sentiment of the wheel's sectors {', '.join(sorted(unknown))} is not known")
        # uint64 masks of sectors, as `EmotionWheel.masks` gives them
        self._positive, self._negative = (
            np.array([sum(1 << i for i, s in enumerate(row) if s in side) for row in sectors], dtype=np.uint64)
            for side in (POSITIVE, NEGATIVE)
        )

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> SentimentReward:
        """Make the reward of a run."""
        return cls(context.wheel, context.mode)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = np.array([_sentiment_value(group) for group in groups for _ in group.completions])
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        right = (self.sentiment(answers) > 0) == (values > 0)
        return np.where(values == 0, np.nan, right.astype(np.float64)).reshape(len(groups), -1)

    def sentiment(self, answers: Sequence[str]) -> np.ndarray:
        """Compute the sentiment of answers, float64 `[n]`: above 0 is positive, below 0 negative."""
        masks = self.wheel.masks(answers, parse="tolerant")
        happy, unhappy = (np.bitwise_count(masks & side).sum(axis=1) for side in (self._positive, self._negative))
        values = happy.astype(np.float64) - unhappy
        for i, answer in enumerate(answers):
            named = {_SENTIMENT[label] for label in parse_labels(answer, "tolerant") if label in _SENTIMENT}
            if len(named) == 1:  # an answer that names both sentiments is judged by its labels
                values[i] = named.pop()
        return values


def hit_rates(
    wheel: EmotionWheel, truth: Sequence[str], answers: Sequence[str], candidates: Sequence[str] = ()
) -> np.ndarray:
    """Compute hits, float64 `[n, W]` in 0…1 at level 1; NaN if the wheel lacks the true label. See `HitRateReward`."""
    true, named = wheel.masks(truth), wheel.masks(answers, parse="tolerant")
    hits = ((true & named) != 0).astype(np.float64)
    if candidates:
        hits /= np.maximum(np.bitwise_count(named & wheel.masks([list(candidates)])), 1)
    return np.where(true == 0, np.nan, hits)


def _single_label(group: Group) -> str:
    labels = parse_labels(group.prompt.sample.labels)
    if len(labels) != 1:
        raise InputError(
            f"sample {group.prompt.id!r} has {len(labels)} labels: the hit rate is for data with one; use accuracy"
        )
    return labels[0]


def _sentiment_value(group: Group) -> float:
    text = str(group.prompt.sample.labels).strip().strip("[]").strip("'\" ").lower()
    try:
        return _SENTIMENT[text] if text in _SENTIMENT else float(text)
    except ValueError:
        raise InputError(
            f"sample {group.prompt.id!r} has labels {group.prompt.sample.labels!r}: the sentiment reward needs a "
            "number, or positive, negative or neutral"
        ) from None
