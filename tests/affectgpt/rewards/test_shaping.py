"""Penalties on overlong and on repetitive completions."""

import numpy as np
import pytest

from affectgpt.rewards import (
    RepetitionPenalty,
    SoftOverlongPunishment,
)
from grpo_core.types import Completion, Group, Prompt
from tests.affectgpt.answers import group


def test_overlong_completions_are_punished_softly():
    reward = SoftOverlongPunishment(max_length=100, cache=20)
    values = [reward([group("[happy]", "", tokens=n)]).item() for n in (1, 80, 85, 90, 100)]
    assert values == [0, 0, -0.25, -0.5, -1]
    with pytest.raises(ValueError, match="between 1 and"):
        SoftOverlongPunishment(10, 11)


def test_repeated_ngrams_are_punished():
    def value(*tokens: int, n: int) -> float:
        completion = Completion(tokens, np.zeros(len(tokens), np.float32), "stop", "")
        return RepetitionPenalty(n)([Group(Prompt("p", (1,)), [completion])]).item()

    assert value(1, 2, 3, 4, n=2) == 0
    assert value(5, 5, 5, 5, 5, n=2) == -0.75
    assert value(1, 2, n=3) == 0
    assert value(1, 2, 1, 2, n=2) == pytest.approx(-1 / 3)
