"""Accuracy is the wheel's F of the answer alone."""

import numpy as np
import pytest

from affectgpt.rewards import AccuracyReward
from tests.affectgpt.answers import WHEEL, group


def test_accuracy_is_the_mean_f_over_wheels_of_every_completion():
    groups = [group("[happy, sad]", "happy, sad", "happy", "angry"), group("[angry]", "sad", "angry", "zorp")]
    values = AccuracyReward(WHEEL)(groups)
    truth, answers = ["[happy, sad]"] * 3 + ["[angry]"] * 3, ["happy, sad", "happy", "angry", "sad", "angry", "zorp"]
    expected = WHEEL.score(truth, answers).mean("skip").reshape(2, 3)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-15)
    assert values[0].tolist() == pytest.approx([1.0, 2 / 3, 0.0])
    assert values[1].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_accuracy_cannot_judge_a_sample_that_is_on_no_wheel():
    assert np.isnan(AccuracyReward(WHEEL)([group("[neutral]", "happy", "neutral")])).all()


def test_in_think_mode_only_the_answer_counts():
    text = "<think> he smiles, so not angry </think> <answer> happy </answer>"
    values = AccuracyReward(WHEEL, mode="think")([group("[happy]", text, "happy", text.replace("</answer>", ""))])
    assert values.tolist() == [[1.0, 0.0, 0.0]]
