"""The built-in rewards by name, and what holds for all of them."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.emotion_wheel import parse_labels
from affectgpt.rewards import (
    REWARDS,
    AlignmentReward,
    FormatReward,
    HitRateReward,
    LengthPenalty,
    RewardConfig,
    make_rewards,
    register_reward,
)
from tests.affectgpt.answers import WHEEL, Ranking, answers, group, texts


@cache
def all_rewards(penalty: str):
    def longer(comparisons):
        return np.array([0.5 + 0.5 * np.sign(len(c.first) - len(c.second)) for c in comparisons])

    names = [name for name in REWARDS if name not in ("hit_rate", "sentiment")]
    config = RewardConfig(length_penalty=penalty)
    return make_rewards(names, WHEEL, "think", config, max_length=20, judge=longer)


@given(
    st.lists(st.tuples(texts, st.lists(answers, min_size=3, max_size=3)), min_size=1, max_size=3),
    st.permutations(range(3)),
    st.sampled_from(("none", "P1", "P2", "P3")),
)
@settings(max_examples=40, deadline=None)
def test_rewards_are_bounded_and_move_with_their_completions(rows, order, penalty):
    groups = [group(truth, *members) for truth, members in rows]
    shuffled = [group(truth, *(members[i] for i in order)) for truth, members in rows]
    for reward in all_rewards(penalty):
        values = reward(groups)
        low, high = (-1, 0) if reward.name in ("overlong", "repetition") else (0, 1)
        assert values.shape == (len(rows), 3)
        assert ((values >= low) & (values <= high) | np.isnan(values)).all()
        np.testing.assert_array_equal(reward(shuffled), values[:, order])
        alone = np.concatenate([reward([g]) for g in groups])
        np.testing.assert_array_equal(alone, values)  # the other groups of the step do not matter


@given(texts | answers)
@settings(deadline=None)
def test_reading_labels_again_gives_the_same(text):
    once = parse_labels(text, "tolerant")
    assert parse_labels(", ".join(once), "tolerant") == once


# --- by name -----------------------------------------------------------------------------------------------------


def test_rewards_by_name():
    judge = Ranking()
    rewards = make_rewards(list(REWARDS), WHEEL, "think", RewardConfig(), max_length=64, judge=judge)
    assert [reward.name for reward in rewards] == list(REWARDS)
    with pytest.raises(
        ValueError,
        match=r"reward.names has 'speed', which is not a reward: .*accuracy, .*alignment, .*or name one by import path",
    ):
        make_rewards(["speed"], WHEEL, "think", RewardConfig(), max_length=64)
    for name in ("format", "alignment", "dual"):
        with pytest.raises(ValueError, match=r"set prompt\.mode to think"):
            make_rewards([name], WHEEL, "no_think", RewardConfig(), max_length=64)
    with pytest.raises(ValueError, match="named twice"):
        make_rewards(["accuracy", "accuracy"], WHEEL, "think", RewardConfig(), max_length=64)
    with pytest.raises(ValueError, match=r"reward\.overlong_cache is 16 tokens of 8"):
        make_rewards(["overlong"], WHEEL, "think", RewardConfig(), max_length=8)


def test_your_own_rewards_stand_beside_the_built_in_ones(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def accuracy(completion): return 0\n"
        "def hits(completions, labels, **kwargs): return [float(c in t) for c, t in zip(completions, labels)]\n"
    )
    mine = f"{tmp_path}/mine.py"
    built_in, hits = make_rewards(["accuracy", f"{mine}:hits"], WHEEL, "no_think", RewardConfig(), max_length=8)
    assert (built_in.name, hits.name) == ("accuracy", "hits")
    assert hits([group("[happy, proud]", "proud", "sad")]).values.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"rewards accuracy and .*mine\.py:accuracy are both called 'accuracy'"):
        make_rewards(["accuracy", f"{mine}:accuracy"], WHEEL, "no_think", RewardConfig(), max_length=8)


def test_a_class_registers_itself_and_says_what_it_needs():
    needs = {"think": {"format", "alignment", "dual"}, "judge": {"perception"}}
    for need, names in needs.items():
        assert {name for name in REWARDS if REWARDS[name].needs == need} == names
    assert all(REWARDS[name].name == name and REWARDS.doc(name) for name in REWARDS)
    with pytest.raises(ValueError, match="'format' is registered already"):
        register_reward("format")(FormatReward)
    with pytest.raises(ValueError, match="give int a classmethod from_config"):
        register_reward("new")(int)


def test_unknown_options_list_the_valid_ones():
    for make, choices in (
        (lambda: LengthPenalty("P4"), "none, P1, P2, P3"),
        (lambda: LengthPenalty("P3", "max"), "as_written, shift_single, shift, inverse_log"),
        (lambda: FormatReward("strict"), "full, prefix or tolerant"),
        (lambda: AlignmentReward(WHEEL, "dice"), "jaccard or threshold"),
        (lambda: AlignmentReward(WHEEL, unscored="one"), "zero or skip"),
        (lambda: HitRateReward(WHEEL, unscored="one"), "zero or skip"),
        (lambda: RewardConfig(alignment_threshold=2.0), "at most 1"),
    ):
        with pytest.raises(ValueError, match=choices):
            make()
