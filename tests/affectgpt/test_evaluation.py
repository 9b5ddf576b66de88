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


def test_a_label_is_shown_once(tmp_path):
    evaluation = score_answers(WHEEL, [sample("a", "[happy]")], ["[joyful, Joyful, joyful]"], name="x", split="test")
    assert evaluation.samples[0].labels == ["joyful"]


def test_the_table_says_of_how_many_samples_it_is(tmp_path):
    evaluation = score_answers(WHEEL, [sample("a", "[happy]")], ["joyful"], name="x", split="test")
    assert evaluation.table().startswith("x on 1 samples, level 1")
    evaluation = score_answers(WHEEL, [sample("a", "[happy]")], ["joyful"], name="x", split="test", total=2610)
    assert evaluation.table().startswith("x on 1 of 2,610 samples (0.0 %), level 1")
    assert json.loads(evaluation.save(tmp_path).read_text())["total"] == 2610


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("-1.6", "has the label '-1.6', a number and not an emotion"),
        ("[zorp]", "no label of the test set is on an emotion"),
    ],
)
def test_labels_that_no_wheel_can_score_are_refused_instead_of_scored_0(labels, words):
    with pytest.raises(ValueError, match=words):
        score_answers(WHEEL, [sample("a", labels), sample("b", labels)], ["happy", "sad"], name="x", split="test")
