"""Emotion words in free text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.rewards import (
    EmotionWords,
    wordnet_lemmas,
)
from tests.affectgpt.answers import WHEEL

WORDS = EmotionWords(WHEEL)


WORDNET = Path("/usr/share/wordnet")


def test_words_are_found_in_one_pass_longest_first():
    assert WORDS.find("She is let down, and Happily SO; bad-tempered?") == ["let down", "happily", "bad-tempered"]
    assert WORDS.find("let, down") == []  # a comma ends a form
    assert WORDS.find("self conscious, don't care, the man's anger’s cause") == [
        "self-conscious",
        "don’t care",
        "anger",
    ]
    assert WORDS.find("sad, sad") == ["sad", "sad"]
    assert WORDS.find("unsaddled madness5 joy_ful") == ["joy"]


def test_prose_about_faces_and_voices_holds_no_emotion():
    text = "In the video, he looks down and speaks slightly faster in a low tone; his arms crossed, his lips pressed."
    assert WORDS.find(text) == []
    assert WHEEL.tables.index.keys() >= {"in", "looks", "down", "low"}  # though these are forms


@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="WordNet is not installed")
def test_with_wordnet_forms_that_the_tables_lack_are_found_by_their_lemma():
    lemmas = wordnet_lemmas(WORDNET)
    with_lemmas = EmotionWords(WHEEL, lemmas)
    lacking = [w for w in ("dreadings", "miserablest", "rejoicings", "frighteningest") if w not in WHEEL.tables.index]
    derived = [w for w in lacking if any(lemma in WHEEL.tables.index for lemma in lemmas(w))]
    assert derived
    for word in derived:
        assert WORDS.find(word) == []
        assert with_lemmas.find(word)[0] in lemmas(word)
    assert with_lemmas.find("the person looks") == []


@given(st.lists(st.sampled_from(WHEEL.tables.words), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_found_words_are_forms_and_finding_again_gives_the_same(words):
    found = WORDS.find(", ".join(words))
    assert set(found) <= set(WHEEL.tables.words)
    assert WORDS.find(", ".join(found)) == found
