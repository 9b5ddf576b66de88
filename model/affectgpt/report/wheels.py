"""Build the section on emotion wheels: drawings of the five wheels, and the scores of every model on each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from affectgpt.report import compare, figures
from affectgpt.report.compare import SectorCounts
from affectgpt.report.run import Run
from affectgpt.stages import COLD_START, GRPO, STAGE_LABELS, StageLabel, in_stage_order, stage_label

if TYPE_CHECKING:
    from affectgpt.emotion_wheel import EmotionWheel


@dataclass(frozen=True)
class WheelFigure:
    """One drawn wheel; `scores` holds F in percent of each drawn model, `scored` the number of clips on the wheel."""

    title: str
    svg: Markup
    scores: list[float]
    scored: int


@dataclass(frozen=True)
class Scores:
    """F, precision and recall in percent; None where the evaluation lacks them."""

    f1: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class WheelScores:
    """One model's scores: on each wheel, then the mean over wheels."""

    label: StageLabel
    columns: list[Scores]


@dataclass(frozen=True)
class Wheels:
    """Values of the section on wheels.

    Attributes:
        drawn: the models that the figures show, in the order of their scores.
        level: level of the scores in the captions; None, and not mentioned, if it is that of the drawn sectors.
        titles: titles of all wheels, for the head of the table.
    """

    drawn: list[StageLabel]
    figures: list[WheelFigure]
    level: int | None
    titles: list[str]
    rows: list[WheelScores]


def wheels_section(run: Run, wheel: EmotionWheel) -> Wheels | None:
    """Draw the wheels from the answers of the cold start and of GRPO, and list the scores of all models."""
    drawn = [name for name in (COLD_START, GRPO) if run.evaluations.get(name, {}).get("samples")]
    titles = [wheel_title(name) for name in wheel.names]
    wheel_figures = draw_wheels(run, wheel, drawn, titles) if drawn else []
    rows = [
        wheel_scores(name, run.evaluations[name], len(wheel.names))
        for name in in_stage_order(run.evaluations)
        if isinstance(run.evaluations[name].get("per_wheel"), dict)
    ]
    if not wheel_figures and not rows:
        return None
    return Wheels(
        drawn=[STAGE_LABELS[name] for name in drawn],
        figures=wheel_figures,
        level=run.level if run.level != compare.LEVEL else None,
        titles=titles,
        rows=rows,
    )


def draw_wheels(run: Run, wheel: EmotionWheel, drawn: Sequence[str], titles: Sequence[str]) -> list[WheelFigure]:
    """Draw one figure per wheel, all on the scale of the largest share, so that wheels can be compared by eye."""
    counts = compare.sector_counts({name: run.evaluations[name] for name in drawn}, wheel)
    limit = figures.rim(counts, drawn)
    before, after = (name if name in drawn else None for name in (COLD_START, GRPO))
    result = []
    for index, (title, count) in enumerate(zip(titles, counts, strict=True)):
        per_wheel = [(run.evaluations[name].get("per_wheel") or {}).get("f1") or [] for name in drawn]
        result.append(
            WheelFigure(
                title=title,
                svg=figures.wheel(alternative_text(title, count, drawn), count, before, after, limit),
                scores=[values[index] for values in per_wheel if index < len(values)],
                scored=count.scored,
            )
        )
    return result


def alternative_text(title: str, counts: SectorCounts, models: Sequence[str]) -> str:
    """Write the alternative text of a wheel for screen readers, with every count that the drawing shows."""
    sectors = []
    for index, sector in enumerate(counts.sectors):
        named = ", ".join(
            f"{STAGE_LABELS[model].title} {counts.named[model][index]} ({counts.hits[model][index]} right)"
            for model in models
        )
        sectors.append(f"{sector}: ground truth {counts.truth[index]}, {named}")
    return f"{title}, {counts.scored} clips. " + "; ".join(sectors)


def wheel_title(name: str) -> str:
    """Capitalise a wheel's name and separate its number: `wheel1` becomes `Wheel 1`."""
    return re.sub(r"^[Ww]heel(?=\d)", "Wheel ", name[:1].upper() + name[1:])


def wheel_scores(name: str, evaluation: dict[str, Any], wheels: int) -> WheelScores:
    """Read one model's scores per wheel; files of other versions may have fewer wheels or lack a score."""

    def at(values: Any, index: int) -> Any:
        return values[index] if isinstance(values, list) and index < len(values) else None

    per_wheel = evaluation["per_wheel"]
    columns = [
        Scores(*(at(per_wheel.get(score), index) for score in ("f1", "precision", "recall"))) for index in range(wheels)
    ]
    mean = Scores(evaluation.get("f1"), evaluation.get("precision"), evaluation.get("recall"))
    return WheelScores(stage_label(name), [*columns, mean])
