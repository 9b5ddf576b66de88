"""Throughput of the emotion-wheel reward on one core: the batched scorer beside plain Python, on the same pairs.

Data: pairs as a training run makes them, groups of 8 predictions that share one ground truth. A label set is 1 to 6
words drawn by Zipf's law (exponent 0.7, random ranks) from all word forms of the tables, in the spellings that models
and annotators use (bare, bracketed, Python list), every tenth word unknown to the tables. So nearly all predictions are
distinct strings; the share is printed. Nothing carries over from one pass to the next but the tables.

Time is this process's processor time on one core, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel

GROUP = 8
BLOCK, ROUNDS = 10_000, 7


class PlainWheel:
    """The same rules one sample at a time, with dictionaries and sets, as a first version would have them."""

    def __init__(self, wheel: EmotionWheel, level: int = 1):
        clusters = wheel.tables.clusters[level - 1]
        self.wheels = [
            {word: int(c) for word, c in zip(wheel.tables.words, row, strict=True) if c >= 0} for row in clusters
        ]

    @staticmethod
    def parse(text: str) -> list[str]:
        """The metric's rule: one bracket off each end, split at quotes and commas."""
        text = text.removeprefix("[").removesuffix("]").replace("'", ",").replace('"', ",")
        return [item.lower() for item in (part.strip() for part in text.split(",")) if item]

    def f1(self, ground_truth: str, prediction: str) -> float:
        """Per-sample F, mean over wheels, unscored wheels as 0."""
        truth_labels, guess_labels = self.parse(ground_truth), self.parse(prediction)
        total = 0.0
        for wheel in self.wheels:
            truth = {wheel[label] for label in truth_labels if label in wheel}
            guess = {wheel[label] for label in guess_labels if label in wheel}
            common = len(truth & guess)
            if common:
                precision, recall = common / len(guess), common / len(truth)
                total += 2 * precision * recall / (precision + recall)
        return total / len(self.wheels)


def draw_pairs(wheel: EmotionWheel, n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Draw n ground truths (each repeated for its group) and n predictions."""
    rng = np.random.default_rng(seed)
    words = np.array(rng.permutation(wheel.tables.words))
    weights = (1.0 + np.arange(len(words))) ** -0.7
    weights /= weights.sum()
    spellings: Sequence[Callable[[list[str]], str]] = (", ".join, lambda w: f"[{', '.join(w)}]", str)

    def label_sets(count: int) -> list[str]:
        sizes = rng.integers(1, 7, count)
        drawn = rng.choice(words, sizes.sum(), p=weights)
        unknown = rng.random(len(drawn)) < 0.1
        drawn = [f"{word}ish" if odd else str(word) for word, odd in zip(drawn, unknown, strict=True)]
        ends = np.cumsum(sizes)
        kinds = rng.integers(0, len(spellings), count)
        return [spellings[k](drawn[end - size : end]) for k, size, end in zip(kinds, sizes, ends, strict=True)]

    ground_truth = [text for text in label_sets(-(-n // GROUP)) for _ in range(GROUP)][:n]
    return ground_truth, label_sets(n)


def pairs_per_second(score: Callable[[list[str], list[str]], object], truth: list[str], guess: list[str]) -> float:
    """Return pairs per second of processor time, by each block's fastest round, as disturbances only add time."""
    total = 0.0
    for start in range(0, len(truth), BLOCK):
        block = truth[start : start + BLOCK], guess[start : start + BLOCK]
        times = []
        for _ in range(ROUNDS):
            begin = time.process_time()
            score(*block)
            times.append(time.process_time() - begin)
        total += min(times)
    return len(truth) / total


def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    """Measure and print; exits with an error if the two implementations disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--pairs", type=int, default=100_000, help="pairs in a pass (default: %(default)s)")
    parser.add_argument("--tables", type=Path, help="a published table folder instead of the project's own tables")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    wheel = EmotionWheel.from_published(args.tables) if args.tables else EmotionWheel.default()
    plain = PlainWheel(wheel)
    truth, guess = draw_pairs(wheel, args.pairs)

    def score_plain(truth: list[str], guess: list[str]) -> list[float]:
        return [plain.f1(t, g) for t, g in zip(truth, guess, strict=True)]

    np.testing.assert_allclose(wheel.score(truth, guess).mean(), score_plain(truth, guess), rtol=0, atol=1e-12)

    figures = {
        "cpu": cpu_model(),
        "cores": 1,
        "pairs": args.pairs,
        "distinct_predictions": len(set(guess)) / len(guess),
        "pairs_per_s": pairs_per_second(lambda t, g: wheel.score(t, g).mean(), truth, guess),
        "pairs_per_s_tolerant": pairs_per_second(lambda t, g: wheel.score(t, g, parse="tolerant").mean(), truth, guess),
        "pairs_per_s_plain": pairs_per_second(score_plain, truth, guess),
    }
    figures["ratio"] = figures["pairs_per_s"] / figures["pairs_per_s_plain"]
    distinct = figures["distinct_predictions"]
    print(f"{figures['cpu']}, one core; {args.pairs:,} pairs, {distinct:.0%} of the predictions distinct")
    print(f"  batched          {figures['pairs_per_s']:>10,.0f} pairs/s")
    print(f"  batched tolerant {figures['pairs_per_s_tolerant']:>10,.0f} pairs/s")
    print(f"  plain Python     {figures['pairs_per_s_plain']:>10,.0f} pairs/s")
    print(f"  ratio            {figures['ratio']:>10.1f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
