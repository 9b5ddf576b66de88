"""Compare models with the ground truth and with each other: sector counts, intervals, and which clips to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from affectgpt.stages import COLD_START

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel

LEVEL = 1  # of the sectors that are drawn; level 2 has too many to tell apart


@dataclass
class SectorCounts:
    """Counts of clips by sector of one wheel, over the clips whose ground truth is on that wheel.

    Attributes:
        sectors: names in drawing order, S of them.
        scored: number of clips counted.
        truth: int `[S]`, clips whose ground truth names the sector.
        named: per model int `[S]`, clips for which the model names the sector.
        hits: per model int `[S]`, clips for which both do; hits / named is the sector's precision, hits / truth its
            recall.
    """

    sectors: list[str]
    scored: int
    truth: np.ndarray
    named: dict[str, np.ndarray] = field(default_factory=dict)
    hits: dict[str, np.ndarray] = field(default_factory=dict)


class SectorLookup:
    """Looks up the level-1 sectors of labels on every wheel, with a cache, since answers share most words."""

    def __init__(self, wheel: EmotionWheel) -> None:
        self._wheel = wheel
        self._words: dict[str, Sequence[str | None]] = {}
        self.count = len(wheel.names)

    def word(self, label: str) -> Sequence[str | None]:
        """Return the sector of a label on each wheel, None on a wheel that lacks it."""
        key = label.lower().strip()
        if key not in self._words:
            self._words[key] = self._wheel.clusters(key, LEVEL)
        return self._words[key]

    def sets(self, labels: Sequence[str]) -> list[set[str]]:
        """Return the sectors that labels name, one set per wheel."""
        words = [self.word(label) for label in labels]
        return [{sector for word in words if (sector := word[index]) is not None} for index in range(self.count)]

    def share(self, label: str, truth: list[set[str]]) -> float | None:
        """Compute the share of wheels with the label's sector in `truth`, of those that have both; None if none has."""
        meets = [
            sector in true for sector, true in zip(self.word(label), truth, strict=True) if sector is not None and true
        ]
        return sum(meets) / len(meets) if meets else None


def ground_truth_labels(text: Any) -> list[str]:
    """Split a label string of the dataset into labels, by the parser of the metric."""
    from affectgpt.emotion_wheel import distinct_labels

    return distinct_labels(text if isinstance(text, str) else "", "strict")


def sector_counts(evaluations: Mapping[str, Mapping[str, Any]], wheel: EmotionWheel) -> list[SectorCounts]:
    """Count clips by sector, one `SectorCounts` per wheel, over the clips that all of `evaluations` contain."""
    lookup = SectorLookup(wheel)
    names, by_model = aligned(evaluations)
    first = next(iter(by_model.values()))
    truth = [lookup.sets(ground_truth_labels(sample.get("ground_truth"))) for sample in first]
    answers = {
        model: [lookup.sets(sample.get("labels") or []) for sample in samples] for model, samples in by_model.items()
    }

    def count(sets: Sequence[set[str]], sectors: list[str]) -> np.ndarray:
        return np.array([sum(sector in members for members in sets) for sector in sectors], dtype=np.int64)

    result = []
    for index in range(lookup.count):
        sectors = list(wheel.sectors(index, LEVEL))
        kept = [clip for clip in range(len(names)) if truth[clip][index]]
        true = [truth[clip][index] for clip in kept]
        counts = SectorCounts(sectors, len(kept), count(true, sectors))
        for model, sets in answers.items():
            said = [sets[clip][index] for clip in kept]
            counts.named[model] = count(said, sectors)
            counts.hits[model] = count([a & b for a, b in zip(true, said, strict=True)], sectors)
        result.append(counts)
    return result


def aligned(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Mapping[str, Any]]]]:
    """Return the names of clips in all evaluations, in the first one's order, and the samples of each model."""
    tables = {model: _by_name(evaluation) for model, evaluation in evaluations.items()}
    first = next(iter(tables.values()), {})
    names = [name for name in first if all(name in table for table in tables.values())]
    return names, {model: [table[name] for name in names] for model, table in tables.items()}


def _by_name(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(sample.get("name")): sample for sample in evaluation.get("samples") or []}


@dataclass(frozen=True)
class Interval:
    """Corpus F in percent, recomputed from the answers, with a 95 % bootstrap interval over clips."""

    f1: float
    low: float
    high: float


