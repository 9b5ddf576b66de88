"""Define a run's reward options, check them, and make the rewards that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from affectgpt.rewards.length import LengthPenalty, check_penalty
from affectgpt.rewards.perception import Judge
from affectgpt.rewards.registry import REWARDS, RewardContext
from grpo_core.config.fields import ConfigSection, option
from grpo_core.errors import InputError
from grpo_core.model_folder import check_folder

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel
    from affectgpt.prompts import Mode
    from grpo_core.rewards import Reward


@dataclass
class RewardConfig(ConfigSection, key="reward"):
    """Rewards of a run and their options; algorithm.reward_weights weights them."""

    names: tuple[str, ...] = ("accuracy",)
    """Built-in rewards by name, see docs/rewards.md, and others by import path: file.py:name or
    package.module:name."""
    level: Literal[1, 2] = 1
    """Ring of the wheels that is compared."""
    unscored: Literal["zero", "skip"] = "skip"
    """A wheel without the ground truth counts as 0, or is left out of the mean."""
    length_penalty: Literal["none", "P1", "P2", "P3"] = "none"
    """Factor on accuracy and dual for more labels than the ground truth has."""
    single_label: Literal["as_written", "shift_single", "shift", "inverse_log"] = "shift_single"
    """P3 for a ground truth of one label, where the written formula gives 0; see docs/rewards.md."""
    format_rule: Literal["full", "prefix", "tolerant"] = "full"
    """Reading of the think-answer form: the whole text, its beginning, or two blocks anywhere."""
    alignment: Literal["jaccard", "threshold"] = "jaccard"
    """Mean Jaccard index of the clusters in think and in answer, or 1 if their F reaches alignment_threshold."""
    alignment_threshold: float = 0.5
    """F from which alignment threshold gives 1."""
    wordnet: Path | None = None
    """WordNet 3.0 folder, for words of the thinking that the wheel's tables lack; unset, only words in these are
    found."""
    overlong_cache: int = 16
    """Tokens before rollout.max_new_tokens over which the overlong reward falls to −1."""
    repetition_ngram: int = 3
    """Length in tokens of the n-grams that the repetition reward counts."""
    candidates: tuple[str, ...] = ()
    """Labels of a dataset with closed labels; a hit is divided by the number of them that the answer names. Unset,
    off."""
    judge: Path | None = None
    """Folder of a multimodal chat model in safetensors that compares answers for the perception reward; every rank
    loads it. See docs/rewards.md."""
    judge_frames: int = 8
    """Number of frames of a video shown to the judge."""
    judge_batch: int = option(4, free=True)
    """Pairs of answers in one forward pass of the judge, two rows each."""
    judge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the judge's weights; auto is its checkpoint's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_penalty(self.length_penalty, self.single_label)
        if not 0 < self.alignment_threshold <= 1:
            raise InputError(f"reward.alignment_threshold is {self.alignment_threshold}: set it above 0 and at most 1")
        for name in ("judge_frames", "judge_batch", "repetition_ngram"):
            if getattr(self, name) < 1:
                raise InputError(f"reward.{name} is {getattr(self, name)}: set it to 1 or more")

    @property
    def penalty(self) -> LengthPenalty:
        """Factor for too many labels."""
        return LengthPenalty(self.length_penalty, self.single_label)


def is_import_path(name: str) -> bool:
    """Whether a name is an import path, `file.py:name` or `package.module:name`."""
    return ":" in name


def check_rewards(
    names: Sequence[str], mode: Mode, config: RewardConfig, *, max_length: int, has_judge: bool = False
) -> None:
    """Refuse rewards that a run cannot have, without reading tables, importing rewards or loading models.

    Args:
        max_length: tokens of the longest completion, `rollout.max_new_tokens`.
        has_judge: the caller has a judge to use instead of `config.judge`.

    Raises:
        InputError: a name is unknown or appears twice, a reward does not fit the mode, perception has no judge, a judge
            has no perception reward, its folder holds no model, or the overlong cache exceeds the longest completion.
    """
    built_in = [name for name in names if not is_import_path(name)]
    for name in built_in:
        if name not in REWARDS:
            raise InputError(
                f"reward.names has {name!r}, which is not a reward: choose among {', '.join(REWARDS)}, or name one by "
                "import path, file.py:name or package.module:name"
            )
        if REWARDS[name].needs == "think" and mode != "think":
            raise InputError(f"reward {name!r} judges think and answer tags: set prompt.mode to think")
        if REWARDS[name].needs == "judge" and config.judge is None and not has_judge:
            raise InputError(
                f"the {name} reward needs a judge that sees the clip: set reward.judge to the folder of a "
                f"multimodal chat model, or leave {name} out of reward.names"
            )
    if len(set(names)) != len(names):
        raise InputError(f"a reward is named twice in reward.names: {', '.join(names)}; keep one of them")
    if config.judge is not None and not has_judge:
        if not any(REWARDS[name].needs == "judge" for name in built_in):
            raise InputError("reward.judge is set, but no reward uses it: add perception to reward.names, or unset it")
        check_folder(config.judge, "reward.judge")  # a mistyped path fails now, not when the model is loaded
    if "overlong" in names and not 1 <= config.overlong_cache <= max_length:
        raise InputError(
            f"reward.overlong_cache is {config.overlong_cache} tokens of {max_length}: set it between 1 and the "
            "longest length, rollout.max_new_tokens"
        )


def make_rewards(
    names: Sequence[str],
    wheel: EmotionWheel,
    mode: Mode,
    config: RewardConfig,
    *,
    max_length: int,
    judge: Judge | None = None,
) -> list[Reward]:
    """Make the named rewards: built-in ones by name, others by import path.

    Args:
        max_length: tokens of the longest completion, `rollout.max_new_tokens`.
        judge: judge for `perception`, instead of the model in `config.judge`.

    Raises:
        InputError: `check_rewards` or, for an import path, `grpo_core.load_reward` refuses one, two rewards share a
            name, or the model in `config.judge` cannot be a judge.
    """
    # here, because it imports the engine's groups: options are read without
    from grpo_core.reward_adapters import load_reward

    check_rewards(names, mode, config, max_length=max_length, has_judge=judge is not None)
    # one context for all: its cache of words is shared by the rewards
    context = RewardContext(wheel, mode, max_length, config, judge)
    rewards: list[Reward] = [
        load_reward(name) if is_import_path(name) else REWARDS[name].from_config(config, context) for name in names
    ]
    by_label: dict[str, str] = {}
    for name, reward in zip(names, rewards, strict=True):
        if reward.name in by_label:  # checked here, since a reward from a file chooses its name when it is imported
            raise InputError(
                f"rewards {by_label[reward.name]} and {name} are both called {reward.name!r} in metrics and "
                "algorithm.reward_weights: rename yours"
            )
        by_label[reward.name] = name
    return rewards
