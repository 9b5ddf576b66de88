"""Score a model's answers to labelled samples on the emotion wheels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from affectgpt.data.datasets import Sample, check_emotion_labels
from affectgpt.emotion_wheel import CorpusScore, EmotionWheel, distinct_labels
from affectgpt.prompts import Mode, answer_text
from grpo_core.errors import InputError
from grpo_core.storage.files import write_text
from grpo_core.storage.jsonl import jsonable


@dataclass(frozen=True)
class SampleScore:
    """One sample's answer and score.

    Attributes:
        ground_truth: the label string as the table spells it.
        answer: the whole completion.
        labels: the labels found in the answer, each once.
        f1: 0…1, the mean over the wheels that have the ground truth; NaN if none has.
    """

    name: str
    ground_truth: str
    answer: str
    labels: list[str]
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a labelled set, 0…1: F of mean precision and mean recall on each wheel, then the mean over wheels.

    Attributes:
        per_wheel: `f1`, `precision` and `recall`, one number per wheel each.
        scored: number of samples that each wheel could score.
        total: number of samples in the set, with those that were left out, as their clips cannot be read.
    """

    name: str
    mode: Mode
    split: str
    level: int
    f1: float
    precision: float
    recall: float
    per_wheel: dict[str, list[float]]
    scored: list[int]
    total: int
    samples: list[SampleScore]

    def table(self) -> str:
        """Format the scores as lines of text, in percent."""
        used = f"{len(self.samples):,}"
        if len(self.samples) < self.total:
            used += f" of {self.total:,} samples ({100 * len(self.samples) / self.total:.1f} %)"
        else:
            used += " samples"
        rows = [f"{self.name} on {used}, level {self.level}", "          F %      P %      R %"]
        per_wheel = zip(*(self.per_wheel[key] for key in ("f1", "precision", "recall")), strict=True)
        for number, (f1, precision, recall) in enumerate(per_wheel, 1):
            scores = f"{100 * f1:8.2f} {100 * precision:8.2f} {100 * recall:8.2f}"
            rows.append(f"wheel {number} {scores}   ({self.scored[number - 1]} scored)")
        return "\n".join([*rows, f"mean    {100 * self.f1:8.2f} {100 * self.precision:8.2f} {100 * self.recall:8.2f}"])

    def save(self, folder: Path) -> Path:
        """Write `folder/<name>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        # jsonable: a sample that no wheel could score has NaN, which JSON lacks
        write_text(path, json.dumps(jsonable(asdict(self)), indent=1, ensure_ascii=False) + "\n")
        return path


def score_answers(
    wheel: EmotionWheel,
    samples: Sequence[Sample],
    completions: Sequence[str],
    *,
    name: str,
    split: str,
    mode: Mode = "no_think",
    level: Literal[1, 2] = 1,
    total: int | None = None,
) -> Evaluation:
    """Score a completion for each labelled sample.

    The ground truth is parsed strictly, as in the published metric; the answer by the tolerant parser, which finds the
    labels for which the published pipeline asks a second LLM.

    Args:
        total: number of samples in the set, where some of them are not in `samples`.

    Raises:
        InputError: there are no samples; one has no labels, or a number for one; or no label is on a wheel, so that
            there is nothing to score.
    """
    if not samples:
        raise InputError(f"nothing to evaluate on: the {split} set is empty")
    truth: list[str] = []
    for sample in samples:
        if sample.labels is None:
            raise InputError(f"sample {sample.name!r} of the {split} set has no labels: it cannot be scored")
        truth.append(sample.labels)
    check_emotion_labels(samples, f"the {split} set")
    answers = [answer_text(text, mode) for text in completions]
    corpus: CorpusScore = wheel.corpus(truth, answers, level, parse="tolerant")
    if not corpus.scored.any():  # the scores would be 0, as if every answer were wrong
        raise InputError(
            f"no label of the {split} set is on an emotion wheel, such as {truth[0]!r} of sample {samples[0].name!r}: "
            "give labels that are emotion words in English"
        )
    # not the corpus' F averaged: each sample's F, which the report shows beside its answer
    each = wheel.score(truth, answers, level, parse="tolerant").mean("skip")
    return Evaluation(
        name=name,
        mode=mode,
        split=split,
        level=level,
        f1=corpus.f1,
        precision=corpus.precision,
        recall=corpus.recall,
        per_wheel={
            key: np.asarray(getattr(corpus, f"per_wheel_{key}")).tolist() for key in ("f1", "precision", "recall")
        },
        scored=np.asarray(corpus.scored).tolist(),
        total=len(samples) if total is None else total,
        samples=[
            SampleScore(sample.name, labels, text, distinct_labels(answer), float(f1))
            for sample, labels, text, answer, f1 in zip(samples, truth, completions, answers, each, strict=True)
        ],
    )