def intervals(
    evaluations: Mapping[str, Mapping[str, Any]],
    wheel: EmotionWheel,
    level: int = 1,
    baseline: str = COLD_START,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Bootstrap the corpus F over clips; every model sees the same draws, so differences are paired.

    Models that answered other clips than `baseline` (if that is absent, than the first model) get no interval.

    Returns:
        Interval of each model, and of each model's difference to `baseline` (empty if that is absent).
    """
    clips_of = {model: frozenset(_by_name(evaluation)) for model, evaluation in evaluations.items()}
    compared = clips_of.get(baseline, next(iter(clips_of.values()), frozenset()))
    names, by_model = aligned({model: evaluations[model] for model in clips_of if clips_of[model] == compared})
    if not names:
        return {}, {}
    clips = len(names)
    rng = np.random.default_rng(seed)
    # How often each clip is drawn. Draw 0 is the corpus itself.
    weights: list[np.ndarray] = [np.ones(clips)]
    weights += [np.bincount(rng.integers(clips, size=clips), minlength=clips) for _ in range(draws)]
    f1 = {}
    for model, samples in by_model.items():
        scores = wheel.score(
            [sample.get("ground_truth") or "" for sample in samples],
            [list(map(str, sample.get("labels") or [])) for sample in samples],
            level=level,
            parse="tolerant",
        )
        scored = np.isfinite(scores.precision)
        precision, recall = (np.where(scored, values, 0.0) for values in (scores.precision, scores.recall))
        f1[model] = np.array([100 * _corpus_f1(w, precision, recall, scored) for w in weights])

    def interval(values: np.ndarray) -> Interval:
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return Interval(float(values[0]), float(low), float(high))

    differences = {}
    if baseline in f1:
        differences = {model: interval(values - f1[baseline]) for model, values in f1.items() if model != baseline}
    return {model: interval(values) for model, values in f1.items()}, differences


def _corpus_f1(weights: np.ndarray, precision: np.ndarray, recall: np.ndarray, scored: np.ndarray) -> float:
    """F as in `EmotionWheel.corpus`, with each of N clips counted `weights` `[N]` times; other arrays are `[N, W]`."""
    total = np.maximum(weights @ scored, 1.0)
    p, r = weights @ precision / total, weights @ recall / total
    return float((2 * p * r / np.where(p + r > 0, p + r, 1.0)).mean())


@dataclass(frozen=True)
class Pair:
    """One held-out clip before and after GRPO; `change` is after − before, in points of F."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.after.get("name"))

    @property
    def change(self) -> float:
        return float(self.after["f1"]) - float(self.before["f1"])


def pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Pair]:
    """Pair the clips that both evaluations contain and score."""
    _, by_model = aligned({"before": before, "after": after})
    both = [Pair(b, a) for b, a in zip(by_model["before"], by_model["after"], strict=True)]
    return [pair for pair in both if all(_scored(sample) for sample in (pair.before, pair.after))]


def choose(candidates: Sequence[Pair], count: int = 4) -> tuple[list[Pair], list[Pair]]:
    """Choose clips to show: the largest improvements, and failures (largest losses first, then the lowest F after).

    Ground truths differ if the set allows it. Ties are broken by name, so the choice depends on the answers alone.
    """
    gains = sorted((p for p in candidates if p.change > 0), key=lambda p: (-p.change, p.name))
    best = _spread(gains, count)
    shown = {pair.name for pair in best}
    rest = [p for p in candidates if p.name not in shown and (p.change < 0 or p.after["f1"] < 50)]
    losses = sorted(rest, key=lambda p: (min(p.change, 0.0), p.after["f1"], p.name))
    return best, _spread(losses, count)


def _spread(ranked: Sequence[Pair], count: int) -> list[Pair]:
    """Take the first `count` of distinct ground truth, filled up in rank order if there are too few."""
    distinct = {str(pair.after.get("ground_truth")): pair for pair in reversed(ranked)}
    picked = [pair for pair in ranked if distinct[str(pair.after.get("ground_truth"))] is pair][:count]
    picked += [pair for pair in ranked if pair not in picked][: count - len(picked)]
    return sorted(picked, key=ranked.index)


def _scored(sample: Mapping[str, Any]) -> bool:
    f1 = sample.get("f1")
    return isinstance(f1, (int, float)) and bool(np.isfinite(f1))


def follow(completions: Sequence[Mapping[str, Any]], count: int = 5) -> list[list[Mapping[str, Any]]]:
    """Choose groups of completions to show, in step order.

    The prompt sampled at most steps is followed through training if it was sampled three times; otherwise each step
    is represented by its group of median mean reward. Steps are spread evenly, first and last included.
    """
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in completions:
        groups.setdefault((float(row["step"]), str(row["prompt_id"])), []).append(row)
    visits: dict[str, int] = {}
    for _, prompt in groups:
        visits[prompt] = visits.get(prompt, 0) + 1
    most = min(visits, key=lambda prompt: (-visits[prompt], prompt), default="")
    if visits.get(most, 0) >= 3:
        chosen = [groups[key] for key in sorted(groups) if key[1] == most]
    else:
        steps: dict[float, list[tuple[float, str]]] = {}
        for key, rows in groups.items():
            steps.setdefault(key[0], []).append((mean_reward(rows), key[1]))
        chosen = [groups[step, sorted(ranked)[(len(ranked) - 1) // 2][1]] for step, ranked in sorted(steps.items())]
    index = np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int))
    return [chosen[i] for i in index]


def mean_reward(rows: Sequence[Mapping[str, Any]]) -> float:
    """Average the rewards of the members that were judged; −inf if none was, which sorts such groups first."""
    values = [reward for row in rows if np.isfinite(reward := reward_of(row))]
    return float(np.mean(values)) if values else float("-inf")


def reward_of(row: Mapping[str, Any]) -> float:
    """Return the reward of a completion, NaN if it was not judged."""
    value = row.get("reward")
    return float(value) if isinstance(value, (int, float)) else float("nan")
