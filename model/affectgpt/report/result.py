"""The result section: the scores before and after GRPO, the controls beside them, and what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from affectgpt.report import compare
from affectgpt.report.compare import Interval
from affectgpt.report.formatting import number
from affectgpt.report.run import Run
from affectgpt.stages import COLD_START, GRPO, SFT_CONTINUED, SHUFFLED_MEDIA, StageLabel, in_stage_order, stage_label

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel


@dataclass(frozen=True)
class ResultRow:
    """One model of the result table; scores in percent, NaN or None where there is none.

    Attributes:
        change: F minus the cold start's, in points; NaN for the cold start itself.
        bar: length of the F bar, in percent of the column; None if F is not finite.
        whisker: left end and length of the interval, in percent of the column.
    """

    label: StageLabel
    f1: float
    precision: float | None
    recall: float | None
    change: float
    interval: Interval | None
    bar: float | None
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """Comparison of the scores, in points of F.

    Attributes:
        gain: after GRPO minus before.
        interval: of `gain`, by the bootstrap over clips.
        over_supervised: GRPO minus supervised training continued for as long.
        swap_loss: loss of GRPO's model when it is shown another sample's clip.
        share_of_gain: `swap_loss` / `gain`, not below 0; only where there is a gain.
    """

    gain: float
    interval: Interval | None = None
    over_supervised: float | None = None
    swap_loss: float | None = None
    share_of_gain: float | None = None


@dataclass(frozen=True)
class Result:
    """Values of the result section.

    Attributes:
        before, after: F of the cold start and after GRPO; None if the run did not report it.
        clips: held-out clips of every evaluation; None if they differ.
        has_intervals: at least one row has an interval, so the table needs the note on them.
        notes: scores that cannot be reproduced from the answers, and clips left out of them, for the top of the page.
    """

    before: float | None
    after: float | None
    level: int
    wheel_count: int
    clips: int | None
    rows: list[ResultRow]
    verdict: Verdict | None
    has_intervals: bool
    notes: list[str] = field(default_factory=list)


def result_section(run: Run, wheel: EmotionWheel) -> Result | None:
    """Build the result section; None if the run reported no score."""
    scores = read_scores(run)
    if not scores:
        return None
    intervals, changes, notes = checked_intervals(run, wheel, scores)
    before = scores.get(COLD_START)

    # Bars share one scale, with an eighth of room beyond the longest bar or whisker.
    drawn = [f1 for f1 in scores.values() if math.isfinite(f1)] + [interval.high for interval in intervals.values()]
    scale = min(100.0, 1.12 * max(drawn, default=0.0)) or 1.0
    rows = []
    for name, f1 in scores.items():
        evaluation = run.evaluations.get(name, {})
        interval = intervals.get(name)
        whisker = None
        if interval:
            whisker = 100 * interval.low / scale, 100 * (interval.high - interval.low) / scale
        rows.append(
            ResultRow(
                label=stage_label(name),
                f1=f1,
                precision=evaluation.get("precision"),
                recall=evaluation.get("recall"),
                change=f1 - before if before is not None and name != COLD_START else math.nan,
                interval=interval,
                bar=100 * max(f1, 0.0) / scale if math.isfinite(f1) else None,
                whisker=whisker,
            )
        )
    clips = {len(evaluation.get("samples") or []) for evaluation in run.evaluations.values()}
    for name in in_stage_order(run.evaluations):
        scored, total = len(run.evaluations[name].get("samples") or []), run.evaluations[name].get("total")
        if isinstance(total, int) and scored < total:  # one note: the stages of a run score the same clips
            notes.append(f"The scores are of {scored:,} of {total:,} held-out clips: the others could not be used.")
            break
    return Result(
        before=before,
        after=scores.get(GRPO),
        level=run.level,
        wheel_count=len(wheel.names),
        clips=clips.pop() if len(clips) == 1 else None,
        rows=rows,
        verdict=verdict(scores, changes),
        has_intervals=bool(intervals),
        notes=notes,
    )


def read_scores(run: Run) -> dict[str, float]:
    """Read F in percent by model, in stage order, from the summary or, if that lacks it, from the evaluation."""
    found = {
        key.removesuffix("_f1"): float(value)
        for key, value in run.summary.items()
        if key.endswith("_f1") and isinstance(value, (int, float))
    }
    for name, evaluation in run.evaluations.items():
        if isinstance(evaluation.get("f1"), (int, float)):
            found.setdefault(name, evaluation["f1"])
    return {name: found[name] for name in in_stage_order(found)}


def checked_intervals(
    run: Run, wheel: EmotionWheel, scores: Mapping[str, float]
) -> tuple[dict[str, Interval], dict[str, Interval], list[str]]:
    """Compute bootstrap intervals of the scores and of their differences to the cold start, with notes on omissions.

    A model gets an interval only if the F recomputed from its answers is the F that the run reported: a report made
    with another wheel than the run's would otherwise draw a whisker around a number it does not belong to.
    """
    evaluations = {name: run.evaluations[name] for name in scores if run.evaluations.get(name, {}).get("samples")}
    intervals, changes = compare.intervals(evaluations, wheel, run.level)
    # 0.02 points: above what rounding does to a score on file, below what another wheel does. `not <`, so that a NaN
    # counts as wrong.
    wrong = {name for name, interval in intervals.items() if not abs(interval.f1 - scores[name]) < 0.02}
    notes = [
        f"{name}: this wheel gives F {number(intervals[name].f1)} for the answers on file, the run reported "
        f"{number(scores[name])}; no interval is drawn."
        for name in sorted(wrong)
    ]
    if COLD_START in wrong:
        changes = {}
    return (
        {name: interval for name, interval in intervals.items() if name not in wrong},
        {name: change for name, change in changes.items() if name not in wrong},
        notes,
    )


def verdict(scores: Mapping[str, float], changes: Mapping[str, Interval]) -> Verdict | None:
    """Compare GRPO with the cold start and the controls; None unless both scores are finite."""
    finite = {name: f1 for name, f1 in scores.items() if math.isfinite(f1)}
    if COLD_START not in finite or GRPO not in finite:
        return None
    after = finite[GRPO]
    gain = after - finite[COLD_START]
    swap_loss = after - finite[SHUFFLED_MEDIA] if SHUFFLED_MEDIA in finite else None
    return Verdict(
        gain=gain,
        interval=changes.get(GRPO),
        over_supervised=after - finite[SFT_CONTINUED] if SFT_CONTINUED in finite else None,
        swap_loss=swap_loss,
        share_of_gain=max(swap_loss / gain, 0.0) if swap_loss is not None and gain > 0 else None,
    )
