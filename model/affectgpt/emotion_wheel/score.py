"""Score label sets on emotion wheels: a set is a bit mask per wheel, an overlap a popcount, a batch one expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np

from affectgpt.emotion_wheel.parse import MARK, PARSERS, LabelText, as_text, clean_token, split_batch
from affectgpt.emotion_wheel.tables import LEVELS, Tables, load_tables, read_published

DEFAULT_TABLES = Path(__file__).parent / "data" / "tables.npz"
CHUNK = 2048  # texts looked up at once: their tokens and masks stay in the processor's cache


@dataclass(frozen=True)
class Scores:
    """Scores of N pairs on W wheels, each float64 [N, W] in 0..1; NaN where the ground truth is not on the wheel."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    def mean(self, unscored: str = "zero", of: str = "f1") -> np.ndarray:
        """Average over wheels, float64 [N].

        ``unscored="zero"`` divides by the number of all wheels, so there is no NaN; ``"skip"`` averages the scored
        ones, and is NaN if there are none. ``of`` names precision, recall or f1.
        """
        values = getattr(self, of)
        scored = ~np.isnan(values)
        total = np.where(scored, values, 0.0).sum(axis=1)
        if unscored == "zero":
            return total / values.shape[1]
        if unscored == "skip":
            with np.errstate(invalid="ignore"):
                return total / scored.sum(axis=1)
        raise ValueError(f"unscored={unscored!r}: choose zero or skip")


@dataclass(frozen=True)
class CorpusScore:
    """Scores of a corpus, 0..1: means over wheels, and per wheel (float64 [W]); ``scored`` counts pairs per wheel.

    Per wheel, precision and recall are means over the scored pairs and F is 2PR/(P+R) of these means. A wheel without
    scored pairs, or without a match, counts as 0 (the first published code gives NaN there, the later one 0).
    """

    f1: float
    precision: float
    recall: float
    per_wheel_f1: np.ndarray
    per_wheel_precision: np.ndarray
    per_wheel_recall: np.ndarray
    scored: np.ndarray


