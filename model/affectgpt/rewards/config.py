"""Rewards by name, and their options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.prompts import Mode
from affectgpt.rewards.accuracy import AccuracyReward, DualReward
from affectgpt.rewards.alignment import AlignmentReward
from affectgpt.rewards.closed_labels import HitRateReward, SentimentReward
from affectgpt.rewards.format import FormatReward
from affectgpt.rewards.length import LengthPenalty
from affectgpt.rewards.perception import Judge, PerceptionReward
from affectgpt.rewards.shaping import RepetitionPenalty, SoftOverlongPunishment
from affectgpt.rewards.words import EmotionWords, wordnet_lemmas
from grpo_core.rewards import Reward


@dataclass
class RewardConfig:
    """Which rewards a run has, and how they judge; algorithm.reward_weights weighs them."""

    names: tuple[str, ...] = ("accuracy",)
    """Rewards by name: accuracy, format, alignment, dual, perception, overlong, repetition, hit_rate, sentiment;
    format, alignment and dual need think mode, perception a judge."""
    level: Literal[1, 2] = 1
    """Ring of the wheels that is compared."""
    unscored: Literal["zero", "skip"] = "skip"
    """A wheel that the ground truth is not on counts as 0 or is left out."""
    length_penalty: Literal["none", "P1", "P2", "P3"] = "none"
    """Factor on accuracy and dual for more labels than the ground truth has."""
    single_label: Literal["as_written", "shift_single", "shift", "inverse_log"] = "shift_single"
    """How P3 treats a ground truth of one label, where it is 0 as written; see docs/rewards.md."""
    format_rule: Literal["full", "prefix", "tolerant"] = "full"
    """What counts as the think-answer form: the whole text, its beginning, or two blocks anywhere."""
    alignment: Literal["jaccard", "threshold"] = "jaccard"
    """Mean Jaccard index of the clusters in think and in answer, or 1 where their F reaches alignment_threshold."""
    alignment_threshold: float = 0.5
    """For alignment threshold."""
    wordnet: Path | None = None
    """WordNet 3.0 folder, for words of the thinking that the wheel's tables lack; unset, only what these hold is
    found."""
    overlong_cache: int = 16
    """Tokens before rollout.max_new_tokens over which the overlong reward falls to −1."""
    repetition_ngram: int = 3
    """Tokens of the n-grams that the repetition reward counts."""
    candidates: tuple[str, ...] = ()
    """Labels of a dataset with closed labels; a hit is divided by how many of them the answer names. Unset: not."""
    judge: Path | None = None
    """Folder of a multimodal chat model in safetensors, which compares answers for the perception reward; every rank
    loads it. See docs/rewards.md."""
    judge_frames: int = 8
    """Frames of a video that the judge is shown."""
    judge_batch: int = 4
    """Pairs of answers in one forward pass of the judge, two rows each."""
    judge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the judge's weights; auto is its checkpoint's."""

    def __post_init__(self) -> None:
        LengthPenalty(self.length_penalty, self.single_label)
        if not 0 < self.alignment_threshold <= 1:
            raise ValueError(f"alignment_threshold is {self.alignment_threshold}: set it above 0 and at most 1")
        for name in ("judge_frames", "judge_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")

    @property
    def penalty(self) -> LengthPenalty:
        """The factor for too many labels."""
        return LengthPenalty(self.length_penalty, self.single_label)


class _Parts:
    """What rewards are made from; emotion words are found by one object for all."""

    def __init__(self, wheel: EmotionWheel, mode: Mode, config: RewardConfig, max_length: int, judge: Judge | None):
        self.wheel, self.mode, self.config, self.max_length, self._judge = wheel, mode, config, max_length, judge
        self._words: EmotionWords | None = None

    @property
    def words(self) -> EmotionWords:
        if self._words is None:
            folder = self.config.wordnet
            self._words = EmotionWords(self.wheel, None if folder is None else wordnet_lemmas(folder))
        return self._words

    @property
    def judge(self) -> Judge | None:
        config = self.config
        if self._judge is not None or config.judge is None:
            return self._judge
        from affectgpt.rewards.judge import ModelJudge

        options = {"frames": config.judge_frames, "batch": config.judge_batch, "dtype": config.judge_dtype}
        return ModelJudge(config.judge, **options)


REWARDS: dict[str, Callable[[_Parts], Reward]] = {
    "accuracy": lambda p: AccuracyReward(p.wheel, p.mode, p.config.level, p.config.unscored, p.config.penalty),
    "format": lambda p: FormatReward(p.config.format_rule),
    "alignment": lambda p: AlignmentReward(
        p.wheel,
        p.config.alignment,
        p.config.alignment_threshold,
        p.config.level,
        p.config.unscored,
        p.config.format_rule,
        p.words,
    ),
    "dual": lambda p: DualReward(p.wheel, p.config.level, p.config.unscored, p.config.penalty, p.words),
    "perception": lambda p: PerceptionReward(p.judge, p.mode, p.config.format_rule),
    "overlong": lambda p: SoftOverlongPunishment(p.max_length, p.config.overlong_cache),
    "repetition": lambda p: RepetitionPenalty(p.config.repetition_ngram),
    "hit_rate": lambda p: HitRateReward(p.wheel, p.mode, p.config.candidates, p.config.unscored),
    "sentiment": lambda p: SentimentReward(p.wheel, p.mode),
}
"""Every reward by name."""

THINK_ONLY = ("format", "alignment", "dual")
"""Rewards that judge a think block."""


def make_rewards(
    names: Sequence[str],
    wheel: EmotionWheel,
    mode: Mode,
    config: RewardConfig,
    *,
    max_length: int,
    judge: Judge | None = None,
) -> list[Reward]:
    """The named rewards.

    Args:
        max_length: tokens of the longest completion, `rollout.max_new_tokens`.
        judge: for `perception`, in the place of the model in `config.judge`.

    Raises:
        ValueError: an unknown name, one that stands twice, a reward that the mode has nothing for, perception without a
            judge, a `config.judge` without perception, or one that is no model a judge can be made of.
    """
    for name in names:
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}: choose among {', '.join(REWARDS)}")
        if name in THINK_ONLY and mode != "think":
            raise ValueError(f"reward {name!r} judges think and answer tags: set prompt.mode to think")
    if len(set(names)) != len(names):
        raise ValueError(f"a reward is named twice: {', '.join(names)}")
    if config.judge is not None and "perception" not in names:
        raise ValueError("reward.judge is set, but nothing asks it: add perception to reward.names, or unset it")
    parts = _Parts(wheel, mode, config, max_length, judge)
    return [REWARDS[name](parts) for name in names]
