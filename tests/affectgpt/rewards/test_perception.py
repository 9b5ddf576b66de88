"""The perception reward: groups ranked by comparisons."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.rewards import (
    PerceptionReward,
    RewardConfig,
    bradley_terry,
    make_rewards,
)
from tests.affectgpt.answers import WHEEL, Ranking, group, think


def test_the_better_half_of_a_group_gets_one():
    judge = Ranking("a", "b", "c", "d", "e")
    values = PerceptionReward(judge, "no_think")([group("[happy]", "c", "a", "e", "d", "b"), group("[sad]", *"edcba")])
    assert values.tolist() == [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert len(judge.asked) == 2 * 10


def test_ill_formed_answers_lose_unheard_and_equals_share():
    good, better, bad = think("a", "b"), think("c", "d"), "happy"
    judge = Ranking(better, good)
    values = PerceptionReward(judge)([group("[happy]", bad, good, bad, better)])
    assert values.tolist() == [[0, 1, 0, 1]]
    assert judge.asked == [(good, better)]
    assert PerceptionReward(Ranking(good))([group("[happy]", good, good, good)]).tolist() == [[1, 1, 1]]


def test_without_verdicts_a_completion_cannot_be_judged():
    silent = lambda comparisons: np.full(len(comparisons), np.nan)  # noqa: E731
    assert np.isnan(PerceptionReward(silent, "no_think")([group("[happy]", "a", "b")])).all()
    assert np.isnan(PerceptionReward(silent)([group("[happy]", "a", "b")])).all()  # both ill-formed
    assert np.isnan(PerceptionReward(silent, "no_think")([group("[happy]", "a")])).all()


def test_perception_without_a_judge_is_refused_and_its_answers_are_checked():
    with pytest.raises(ValueError, match=r"needs a judge .* set reward\.judge"):
        make_rewards(["perception"], WHEEL, "think", RewardConfig(), max_length=20)
    for wrong in (np.ones(3), np.array([2.0])):
        with pytest.raises(ValueError, match="1 numbers in 0…1 or NaN"):
            PerceptionReward(lambda _, wrong=wrong: wrong, "no_think")([group("[happy]", "a", "b")])


def test_bradley_terry_finds_the_skills_that_made_the_wins():
    skills = np.array([[1.2, -0.7, 0.1, -0.6]])
    p = np.exp(skills)
    wins = 1e5 * p[:, :, None] / (p[:, :, None] + p[:, None, :]) * (1 - np.eye(4))
    np.testing.assert_allclose(np.diff(bradley_terry(wins)), np.diff(skills), atol=1e-4)  # their differences matter
    beaten = np.zeros((1, 3, 3))
    beaten[0, 0, 1] = 5
    result = bradley_terry(beaten)[0]
    assert np.isfinite(result[:2]).all()  # one that always won has a finite skill
    assert result[0] > result[1]
    assert np.isnan(result[2])


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=10, max_size=10))
@settings(max_examples=50, deadline=None)
def test_where_all_pairs_are_compared_the_ranking_is_by_wins(verdicts):
    wins = np.zeros((1, 5, 5))
    for (i, j), verdict in zip(combinations(range(5), 2), verdicts, strict=True):
        wins[0, i, j], wins[0, j, i] = verdict, 1 - verdict
    skills, won = bradley_terry(wins)[0], wins[0].sum(axis=1)
    for i, j in combinations(range(5), 2):
        assert np.sign(np.round(skills[i] - skills[j], 6)) == np.sign(won[i] - won[j])
