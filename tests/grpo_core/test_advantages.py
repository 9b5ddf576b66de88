"""Group-relative advantages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.advantages import group_advantages, has_signal


@pytest.mark.parametrize("reward", [0.35, 1.35, 2.7, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_rewards_give_exactly_zero(reward, size, scale):
    rewards = np.full((3, size), reward)
    assert (group_advantages(rewards, scale) == 0).all()
    assert not has_signal(rewards).any()


def test_advantage_is_the_standardised_reward():
    rewards = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 0.0]])
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-12)
    np.testing.assert_allclose(
        group_advantages(rewards, "none"), rewards - rewards.mean(1, keepdims=True), rtol=0, atol=1e-15
    )


def test_an_unjudged_completion_gets_zero_and_leaves_the_others_as_if_it_were_absent():
    rewards = np.array([[np.nan, 1.0, 3.0, 2.0]])
    advantages = group_advantages(rewards)
    assert advantages[0, 0] == 0
    np.testing.assert_array_equal(advantages[:, 1:], group_advantages(rewards[:, 1:]))


def test_a_group_with_one_judged_member_or_none_gets_zero():
    rewards = np.array([[np.nan, 4.0, np.nan], [np.nan, np.nan, np.nan]])
    assert (group_advantages(rewards) == 0).all()
    assert not has_signal(rewards).any()


def test_an_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(np.array([[1.0, np.inf]]))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12), st.integers(-1000, 1000))
def test_advantages_are_centred_and_do_not_change_when_a_constant_is_added(values, offset):
    rewards = np.array([values], dtype=np.float64)
    advantages = group_advantages(rewards)
    assert abs(advantages.sum()) < 1e-9
    np.testing.assert_allclose(group_advantages(rewards + offset), advantages, atol=1e-12)
    assert has_signal(rewards)[0] == (len(set(values)) > 1)
