"""Group-relative advantages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.algorithm.advantages import (
    choose_groups,
    combine_moments,
    combined_advantages,
    group_advantages,
    has_signal,
    moments,
    moments_std,
    weighted_advantages,
)

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


@pytest.mark.parametrize("reward", [0.35, 1.35, 2.7, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", range(2, 17))
def test_equal_rewards_give_exactly_zero_in_every_form(reward, size):
    rewards = np.full((3, size), reward)
    assert not has_signal(rewards).any()
    rewards = np.concatenate([rewards, np.arange(size)[None] / 7])  # a group with signal gives the batch a spread
    for baseline in BASELINES:
        for scale in SCALES:
            advantages = group_advantages(rewards, scale, baseline)
            assert (advantages[:3] == 0).all()
            assert (advantages[3] != 0).any()
        combined = combined_advantages(np.stack([rewards, rewards[:, ::-1] * 0.3]), [1.0, 0.7], baseline)
        assert (combined[:3] == 0).all()


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
@settings(deadline=None)
def test_advantages_are_centred_and_do_not_change_when_a_constant_is_added(values, offset):
    rewards = np.array([values], dtype=np.float64)
    advantages = group_advantages(rewards)
    assert abs(advantages.sum()) < 1e-9
    np.testing.assert_allclose(group_advantages(rewards + offset), advantages, atol=1e-12)
    assert has_signal(rewards)[0] == (len(set(values)) > 1)


def test_leave_one_out_compares_with_the_other_members():
    rewards = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, np.nan, 4.0, 0.0]])
    advantages = group_advantages(rewards, "none", "leave_one_out")
    for n, i in np.argwhere(~np.isnan(rewards)):
        others = np.delete(rewards[n], i)
        assert advantages[n, i] == pytest.approx(rewards[n, i] - np.nanmean(others), abs=1e-12)
    assert advantages[1, 1] == 0


def test_batch_scale_divides_by_the_spread_of_all_rewards():
    rewards = np.array([[0.0, 1.0, 2.0], [5.0, np.nan, 9.0]])
    expected = (rewards - np.nanmean(rewards, 1, keepdims=True)) / (np.nanstd(rewards, ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, "batch"), np.nan_to_num(expected), rtol=1e-12)
    std = moments_std(combine_moments([moments(row) for row in rewards]))  # each group on a rank of its own
    for row, whole in zip(rewards, group_advantages(rewards, "batch"), strict=True):
        np.testing.assert_allclose(group_advantages(row[None], "batch", batch_std=std)[0], whole, rtol=1e-12)


@given(st.lists(st.lists(st.floats(-5, 5), max_size=6), max_size=5), st.sampled_from([0.0, 1e8]))
@settings(deadline=None)
def test_moments_of_parts_combine_to_those_of_the_whole(parts, offset):
    values = np.array([x for part in parts for x in part]) + offset
    combined = combine_moments(np.array([moments(np.array(part) + offset) for part in parts]).reshape(-1, 3))
    assert combined[0] == len(values)
    assert moments_std(combined) == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0.0, abs=1e-6)
    assert moments_std(np.array([4, 1.0, 0.0])) == 0


def test_gdpo_scales_each_reward_then_their_sum():
    rng = np.random.default_rng(0)
    rewards = np.stack([rng.random((5, 4)), 100 * rng.random((5, 4)), rng.integers(0, 2, (5, 4)).astype(float)])
    rewards[0, 2, 1] = np.nan
    rewards[:, 3, 3] = np.nan
    weights = [1.0, 0.5, 2.0]
    each = (rewards - np.nanmean(rewards, 2, keepdims=True)) / (np.nanstd(rewards, 2, ddof=1, keepdims=True) + 1e-4)
    total = np.nansum(each * np.array(weights)[:, None, None], axis=0)
    total[3, 3] = np.nan
    expected = (total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4)
    advantages = combined_advantages(rewards, weights)
    np.testing.assert_allclose(advantages, np.nan_to_num(expected), atol=1e-12)
    np.testing.assert_allclose(combined_advantages(rewards * [[[1]], [[10]], [[1]]], weights), advantages, atol=1e-3)
    std = moments_std(combine_moments([moments(weighted_advantages(rewards[:, i : i + 1], weights)) for i in range(5)]))
    np.testing.assert_allclose(
        combined_advantages(rewards[:, 2:3], weights, batch_std=std), advantages[2:3], atol=1e-12
    )


def test_groups_may_be_of_unequal_sizes():
    groups = [[1.0, 2.0, 6.0], [3.0], [], [0.0, 1.0]]
    padded = np.array([group + [np.nan] * (3 - len(group)) for group in groups])
    for scale in ("group", "none"):
        advantages = group_advantages(padded, scale)
        assert advantages.shape == (4, 3)
        for group, row in zip(groups, advantages, strict=True):
            alone = group_advantages(np.array([group]), scale)[0] if group else np.zeros(0)
            np.testing.assert_array_equal(row[: len(group)], alone)
            assert (row[len(group) :] == 0).all()
    assert has_signal(padded).tolist() == [True, False, False, True]


@given(st.permutations(range(5)), st.sampled_from(SCALES), st.sampled_from(BASELINES))
@settings(deadline=None)
def test_advantages_move_with_their_completions(order, scale, baseline):
    rewards = np.array([[0.1, 2.0, np.nan, 0.7, 0.4], [1.0, 0.0, 0.0, 1.0, 5.0]])
    shuffled = group_advantages(rewards[:, order], scale, baseline)
    np.testing.assert_allclose(shuffled, group_advantages(rewards, scale, baseline)[:, order], atol=1e-12)


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12))
@settings(deadline=None)
def test_a_step_takes_groups_with_signal_first_and_always_as_many(signal, count):
    if count > len(signal):
        with pytest.raises(ValueError, match="sample a reserve"):
            choose_groups(np.array(signal), count)
        return
    chosen = choose_groups(np.array(signal, dtype=bool), count)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert sum(signal[i] for i in chosen) == min(count, sum(signal))
    with_signal = [i for i in chosen if signal[i]]
    assert with_signal == [i for i, s in enumerate(signal) if s][: len(with_signal)]


def test_unknown_names_are_refused():
    rewards = np.zeros((2, 3))
    with pytest.raises(ValueError, match="group, batch or none"):
        group_advantages(rewards, "rank")
    with pytest.raises(ValueError, match="mean or leave_one_out"):
        group_advantages(rewards, baseline="median")
    with pytest.raises(ValueError, match="K weights"):
        combined_advantages(np.zeros((2, 3, 4)), [1.0])


@pytest.mark.parametrize("scale", SCALES)
def test_a_spread_of_rounding_is_no_signal(scale):
    """Of the group's largest |reward| and not of 1: rewards of 1e-9 may differ, and so may those of 1e9."""
    mean = np.mean([0.6, 0.7, 0.72])
    rewards = np.array([[mean, mean + 1e-16, mean * (1 + 5e-7)], [mean, mean, mean * (1 + 2e-6)]])
    for factor in (1e-9, -1.0, 1e9):
        assert has_signal(rewards * factor).tolist() == [False, True]
        advantages = group_advantages(rewards * factor, scale)
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all()
    assert has_signal(np.array([[0.0, 1e-12], [0.0, 0.0], [-1e-12, 1e-12]])).tolist() == [True, False, True]
