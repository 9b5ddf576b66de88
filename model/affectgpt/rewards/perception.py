"""Reward the answers of a group that fit the clip best, by a judge that compares them in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from affectgpt.prompts import Mode
from affectgpt.rewards.format import FormatRule, split_think_answer
from affectgpt.rewards.registry import register_reward
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group, Prompt

# Each member also wins and loses this much against a member of skill 1, or one that always won had infinite skill.
PRIOR = 0.5


class Comparison(NamedTuple):
    """Two answers to one prompt, whose `sample` has the clip."""

    prompt: Prompt
    first: str
    second: str


Judge = Callable[[Sequence[Comparison]], np.ndarray]
"""Judges n comparisons at once: float64 `[n]`, the probability (or verdict: 1, 0.5, 0) that the first answer is the
better one, or NaN without a verdict. It must be a pure function: the same comparisons give the same verdicts."""


@register_reward("perception", needs="judge")
class PerceptionReward:
    """1 for the better half of a group's completions, 0 for the rest, ranked by Bradley and Terry's model.

    All pairs of a group are compared, in one call for all groups: `G (G − 1) / 2` comparisons per prompt. A well-formed
    answer beats a malformed one without asking the judge; two malformed answers are not compared. Members as good as
    the last one of the better half belong to it, so a judge without preferences gives no signal, and the order of
    members does not matter. A member without any verdict is NaN.

    Args:
        judge: compares answers; a multimodal model that sees the clip.
        mode: in `think`, a well-formed answer has the think-answer form; in `no_think`, any text is well-formed.
        rule: reading of the think-answer form, see `split_think_answer`.

    Raises:
        InputError: there is no judge.
    """

    name: ClassVar[str]

    def __init__(self, judge: Judge | None, mode: Mode = "think", rule: FormatRule = "full"):
        if judge is None:
            raise InputError(
                "the perception reward needs a judge that sees the clip: set reward.judge to the folder of a "
                "multimodal chat model, or leave perception out of reward.names"
            )
        self.judge, self.mode, self.rule = judge, mode, rule

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> PerceptionReward:
        """Make the reward of a run; loads the processor of `config.judge` unless the context has a judge."""
        judge = context.judge
        if judge is None and config.judge is not None:
            from affectgpt.rewards.judge import ModelJudge  # here, as only this reward needs torch

            judge = ModelJudge(
                config.judge, frames=config.judge_frames, batch=config.judge_batch, dtype=config.judge_dtype
            )
        return cls(judge, context.mode, config.format_rule)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        size = len(groups[0].completions) if groups else 0
        wins = np.zeros((len(groups), size, size))
        asked: list[tuple[int, int, int]] = []
        comparisons: list[Comparison] = []
        for n, group in enumerate(groups):
            texts = [completion.text for completion in group.completions]
            good = [self._has_form(text) for text in texts]
            for i, j in combinations(range(size), 2):
                if good[i] and good[j]:
                    asked.append((n, i, j))
                    comparisons.append(Comparison(group.prompt, texts[i], texts[j]))
                elif good[i] != good[j]:
                    wins[(n, i, j) if good[i] else (n, j, i)] = 1.0
        if comparisons:
            verdicts = np.asarray(self.judge(comparisons), dtype=np.float64)
            if verdicts.shape != (len(comparisons),) or (verdicts < 0).any() or (verdicts > 1).any():
                raise InputError(
                    f"the judge must give {len(comparisons)} numbers in 0…1 or NaN, got shape {verdicts.shape}"
                )
            for (n, i, j), verdict in zip(asked, verdicts.tolist(), strict=True):
                if verdict == verdict:  # NaN, without a verdict, leaves the pair as not compared
                    wins[n, i, j], wins[n, j, i] = verdict, 1.0 - verdict
        return top_half(bradley_terry(wins))

    def _has_form(self, text: str) -> bool:
        return bool(text.strip()) if self.mode == "no_think" else split_think_answer(text, self.rule) is not None


def bradley_terry(wins: np.ndarray, iterations: int = 1000, tolerance: float = 1e-8) -> np.ndarray:
    """Estimate log-skills `[N, G]` from wins over each other, by minorisation-maximisation (Hunter, 2004).

    Under the model, i beats j with probability `p_i / (p_i + p_j)`.

    Args:
        wins: float64 `[N, G, G]`, `wins[n, i, j]` victories of i over j, fractions allowed.
        iterations, tolerance: stop when no log-skill moves by more than the tolerance, or after these iterations.

    Returns:
        float64 `[N, G]`; NaN for a member without any comparison.
    """
    played = wins + wins.transpose(0, 2, 1)
    won = wins.sum(axis=2) + PRIOR
    skill = np.ones(won.shape)
    for _ in range(iterations):  # all groups together, to the slowest one's end
        expected = (played / (skill[:, :, None] + skill[:, None, :])).sum(axis=2) + 2 * PRIOR / (skill + 1.0)
        updated = won / expected
        moved = np.abs(np.log(updated / skill)).max(initial=0.0)
        skill = updated
        if moved < tolerance:
            break
    return np.where(played.sum(axis=2) > 0, np.log(skill), np.nan)


def top_half(skills: np.ndarray) -> np.ndarray:
    """Mark members `[N, G]` with at least the ⌈n / 2⌉-th best skill of n by 1, others by 0; NaN stays NaN."""
    values = np.full(skills.shape, np.nan)
    for row, out in zip(skills, values, strict=True):
        known = ~np.isnan(row)
        if known.any():
            last = np.sort(row[known])[::-1][(known.sum() + 1) // 2 - 1]
            out[known] = row[known] >= last - 1e-6  # equal skills differ by rounding
    return values
