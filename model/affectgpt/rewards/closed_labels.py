"""Rewards for data with closed labels: one basic emotion a sample (hit rate), or a sentiment value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.prompts import Mode, answer_text
from affectgpt.rewards.registry import register_reward

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group

POSITIVE = frozenset(["happy", "joyful", "joy", "powerful", "peaceful", "genius"])
NEGATIVE = frozenset(["mad", "angry", "anger", "disgusted", "disgust", "sad", "scared", "fearful", "fear", "bad"])
NEITHER = frozenset({"surprised"})
_SENTIMENT = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


@register_reward("hit_rate")
class HitRateReward:
    """1 per wheel where the true label's cluster is among the answer's, mean over wheels (MER-UniBench's hit rate).

    NaN for a sample whose label is on no wheel, as `neutral` is.

    Args:
        wheel: the tables.
        mode: `think` scores what is inside `<answer>`, `no_think` the whole text.
        candidates: the dataset's labels; with them a hit is divided by how many of their clusters the answer names
            (upstream's "mscore"), so naming them all does not pay.
        unscored: a wheel that the true label is not on counts as 0 (`zero`) or is left out of the mean (`skip`).
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
            raise ValueError(f"unscored={unscored!r}: choose zero or skip")
        self.wheel, self.mode, self.candidates, self.unscored = wheel, mode, tuple(candidates), unscored

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> HitRateReward:
        """The reward of a run."""
        return cls(context.wheel, context.mode, config.candidates, config.unscored)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        truth = [_single_label(group) for group in groups for _ in group.completions]
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        hits = hit_rates(self.wheel, truth, answers, self.candidates)
        scored = ~np.isnan(hits)
        wheels = np.full(len(hits), hits.shape[1]) if self.unscored == "zero" else scored.sum(axis=1)
        with np.errstate(invalid="ignore"):
            values = np.where(scored, hits, 0.0).sum(axis=1) / wheels
        values[~scored.any(axis=1)] = np.nan
        return values.reshape(len(groups), -1)


@register_reward("sentiment")
class SentimentReward:
    """1 if the answer's sentiment is positive exactly where the sample's value is, else 0 (as MOSI's metric counts).

    The sample's `labels` hold the value, a number or positive / negative / neutral; 0 cannot be judged: NaN, as the
    metric drops such samples. The answer's sentiment is the one it names, or else that of its labels: clusters of
    happy sectors against clusters of unhappy ones, over all wheels (published figures ask a second LLM instead).

    Raises:
        ValueError: the wheel has a sector whose sentiment is not known here.
    """

    name: ClassVar[str]

    def __init__(self, wheel: EmotionWheel, mode: Mode = "no_think"):
        self.wheel, self.mode = wheel, mode
        sectors = [wheel.sectors(w) for w in range(len(wheel.names))]
        if unknown := {s for row in sectors for s in row} - POSITIVE - NEGATIVE - NEITHER:
            raise ValueError(f"the sentiment of the wheel's sectors {', '.join(sorted(unknown))} is not known")
        self._positive, self._negative = (
            np.array([sum(1 << i for i, s in enumerate(row) if s in side) for row in sectors], dtype=np.uint64)
            for side in (POSITIVE, NEGATIVE)
        )

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> SentimentReward:
        """The reward of a run."""
        return cls(context.wheel, context.mode)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = np.array([_sentiment_value(group) for group in groups for _ in group.completions])
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        right = (self.sentiment(answers) > 0) == (values > 0)
        return np.where(values == 0, np.nan, right.astype(np.float64)).reshape(len(groups), -1)

    def sentiment(self, answers: Sequence[str]) -> np.ndarray:
        """float64 `[n]`: above 0 for positive answers, below for negative ones."""
        masks = self.wheel.masks(answers, parse="tolerant")
        happy, unhappy = (np.bitwise_count(masks & side).sum(axis=1) for side in (self._positive, self._negative))
        values = happy.astype(np.float64) - unhappy
        for i, answer in enumerate(answers):
            named = {_SENTIMENT[label] for label in parse_labels(answer, "tolerant") if label in _SENTIMENT}
            if len(named) == 1:
                values[i] = named.pop()
        return values


def hit_rates(
    wheel: EmotionWheel, truth: Sequence[str], answers: Sequence[str], candidates: Sequence[str] = ()
) -> np.ndarray:
    """float64 `[n, W]` hits in 0…1 at level 1; NaN where the true label is not on the wheel. See `HitRateReward`."""
    true, named = wheel.masks(truth), wheel.masks(answers, parse="tolerant")
    hits = ((true & named) != 0).astype(np.float64)
    if candidates:
        hits /= np.maximum(np.bitwise_count(named & wheel.masks([list(candidates)])), 1)
    return np.where(true == 0, np.nan, hits)


def _single_label(group: Group) -> str:
    labels = parse_labels(group.prompt.sample.labels)
    if len(labels) != 1:
        raise ValueError(
            f"sample {group.prompt.id!r} has {len(labels)} labels: the hit rate is for data with one; use accuracy"
        )
    return labels[0]


def _sentiment_value(group: Group) -> float:
    text = str(group.prompt.sample.labels).strip().strip("[]").strip("'\" ").lower()
    try:
        return _SENTIMENT[text] if text in _SENTIMENT else float(text)
    except ValueError:
        raise ValueError(
            f"sample {group.prompt.id!r} has labels {group.prompt.sample.labels!r}: the sentiment reward needs a "
            "number, or positive, negative or neutral"
        ) from None
