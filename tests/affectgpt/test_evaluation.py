"""Evaluation is the corpus metric of the answers."""

import json

import pytest

from affectgpt.evaluation import score_answers
from tests.affectgpt.answers import WHEEL, sample


def test_evaluation_is_the_corpus_metric(tmp_path):
    samples = [sample("a", "[happy]"), sample("b", "[sad, angry]"), sample("c", "[neutral]")]
    answers = ["joyful.", "sad; furious", "happy"]
    evaluation = score_answers(WHEEL, samples, answers, name="x", split="test")
    corpus = WHEEL.corpus([s.labels for s in samples], ["joyful", "sad, furious", "happy"])
    assert evaluation.f1 == corpus.f1
    assert evaluation.scored == corpus.scored.tolist()
    assert [row.labels for row in evaluation.samples] == [["joyful"], ["sad", "furious"], ["happy"]]
    written = json.loads(evaluation.save(tmp_path).read_text())
    assert written["f1"] == corpus.f1
    assert written["samples"][2]["f1"] is None


def test_an_unlabelled_sample_cannot_be_evaluated():
    with pytest.raises(ValueError, match="sample 'a' of the test set has no labels"):
        score_answers(WHEEL, [sample("a", None)], ["happy"], name="x", split="test")
