"""The AffectGPT-R1 rewards (arXiv 2508.01318), each a vectorised function over all groups of a step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.prompts import Mode, answer_text
from grpo_core.groups import Group

_THINK_ANSWER = re.compile(
    r"<think>((?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>((?:(?!</?(?:think|answer)>).)*)</answer>", re.DOTALL
)


class AccuracyReward:
    """Emotion-wheel F of a completion's labels against its sample's, mean over the five wheels, in 0…1.

    A sample whose own labels are on no wheel cannot be judged: NaN.

    Args:
        wheel: the tables.
        mode: `think` scores what stands in `<answer>`, `no_think` the whole text.
        level: 1 for the inner ring of the wheels (the paper's), 2 for the next.
        unscored: a wheel that the ground truth is not on counts as 0 (`zero`) or is left out of the mean (`skip`).
    """

    name = "accuracy"

    def __init__(
        self,
        wheel: EmotionWheel,
        mode: Mode = "no_think",
        level: Literal[1, 2] = 1,
        unscored: Literal["zero", "skip"] = "skip",
    ):
        self.wheel, self.mode, self.level, self.unscored = wheel, mode, level, unscored

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        truth = [group.prompt.sample.labels for group in groups for _ in group.completions]
        answers = [answer_text(c.text, self.mode) for group in groups for c in group.completions]
        scores = self.wheel.score(truth, answers, self.level, parse="tolerant")
        values = scores.mean(self.unscored)
        values[np.isnan(scores.f1).all(axis=1)] = np.nan
        return values.reshape(len(groups), -1)


class FormatReward:
    """1 if the whole text is one `<think>…</think>` block and one `<answer>…</answer>` block, neither empty, else 0."""

    name = "format"

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = [has_think_answer_format(c.text) for group in groups for c in group.completions]
        return np.array(values, dtype=np.float64).reshape(len(groups), -1)


def has_think_answer_format(text: str) -> bool:
    """Strict reading of the paper's format: a full match of the stripped text, with exactly one pair of each tag."""
    match = _THINK_ANSWER.fullmatch(text.strip())
    return match is not None and all(part.strip() for part in match.groups())
