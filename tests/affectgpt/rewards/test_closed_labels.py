"""Rewards of closed label sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.rewards import (
    HitRateReward,
    SentimentReward,
)
from affectgpt.rewards.closed_labels import hit_rates
from tests.affectgpt.answers import WHEEL, group

ORACLE = Path(__file__).resolve().parents[3].parent / "shared" / "emotion_wheel"


def test_a_hit_is_the_true_labels_cluster_among_the_answers():
    groups = [group("happy", "joyful, sad", "angry", "happy"), group("neutral", "neutral", "sad", "calm")]
    values = HitRateReward(WHEEL)(groups)
    assert values[0].tolist() == [1, 0, 1]
    assert np.isnan(values[1]).all()
    candidates = ("happy", "sad", "angry", "neutral")
    assert HitRateReward(WHEEL, candidates=candidates)(groups)[0].tolist() == [0.5, 0, 1]
    with pytest.raises(ValueError, match="has 2 labels"):
        HitRateReward(WHEEL)([group("[happy, sad]", "happy")])


@pytest.mark.skipif(not (ORACLE / "oracle").is_dir(), reason="the published tables are not here")
def test_hit_rates_are_the_published_codes():
    wheel = EmotionWheel.from_published(ORACLE / "mer2025")
    for case in json.loads((ORACLE / "oracle" / "cases.json").read_text(encoding="utf-8"))["hitrate_cases"]:
        truth, guesses = list(case["gt"].values()), [case["pred"][name] for name in case["gt"]]
        for key, candidates in (("hitrate", ()), ("mscore", tuple(dict.fromkeys(truth)))):
            rates = np.nanmean(hit_rates(wheel, truth, guesses, candidates), axis=0)
            expected = [row[key] for row in case["expected"]["mer2025"]["wheels"]]
            np.testing.assert_allclose(rates, expected, atol=1e-12, err_msg=f"{case['name']} {key}")


@pytest.mark.parametrize(
    ("value", "texts", "expected"),
    [
        ("1.4", ["happy, proud", "sad", "neutral", "positive", "not zorp"], [1, 0, 0, 1, 0]),
        ("-0.2", ["happy, proud", "sad", "neutral", "negative", "joyful, angry, worried"], [0, 1, 1, 1, 1]),
        ("positive", ["joyful", "[angry]"], [1, 0]),
    ],
)
def test_sentiment_is_positive_or_not(value, texts, expected):
    assert SentimentReward(WHEEL)([group(value, *texts)])[0].tolist() == expected


def test_a_neutral_sentiment_cannot_be_judged_and_other_labels_are_refused():
    assert np.isnan(SentimentReward(WHEEL)([group("0.0", "happy"), group("neutral", "happy")])).all()
    with pytest.raises(ValueError, match="needs a number"):
        SentimentReward(WHEEL)([group("[happy]", "happy")])
