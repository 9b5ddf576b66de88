"""The built-in rewards by name: every reward class registers itself, with what it needs and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from affectgpt.rewards.words import EmotionWords, wordnet_lemmas
from grpo_core.registry import Registry

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel
    from affectgpt.prompts import Mode
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.perception import Judge

Needs = Literal["think", "judge"]


@dataclass
class RewardContext:
    """What rewards are made from beside their options.

    Attributes:
        wheel: the emotion tables.
        mode: whether completions think before they answer.
        max_length: tokens of the longest completion, `rollout.max_new_tokens`.
        config: the run's reward options.
        judge: compares answers, in the place of the model that `config.judge` names.
    """

    wheel: EmotionWheel
    mode: Mode
    max_length: int
    config: RewardConfig
    judge: Judge | None = None

    @cached_property
    def words(self) -> EmotionWords:
        """Finds emotion words in the thinking. One object serves all rewards: it remembers the words it has met."""
        folder = self.config.wordnet
        return EmotionWords(self.wheel, None if folder is None else wordnet_lemmas(folder))


class BuiltInReward(Protocol):
    """What a registered class has. `register_reward` sets `name` and `needs`.

    Attributes:
        name: what `reward.names` calls it, and its label in metrics and logs.
        needs: `think`, a think block to judge; `judge`, a model that compares answers; None, nothing.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs | None]

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> Any:
        """Make the reward of a run."""


REWARDS: Registry[Any] = Registry("reward")
"""Every built-in reward, a class as `BuiltInReward` describes it. Messages and checks are made from this list."""

RewardClass = TypeVar("RewardClass", bound=type)


def register_reward(name: str, *, needs: Needs | None = None) -> Callable[[RewardClass], RewardClass]:
    """Register the class below as the reward that `reward.names` calls `name`.

    Raises:
        ValueError: the name is taken, or the class has no `from_config`.
    """

    def register(cls: RewardClass) -> RewardClass:
        if not callable(getattr(cls, "from_config", None)):
            raise ValueError(f"reward {name!r}: give {cls.__name__} a classmethod from_config(config, context)")
        REWARDS.add(name, cls)
        cls.name, cls.needs = name, needs  # type: ignore[attr-defined]
        return cls

    return register
