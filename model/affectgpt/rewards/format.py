"""Check the form `<think>…</think><answer>…</answer>` of completions, by three readings of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from affectgpt.rewards.registry import register_reward
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.rewards.config import RewardConfig
    from affectgpt.rewards.registry import RewardContext
    from grpo_core.types import Group

FormatRule = Literal["full", "prefix", "tolerant"]

# text up to the next tag of any sort: with `.*?` a second block could hide inside the first
_NO_TAG = "((?:(?!</?(?:think|answer)>).)*)"
_FULL = re.compile(rf"<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>", re.DOTALL)
_PREFIX = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def check_rule(rule: str) -> None:
    """Refuse an unknown reading of the form.

    Raises:
        InputError: listing the known readings.
    """
    if rule not in get_args(FormatRule):
        raise InputError(f"unknown format rule {rule!r}: choose full, prefix or tolerant")


def split_think_answer(text: str, rule: FormatRule = "full") -> tuple[str, str] | None:
    """Split a completion into (think, answer), stripped; None if it does not have the form.

    full: the whole text is one think block and one answer block, with nothing around or between them and no further
    tag, neither empty: the strict reading of the paper. prefix: the text begins with the two blocks, which may be
    empty; anything may follow. tolerant: the first think block ends before the first answer block begins, neither
    empty; anything may surround them.

    Raises:
        InputError: the rule is unknown.
    """
    if rule == "full":
        match = _FULL.fullmatch(text.strip())
        blocks = match.groups() if match else None
    elif rule == "prefix":
        match = _PREFIX.match(text.strip())
        blocks = match.groups() if match else None
    else:
        check_rule(rule)
        think, answer = _THINK.search(text), _ANSWER.search(text)
        blocks = (think[1], answer[1]) if think and answer and think.end() <= answer.start() else None
    if blocks is None or (rule != "prefix" and not all(block.strip() for block in blocks)):
        return None
    return blocks[0].strip(), blocks[1].strip()


def has_think_answer_format(text: str, rule: FormatRule = "full") -> bool:
    """Whether a completion has the form, by a rule of `split_think_answer`."""
    return split_think_answer(text, rule) is not None


def think_text(text: str) -> str:
    """Return the text of the first closed think block, whatever surrounds it; an empty string if there is none."""
    match = _THINK.search(text)
    return match[1].strip() if match else ""


@register_reward("format", needs="think")
class FormatReward:
    """1 if a completion has the think-answer form, else 0.

    Args:
        rule: reading of the form, see `split_think_answer`.
    """

    name: ClassVar[str]

    def __init__(self, rule: FormatRule = "full"):
        check_rule(rule)
        self.rule = rule

    @classmethod
    def from_config(cls, config: RewardConfig, context: RewardContext) -> FormatReward:
        """Make the reward of a run."""
        return cls(config.format_rule)

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = [has_think_answer_format(c.text, self.rule) for group in groups for c in group.completions]
        return np.array(values, dtype=np.float64).reshape(len(groups), -1)
