"""Register the built-in rewards by name, with what they need; each class knows how to make itself from a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from affectgpt.rewards.words import EmotionWords, wordnet_lemmas
from grpo_core.errors import InputError
from grpo_core.registry import Registry

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel
    from affectgpt.prompts import Mode
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.perception import Judge

Needs = Literal["think", "judge"]


@dataclass
class RewardContext:
    """Objects from which rewards are made, beside their options.

    Attributes:
        wheel: the emotion tables.
        mode: whether completions think before they answer.
        max_length: tokens of the longest completion, `rollout.max_new_tokens`.
        config: the run's reward options.
        judge: judge to use instead of the model that `config.judge` names.
    """

    wheel: EmotionWheel
    mode: Mode
    max_length: int
    config: RewardConfig
    judge: Judge | None = None

    @cached_property
    def words(self) -> EmotionWords:
        """Finder of emotion words in the thinking; one object serves all rewards, as it caches the words it has met."""
        folder = self.config.wordnet
        return EmotionWords(self.wheel, None if folder is None else wordnet_lemmas(folder))


class BuiltInReward(Protocol):
    """Interface of a registered class; `register_reward` sets `name` and `needs`.

    Attributes:
        name: its name in `reward.names`, in metrics and in logs.
        needs: `think` if it judges a think block, `judge` if it asks a model that compares answers, or None.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs | None]

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> Any:
        """Make the reward of a run."""


REWARDS: Registry[Any] = Registry("reward")
"""Built-in rewards by name; each is a class that keeps `BuiltInReward`. Messages and checks derive from this list."""

RewardClass = TypeVar("RewardClass", bound=type)


def register_reward(name: str, *, needs: Needs | None = None) -> Callable[[RewardClass], RewardClass]:
    """Register the class below as the reward `name` of `reward.names`.

    Raises:
        InputError: the name is registered already, or the class has no `from_config`.
    """

    def register(cls: RewardClass) -> RewardClass:
        if not callable(getattr(cls, "from_config", None)):
            raise InputError(f"reward {name!r}: give {cls.__name__} a classmethod from_config(config, context)")
        REWARDS.add(name, cls)  # before the class is changed: a name that is taken raises here
        cls.name, cls.needs = name, needs  # type: ignore[attr-defined]
        return cls

    return register
