"""Find emotion words in free text: in one pass, the longest form of the wheel's tables at each position."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from affectgpt.emotion_wheel import EmotionWheel

Lemmas = Callable[[str], Iterable[str]]

# A form may continue over blanks and hyphens; any other mark is a token that matches no form, and so ends one.
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s'-]")
_APOSTROPHES = str.maketrans("’ʼ‘", "'''")

# Forms that name a feeling as a label, but in prose describe a face, a voice or a scene, or mean nothing.
_DESCRIBING = """
act aid aim arch art attitude bar bare base bash bit black blue bond boot born brain break bright cast character cheek
clear close cold color content cool cover cross cut dark dead deep direct down draw drive edge emotion emotional express
expression face facial fade fail fair fall far fast feel feeling firm fix flat flood fly focus force forward free full
gentle get give go hard heart heavy help high hold impression intense intent key kick kill kind lack large leave level
light like link list little live lock long look loose low lower main make mean might mild mind minor miss mood move need
nose note open pale person plain play point present press question quick quiet raise rapid reach reaction ready real
reflect response rest rich right rise root rough row salt see seem sense shake sharp shift short show sign slow small
smart soft sound speak spend start state steady step still stop strong sure tall tell test text thick thin think tight
tighten tilt tone trial true try turn use view voice wait walk want watch wear wide wild wire word work
"""
_IRREGULAR = """
felt got gotten went gone goes saw seen made held left meant spoke spoken spent stood thought threw thrown told took
taken tried tries used wore worn drew drawn drove driven broke broken fell fallen gave given kept knew known rose risen
shown understood in out up on off here fewer less least most even evenly slightly gently
"""


def _inflected(word: str) -> tuple[str, ...]:
    stem = word.removesuffix("e")
    return word, f"{word}s", f"{word}es", f"{stem}ed", f"{stem}ing", f"{stem}er", f"{word}ly", f"{word}{word[-1]}ing"


PROSE = frozenset(form for word in _DESCRIBING.split() for form in _inflected(word)) | {*_IRREGULAR.split(), "at work"}
"""Forms that do not count in free text, though the tables have them."""


class EmotionWords:
    """Finds the forms of a wheel's tables in free text.

    A form of several words is found whatever blanks or hyphens join them. Negation is not understood: "not angry"
    holds *angry*.

    Args:
        wheel: the emotion tables.
        lemmas: gives base forms to try, in order, for a word that the tables lack; see `wordnet_lemmas`. Without it,
            only forms in the tables are found (which hold inflected forms).
    """

    def __init__(self, wheel: EmotionWheel, lemmas: Lemmas | None = None):
        self._lemmas = lemmas
        self._by_first: dict[str, list[tuple[list[str], str]]] = {}
        self._other: dict[str, str | None] = {}  # words that the tables lack, with the form found for them
        for form in wheel.tables.words:
            tokens = _tokens(form)
            if tokens and "," not in form and " ".join(tokens) not in PROSE:
                self._by_first.setdefault(tokens[0], []).append((tokens, form))
        # by first word, longest first: `find` takes the first that matches
        for candidates in self._by_first.values():
            candidates.sort(key=lambda candidate: -len(candidate[0]))

    def find(self, text: str) -> list[str]:
        """Find the forms of a text in order, as the tables spell them; one that appears twice is listed twice."""
        tokens, found, i = _tokens(text), [], 0
        while i < len(tokens):
            for form_tokens, form in self._by_first.get(tokens[i], ()):
                if tokens[i : i + len(form_tokens)] == form_tokens:
                    found.append(form)
                    i += len(form_tokens)
                    break
            else:
                derived = self._derived(tokens[i])
                if derived is not None:
                    found.append(derived)
                i += 1
        return found

    def _derived(self, token: str) -> str | None:
        """Look up a word that is not in the tables: without a possessive 's, or by one of its lemmas."""
        if token not in self._other:
            candidates = [token.removesuffix("'s")] if token.endswith("'s") else []
            if self._lemmas is not None and token not in PROSE and token.isalpha():
                candidates += self._lemmas(token)
            self._other[token] = next(
                (form for word in candidates for tokens, form in self._by_first.get(word, ()) if tokens == [word]), None
            )
        return self._other[token]


def wordnet_lemmas(folder: Path) -> Lemmas:
    """Make a function that gives a word's base forms by WordNet's morphology (nltk's morphy), in all word classes.

    Args:
        folder: a WordNet 3.0 database folder, as Debian's wordnet-base installs in /usr/share/wordnet.

    Raises:
        TablesError: the folder lacks a file.
    """
    from affectgpt.emotion_wheel.build import open_wordnet  # here, because it imports nltk

    reader = open_wordnet(folder)

    def lemmas(word: str) -> list[str]:
        bases = (reader.morphy(word, word_class) for word_class in "nvar")  # noun, verb, adjective, adverb
        return list(dict.fromkeys(base for base in bases if base))

    return lemmas


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower().translate(_APOSTROPHES))
