"""Length penalties: the published table, and what naming every word brings."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.emotion_wheel import parse_labels
from affectgpt.rewards import (
    AccuracyReward,
    DualReward,
    LengthPenalty,
)
from tests.affectgpt.answers import WHEEL, group, think


@pytest.mark.parametrize(
    ("true", "predicted", "p1", "p2", "p3"),
    [
        (2, 3, 0.5, 0.6667, 0.6309),
        (2, 4, 0.3333, 0.5, 0.5),
        (3, 6, 0.25, 0.5, 0.6131),
        (1, 2, 0.5, 0.5, 0.0),
        (4, 5, 0.5, 0.8, 0.8614),
        (3, 3, 1, 1, 1),
        (3, 1, 1, 1, 1),
        (3, 0, 1, 1, 1),
    ],
)
def test_length_penalties_of_the_table(true, predicted, p1, p2, p3):
    for kind, expected in (("P1", p1), ("P2", p2), ("P3", p3)):
        value = LengthPenalty(kind, "as_written")(np.array([predicted]), np.array([true]))
        assert value[0] == pytest.approx(expected, abs=5e-5)


def test_the_repairs_of_p3_for_one_label():
    one, two = np.array([2, 3, 9]), np.array([2, 3, 9])
    single = lambda name, true: LengthPenalty("P3", name)(one, np.full(3, true))  # noqa: E731
    assert single("as_written", 1).tolist() == [0, 0, 0]
    np.testing.assert_allclose(single("shift_single", 1), math.log(2) / np.log(one + 1))
    assert single("shift_single", 1)[0] == pytest.approx(0.6309, abs=5e-5)
    np.testing.assert_array_equal(single("shift", 1), single("shift_single", 1))
    np.testing.assert_allclose(single("inverse_log", 1), [1.0, 1 / math.log(3), 1 / math.log(9)])
    np.testing.assert_allclose(single("shift", 2)[1:], math.log(3) / np.log(two[1:] + 1))
    for name in ("as_written", "shift_single", "inverse_log"):
        np.testing.assert_allclose(single(name, 2)[1:], math.log(2) / np.log(two[1:]))


@given(st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_penalties_are_factors_that_fall_with_every_further_label(predicted, true):
    for kind in ("P1", "P2", "P3"):
        for single in ("as_written", "shift_single", "shift", "inverse_log"):
            now, more = LengthPenalty(kind, single)(np.array([predicted, predicted + 1]), np.array([true, true]))
            assert 0 <= more <= now <= 1
            assert now == 1 or predicted > true


def test_a_penalty_multiplies_accuracy_and_dual_and_counts_different_words():
    groups = [
        group("[happy, Happy]", think("happy, sad and worried, sad", "happy, joyful, Happy."), think("x", "happy"))
    ]
    answer = AccuracyReward(WHEEL, "think", penalty=LengthPenalty("P2"))(groups)
    assert answer.tolist() == [[0.5, 1.0]]  # one true label, two different predicted ones
    thinking = DualReward(WHEEL, penalty=LengthPenalty("P2"))(groups)
    plain = DualReward(WHEEL)(groups)
    assert plain[0, 0] == pytest.approx(0.5, abs=0.15)
    assert thinking.tolist() == [[plain[0, 0] / 3, 0.0]]


def words_of_every_sector() -> list[str]:
    """As few words as a greedy search needs to be in every level-1 sector of every wheel."""
    clusters, base = WHEEL.tables.clusters[0], np.flatnonzero(WHEEL.tables.base)
    missing = {(w, c) for w in range(len(WHEEL.names)) for c in range(len(WHEEL.sectors(w)))}
    chosen = []
    while missing:
        reached = {f: {(w, int(c)) for w, c in enumerate(clusters[:, f])} & missing for f in base}
        best = max(base, key=lambda f: len(reached[f]))
        chosen.append(WHEEL.tables.words[best])
        missing -= reached[best]
    return chosen


def test_naming_a_word_of_every_sector_pays_less_than_a_correct_short_answer():
    """Recall is then 1: what stands against it is precision, and with a penalty the count."""
    everything = ", ".join(words_of_every_sector())
    print("\nground truth            penalty  every sector  first label  all labels")
    for labels in ("[happy]", "[sad, hurt]", "[angry, worried, tense]"):
        true = parse_labels(labels)
        groups = [group(labels, everything, true[0], ", ".join(true))]
        np.testing.assert_array_equal(WHEEL.score([labels], [everything]).recall, 1)
        values = {
            kind: AccuracyReward(WHEEL, penalty=LengthPenalty(kind))(groups)[0] for kind in ("none", "P1", "P2", "P3")
        }
        for kind, (listed, short, whole) in values.items():
            print(f"{labels:24}{kind:9}{listed:12.3f}{short:13.3f}{whole:12.3f}")
            assert whole == 1
            assert short == values["none"][1]
            assert listed < (short if kind == "none" else short / 2)
        assert values["none"][0] > 0.25  # without a penalty, the list earns this whatever the clip shows
        assert values["P1"][0] <= values["P2"][0] < values["P3"][0] < 0.6 * values["none"][0]
