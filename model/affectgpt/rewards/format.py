"""Whether a completion has the form `<think>…</think><answer>…</answer>`, by three readings of that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from grpo_core.types import Group

FormatRule = Literal["full", "prefix", "tolerant"]

_NO_TAG = "((?:(?!</?(?:think|answer)>).)*)"
_FULL = re.compile(rf"<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>", re.DOTALL)
_PREFIX = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def split_think_answer(text: str, rule: FormatRule = "full") -> tuple[str, str] | None:
    """(think, answer) of a completion, stripped; None if it has not the form.

    full: the whole text is one think block and one answer block, with nothing around or between them and no further
    tag, neither empty: the strict reading of the paper. prefix: the text begins with the two blocks, which may be
    empty; anything may follow. tolerant: the first think block ends before the first answer block begins, neither
    empty; anything may stand around them.

    Raises:
        ValueError: an unknown rule.
    """
    if rule == "full":
        match = _FULL.fullmatch(text.strip())
        parts = match.groups() if match else None
    elif rule == "prefix":
        match = _PREFIX.match(text.strip())
        parts = match.groups() if match else None
    elif rule == "tolerant":
        think, answer = _THINK.search(text), _ANSWER.search(text)
        parts = (think[1], answer[1]) if think and answer and think.end() <= answer.start() else None
    else:
        raise ValueError(f"unknown format rule {rule!r}: choose full, prefix or tolerant")
    if parts is None or (rule != "prefix" and not all(part.strip() for part in parts)):
        return None
    return parts[0].strip(), parts[1].strip()


def has_think_answer_format(text: str, rule: FormatRule = "full") -> bool:
    """Whether a completion has the form, by a rule of `split_think_answer`."""
    return split_think_answer(text, rule) is not None


def think_text(text: str) -> str:
    """What stands in the first closed think block, whatever surrounds it; an empty string if there is none."""
    match = _THINK.search(text)
    return match[1].strip() if match else ""


class FormatReward:
    """1 if a completion has the think-answer form, else 0.

    Args:
        rule: how strictly it is read, see `split_think_answer`.
    """

    name = "format"

    def __init__(self, rule: FormatRule = "full"):
        split_think_answer("", rule)  # refuses an unknown rule
        self.rule = rule

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        values = [has_think_answer_format(c.text, self.rule) for group in groups for c in group.completions]
        return np.array(values, dtype=np.float64).reshape(len(groups), -1)
