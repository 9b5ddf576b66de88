"""Compute reachable scores on the held-out clips: of a constant answer, of other annotators, of the best answer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np

from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.synthetic.dataset import Script, annotate, read_truth
from affectgpt.synthetic.emotions import EMOTIONS


def ceilings(root: str | Path, panels: int = 64) -> dict[str, float]:
    """Compute level-1 emotion-wheel F (0…100) on the held-out clips of a generated data set.

    * `constant`: of all answers of up to three emotions, the one that is best on the training clips.
    * `annotators`: a fresh panel of annotators for each clip, the score of sampling from a perfect model of the labels.
    * `best`: of all answers of up to three emotions, the one with the highest mean F against `panels` fresh panels,
      which are drawn from each clip's true probabilities.
    """
    scripts = read_truth(root)
    held_out = [s for s in scripts if s.seed[1] == 1]
    train = [s for s in scripts if s.seed[1] == 0]
    wheel, rng = EmotionWheel.default(), np.random.default_rng(0)

    def corpus(clips: list[Script], answers: list[str]) -> float:
        return 100 * wheel.corpus([_text(s.labels) for s in clips], answers).f1

    def best(script: Script) -> str:
        truth = [_text(annotate(script.probabilities, rng)) for _ in range(panels)]
        options = _answers(script.probabilities)
        pairs = wheel.score(truth * len(options), [o for o in options for _ in truth]).mean()
        return options[int(pairs.reshape(len(options), panels).mean(1).argmax())]

    constant = max(_answers(EMOTIONS), key=lambda answer: corpus(train, [answer] * len(train)))
    return {
        "constant": corpus(held_out, [constant] * len(held_out)),
        "annotators": corpus(held_out, [_text(annotate(s.probabilities, rng)) for s in held_out]),
        "best": corpus(held_out, [best(s) for s in held_out]),
    }


def report(root: str | Path) -> str:
    """Format `ceilings` as lines of text."""
    return "\n".join(f"{name:<10} {value:6.2f}" for name, value in ceilings(root).items())


def _answers(emotions: Iterable[str]) -> list[str]:
    """List the answers that name one to three of the emotions, each by its commonest word."""
    return [_text([EMOTIONS[e].words[0] for e in chosen]) for n in (1, 2, 3) for chosen in combinations(emotions, n)]


def _text(words: Iterable[str]) -> str:
    return f"[{', '.join(words)}]"