class EmotionWheel:
    """Scorer of label strings; `default()` uses the project's tables, `from_published` those of a folder."""

    def __init__(self, tables: Tables):
        self.tables = tables
        blank = np.zeros((2, len(tables.names)), np.uint64)  # rows of an unknown word and of a mark
        self._unknown = len(tables.words)
        self._mark = self._unknown + 1
        self._bits = []  # per level uint64 [F + 2, W]: a form's cluster as one bit
        for clusters in tables.clusters:
            bits = np.left_shift(np.uint64(1), np.maximum(clusters, 0).astype(np.uint64)) * (clusters >= 0)
            self._bits.append(np.concatenate([bits.T.astype(np.uint64), blank]))
        self._vocabularies: dict[str, _Vocabulary] = {}

    @classmethod
    @cache
    def default(cls) -> EmotionWheel:
        """Return the wheel on the tables that come with the project."""
        return cls(load_tables(DEFAULT_TABLES))

    @classmethod
    def from_published(cls, folder: str | Path) -> EmotionWheel:
        """Make a wheel of a folder like that of MER2025: ``wheel*.xlsx``, ``format.csv``, ``synonym.xlsx``."""
        return cls(read_published(folder))

    # --- what is on the wheels ---------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the wheels."""
        return self.tables.names

    def sectors(self, wheel: int, level: int = 1) -> tuple[str, ...]:
        """Return the cluster names of a wheel in drawing order; level 2 follows the order of level 1."""
        return self.tables.sectors[_level(level)][wheel]

    def clusters(self, label: str, level: int = 1) -> tuple[str | None, ...]:
        """Return the cluster name of a label on each wheel, None on wheels without it."""
        form = self._vocabulary("strict")[label.lower()]
        if form >= self._unknown:
            return (None,) * len(self.names)
        indices = self.tables.clusters[_level(level), :, form]
        return tuple(self.sectors(w, level)[i] if i >= 0 else None for w, i in enumerate(indices))

    def words(self, wheel: int, cluster: str, level: int = 1, *, base: bool = True) -> tuple[str, ...]:
        """List the words of a cluster, sorted: dictionary words, or with ``base=False`` all inflected forms too."""
        chosen = self.tables.clusters[_level(level), wheel] == self.sectors(wheel, level).index(cluster)
        if base:
            chosen = chosen & self.tables.base
        return tuple(self.tables.words[i] for i in np.flatnonzero(chosen))

    def members(self, level: int = 1, *, base: bool = True) -> Iterator[tuple[int, str, tuple[str, ...]]]:
        """Iterate over all clusters as (wheel index, cluster name, words), in drawing order."""
        for wheel in range(len(self.names)):
            for cluster in self.sectors(wheel, level):
                yield wheel, cluster, self.words(wheel, cluster, level, base=base)

    # --- scores --------------------------------------------------------------------------------------------------

    def masks(self, texts: Sequence[LabelText], level: int = 1, parse: str = "strict") -> np.ndarray:
        """Compute masks, uint64 [N, W]: bit c is set if one of the text's labels is in cluster c of the wheel."""
        bits, vocabulary = self._bits[_level(level)], self._vocabulary(parse)
        # one pass over the types is much cheaper than a call for each text, and most batches are strings already
        plain = set(map(type, texts)) == {str}
        strings = cast("Sequence[str]", texts) if plain else [as_text(text, parse) for text in texts]
        masks = np.empty((len(strings), bits.shape[1]), np.uint64)
        for start in range(0, len(strings), CHUNK):
            chunk = strings[start : start + CHUNK]
            row_of = dict.fromkeys(chunk)
            repeated = 2 * len(row_of) < len(chunk)  # a group's members share their ground truth: parse it once
            tokens = split_batch(list(row_of) if repeated else chunk, parse)
            forms = np.fromiter(map(vocabulary.__getitem__, tokens), np.int32, len(tokens))
            # a text's tokens run from its mark to the next, so that no segment is empty
            begins = np.flatnonzero(forms == self._mark)[:-1]
            found = np.bitwise_or.reduceat(bits.take(forms, axis=0), begins, axis=0)
            if repeated:
                place = dict(zip(row_of, range(len(row_of)), strict=True))
                found = found[np.fromiter(map(place.__getitem__, chunk), np.intp, len(chunk))]
            masks[start : start + len(chunk)] = found
        return masks

    def score(
        self,
        ground_truth: Sequence[LabelText],
        prediction: Sequence[LabelText],
        level: int = 1,
        parse: str = "strict",
    ) -> Scores:
        """Score N predictions against N ground truths on every wheel.

        Clusters G of the ground truth and P of the prediction: precision |G∩P| / |P| (0 for empty P), recall
        |G∩P| / |G|, F 2PR / (P+R) (0 where both are 0). Labels on no wheel are ignored; with G empty the wheel is not
        scored.
        ``parse`` reads the predictions; ground truth is always read strictly.
        """
        if len(ground_truth) != len(prediction):
            raise ValueError(f"{len(ground_truth)} ground truths but {len(prediction)} predictions")
        truth = self.masks(ground_truth, level)
        guess = self.masks(prediction, level, parse)
        common = np.bitwise_count(truth & guess).astype(np.float64)
        size_truth, size_guess = np.bitwise_count(truth), np.bitwise_count(guess)
        with np.errstate(invalid="ignore"):  # 0 / 0, where the wheel is not scored
            recall = common / size_truth
        precision = common / np.maximum(size_guess, 1)
        precision[size_truth == 0] = np.nan
        f1 = _harmonic(precision, recall)
        return Scores(precision, recall, f1)

    def corpus(
        self,
        ground_truth: Sequence[LabelText],
        prediction: Sequence[LabelText],
        level: int = 1,
        parse: str = "strict",
    ) -> CorpusScore:
        """Score a corpus: see `CorpusScore`. Arguments as for `score`."""
        scores = self.score(ground_truth, prediction, level, parse)
        scored = (~np.isnan(scores.recall)).sum(axis=0)
        precision = np.nansum(scores.precision, axis=0) / np.maximum(scored, 1)
        recall = np.nansum(scores.recall, axis=0) / np.maximum(scored, 1)
        f1 = _harmonic(precision, recall)
        return CorpusScore(
            float(f1.mean()), float(precision.mean()), float(recall.mean()), f1, precision, recall, scored
        )

    def _vocabulary(self, parser: str) -> _Vocabulary:
        if parser not in PARSERS:
            raise ValueError(f"parser {parser!r}: choose one of {', '.join(PARSERS)}")
        if parser not in self._vocabularies:
            self._vocabularies[parser] = _Vocabulary(self.tables.words, parser, self._unknown, self._mark)
        return self._vocabularies[parser]


class _Vocabulary(dict[str, int]):
    """Raw token → index of its word form, in one look-up as it stands; only a token that is none is cleaned first."""

    def __init__(self, words: Sequence[str], parser: str, unknown: int, mark: int):
        super().__init__()
        self._unknown = unknown
        self._clean = str.strip if parser == "strict" else clean_token
        self._forms = {word: i for i, word in enumerate(words)}
        # ’ and ' are one apostrophe; strict strings cannot hold the straight one, which separates there
        self._forms |= {word.replace("’", "'"): i for word, i in self._forms.items() if "’" in word}
        for word, i in self._forms.items():
            if self._clean(word) == word:
                self[word] = i
        self[""], self[MARK] = unknown, mark

    def __missing__(self, token: str) -> int:
        return self._forms.get(self._clean(token), self._unknown)


def _level(level: int) -> int:
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: choose 1 or 2")
    return level - 1


def _harmonic(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """2PR / (P + R), 0 where both are 0, NaN where either is."""
    total = precision + recall
    return 2 * precision * recall / np.where(total == 0, 1.0, total)
