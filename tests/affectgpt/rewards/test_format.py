"""The format: one think block and one answer block, by three readings."""

import pytest
from hypothesis import given, settings

from affectgpt.rewards import (
    FormatReward,
    has_think_answer_format,
    split_think_answer,
)
from tests.affectgpt.answers import answers, group


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("<think> a </think> <answer> happy </answer>", True),
        ("  <think>a</think><answer>happy</answer>\n", True),
        ("<think>line\nline</think>\n<answer>happy</answer>", True),
        ("<answer> happy </answer>", False),
        ("<think> a </think> <answer> happy </answer> and more", False),
        ("well, <think> a </think> <answer> happy </answer>", False),
        ("<think> a </think> <answer> </answer>", False),
        ("<think></think><answer>happy</answer>", False),
        ("<think> a </think> <answer> x </answer> <answer> y </answer>", False),
        ("<think> <think> a </think> <answer> x </answer>", False),
        ("<think> a </think> so <answer> x </answer>", False),
    ],
)
def test_format_is_one_think_block_and_one_answer_block(text, valid):
    assert has_think_answer_format(text) is valid
    assert FormatReward()([group("[happy]", text, "")]).tolist() == [[float(valid), 0.0]]


@pytest.mark.parametrize(
    ("text", "full", "prefix", "tolerant"),
    [
        ("<think>a</think> <answer>b</answer>", True, True, True),
        ("<think>a</think> <answer>b</answer> and more", False, True, True),
        ("well, <think>a</think> so <answer>b</answer>", False, False, True),
        ("<think>a</think><answer> </answer>", False, True, False),
        ("<think></think><answer>b</answer>", False, True, False),
        ("<answer>b</answer><think>a</think>", False, False, False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False, True, True),
        ("<think>a</think><answer>b", False, False, False),
        ("happy", False, False, False),
    ],
)
def test_the_three_readings_of_the_format(text, full, prefix, tolerant):
    for rule, valid in (("full", full), ("prefix", prefix), ("tolerant", tolerant)):
        assert has_think_answer_format(text, rule) is valid
        assert FormatReward(rule)([group("[happy]", text)]).tolist() == [[float(valid)]]


@given(answers)
@settings(deadline=None)
def test_a_full_match_is_a_match_by_every_reading(text):
    if parts := split_think_answer(text, "full"):
        assert split_think_answer(text, "prefix") == split_think_answer(text, "tolerant") == parts
