"""Penalise answers with more labels than the ground truth, which would raise recall at no cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from affectgpt.emotion_wheel import parse_labels
from grpo_core.errors import InputError

PenaltyKind = Literal["none", "P1", "P2", "P3"]
SingleLabel = Literal["as_written", "shift_single", "shift", "inverse_log"]
PENALTIES = ("none", "P1", "P2", "P3")
SINGLE_LABEL = ("as_written", "shift_single", "shift", "inverse_log")


def check_penalty(kind: str, single_label: str) -> None:
    """Refuse an unknown penalty, or an unknown repair of P3.

    Raises:
        InputError: listing the known ones.
    """
    if kind not in PENALTIES:
        raise InputError(f"unknown length penalty {kind!r}: choose one of {', '.join(PENALTIES)}")
    if single_label not in SINGLE_LABEL:
        raise InputError(
            f"unknown repair of P3 for one label {single_label!r}: choose one of {', '.join(SINGLE_LABEL)}"
        )


@dataclass(frozen=True)
class LengthPenalty:
    """A factor in 0…1 from |o| predicted and |y| true labels (AffectGPT-R1, eq. 15): 1 where |o| ≤ |y|, else

    ```
    P1  1 / (|o| − |y| + 1)      P2  |y| / |o|      P3  log |y| / log |o|
    ```

    Attributes:
        kind: P1, P2 or P3; `none` is always 1.
        single_label: P3 for |y| = 1, where the formula gives 0 for every |o| above 1: `as_written` keeps that;
            `shift_single` takes log(|y| + 1) / log(|o| + 1) there, `shift` takes it for every |y|; `inverse_log` takes
            1 / log |o| there, at most 1. The paper leaves it open; each repair is used by a re-implementation.

    Raises:
        InputError: a name is unknown.
    """

    kind: PenaltyKind = "none"
    single_label: SingleLabel = "shift_single"

    def __post_init__(self) -> None:
        check_penalty(self.kind, self.single_label)

    def __call__(self, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Compute the factor, float64 `[n]`, from the numbers of predicted and of true labels, int `[n]` each."""
        o, y = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
        longer = o > y
        if self.kind == "none" or not longer.any():
            return np.ones(np.broadcast_shapes(o.shape, y.shape))
        o = np.where(longer, o, 2.0)  # any valid number: the result is not used where the answer is not longer
        if self.kind == "P1":
            penalty = 1.0 / np.where(longer, o - y + 1.0, 1.0)
        elif self.kind == "P2":
            penalty = y / o
        else:
            penalty = self._p3(o, y)
        return np.where(longer, penalty, 1.0)

    def _p3(self, o: np.ndarray, y: np.ndarray) -> np.ndarray:
        shifted = np.log(y + 1.0) / np.log(o + 1.0)
        if self.single_label == "shift":
            return shifted
        # clamped: for one label against none, log |o| is 0
        written = np.log(np.maximum(y, 1.0)) / np.log(np.maximum(o, 2.0))
        if self.single_label == "as_written":
            return written
        single = shifted if self.single_label == "shift_single" else np.minimum(1.0 / np.log(np.maximum(o, 2.0)), 1.0)
        return np.where(y == 1, single, written)


def count_labels(texts: Sequence[str | None], parser: str) -> np.ndarray:
    """Count the distinct labels of each text, int64 `[n]`, ignoring case and including labels on no wheel."""
    # members of a group share their ground truth, and often their answer: each text is parsed once
    known: dict[str | None, int] = {}
    for text in texts:
        if text not in known:
            known[text] = len({label.lower() for label in parse_labels(text, parser)})
    return np.array([known[text] for text in texts], dtype=np.int64)
