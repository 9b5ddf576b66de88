"""The built-in rewards by name: every reward class registers itself, with what it needs and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from affectgpt.rewards.words import EmotionWords, wordnet_lemmas

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
    """What a registered class has: a name, and a constructor from a run's options."""

    name: str

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> Any: ...


@dataclass(frozen=True)
class RewardEntry:
    """A reward that `reward.names` can name.

    Attributes:
        make: builds it from a run's options.
        needs: `think`, a think block to judge; `judge`, a model that compares answers; None, nothing.
        summary: the first line of its class's docstring.
    """

    name: str
    make: Callable[[RewardConfig, RewardContext], Any]
    needs: Needs | None
    summary: str


REWARDS: dict[str, RewardEntry] = {}
"""Every built-in reward. The only list of them: messages and `--help` are made from it."""

RewardClass = TypeVar("RewardClass", bound=type[BuiltInReward])


def register_reward(name: str, *, needs: Needs | None = None) -> Callable[[RewardClass], RewardClass]:
    """Class decorator: make a reward known by `name`, which also labels it in metrics and logs.

    Raises:
        ValueError: another class has the name.
    """

    def register(cls: RewardClass) -> RewardClass:
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already: choose another name")
        cls.name = name
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        REWARDS[name] = RewardEntry(name, cls.from_config, needs, summary)
        return cls

    return register
