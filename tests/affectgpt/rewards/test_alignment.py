"""Alignment of thinking and answer, and the dual reward."""

import numpy as np
import pytest

from affectgpt.rewards import (
    AlignmentReward,
    DualReward,
)
from tests.affectgpt.answers import WHEEL, group, think


def test_alignment_is_the_mean_jaccard_of_clusters():
    """`happy, sad` against `happy`: two clusters to one on each wheel."""
    texts = [
        think("he is happy but sad", "happy"),
        think("joyful", "happy"),
        think("angry", "happy"),
        think("he smiles at nothing in particular today", ""),
        "happy",
        think("he is happy", "zorp"),
    ]
    values = AlignmentReward(WHEEL)([group("[angry]", *texts)])[0]
    assert values.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0, 0.0]
    binary = AlignmentReward(WHEEL, "threshold")([group("[angry]", *texts)])[0]
    assert binary.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert AlignmentReward(WHEEL, "threshold", threshold=0.7)([group("[angry]", *texts)])[0, 0] == 0  # F is 2/3


def test_alignment_over_wheels_that_neither_side_is_on():
    on = np.mean([c is not None for c in WHEEL.clusters("surprised")])
    assert on < 1
    groups = [group("[x]", think("surprised", "surprised"))]
    assert AlignmentReward(WHEEL)(groups).item() == 1
    assert AlignmentReward(WHEEL, unscored="zero")(groups).item() == pytest.approx(on)


def test_dual_is_the_f_of_the_thinkings_words():
    texts = [think("he beams, happy and a little sad", "angry"), "<think>joyful", "happy", think("a man", "happy")]
    values = DualReward(WHEEL)([group("[happy]", *texts), group("[neutral]", *texts)])
    expected = WHEEL.score(["[happy]"], ["happy, sad"]).mean("skip")[0]
    assert values[0].tolist() == [expected, 0.0, 0.0, 0.0]
    assert np.isnan(values[1]).all()
