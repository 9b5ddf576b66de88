"""Build the sections on training: GRPO's step curves, curves of supervised stages, and the time of a step by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from affectgpt.report import figures
from affectgpt.report.figures import Line
from affectgpt.report.run import Curves, Run
from affectgpt.stages import COLD_START, STAGE_LABELS, StageLabel

_PHASES = ("encode", "sample", "reward", "old", "reference", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class PanelSpec:
    """Description of one panel.

    Attributes:
        curves: metric → label. The label of a single curve is its unit; several curves get a legend.
        band: metric drawn as ± around the curve, where it was logged.
        floor: lowest end of the y axis, unless a value lies below it.
        smooth: draw a running mean over the steps; not for a schedule.
        sparse: a metric of some steps only, drawn as dots joined by a line.
        scale: factor on the values; 100 turns a fraction into percent.
    """

    title: str
    curves: Mapping[str, str]
    band: str | None = None
    floor: float | None = None
    smooth: bool = True
    sparse: bool = False
    scale: float = 1.0


_REWARD = PanelSpec("Reward", {"reward": "mean"}, band="reward_std")
_VALIDATION = PanelSpec("Validation F", {"eval/f1": "percent"}, sparse=True, scale=100.0)
_GRADIENT_NORM = PanelSpec("Gradient norm", {"grad_norm": "before clipping"}, floor=0)
_GRPO_PANELS = (
    PanelSpec("KL to the reference", {"kl": "nats per token"}, floor=0),
    PanelSpec("Entropy", {"entropy": "nats per token"}, floor=0),
    PanelSpec("Completion length", {"completions/mean_length": "mean, tokens"}),
    PanelSpec("Cut off at the length limit", {"completions/clipped_ratio": "share of completions"}, floor=0),
    PanelSpec("Groups of equal rewards", {"frac_reward_zero_std": "share that teach nothing"}, floor=0),
    PanelSpec("Clipped ratios", {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}, floor=0),
    _GRADIENT_NORM,
    PanelSpec("Loss", {"loss": "surrogate and KL"}),
    PanelSpec("Learning rate", {"learning_rate": "after the schedule"}, floor=0, smooth=False),
    PanelSpec(
        "Sampler against trainer", {"sampling/sampling_logp_difference/mean": "mean |Δ log p| per token"}, floor=0
    ),
)
_SUPERVISED_PANELS = (PanelSpec("Loss", {"loss": "nats per target token"}), _VALIDATION, _GRADIENT_NORM)


@dataclass(frozen=True)
class Panel:
    """One figure of curves.

    Attributes:
        unit: text under the title if there is one curve, else empty.
        legend: (label, colour name) of each curve if there are several.
        missing: logged values that are null, NaN or infinite.
    """

    title: str
    svg: Markup
    unit: str
    legend: list[tuple[str, str]]
    missing: int


@dataclass(frozen=True)
class Training:
    """Values of the training section.

    Attributes:
        steps: number of logged steps, from step number `first` to `last`.
        window: steps that a bold curve averages.
    """

    steps: int
    first: float
    last: float
    window: int
    panels: list[Panel]


@dataclass(frozen=True)
class SupervisedStage:
    """Curves of one supervised stage."""

    label: StageLabel
    panels: list[Panel]


@dataclass(frozen=True)
class Phase:
    """Time of one phase of a step: seconds per step and in all, and percent of the whole."""

    name: str
    colour: str
    per_step: float
    total: float
    percent: float


@dataclass(frozen=True)
class Time:
    """Values of the time section, seconds."""

    svg: Markup
    phases: list[Phase]
    per_step: float
    total: float


def training_section(run: Run) -> Training:
    """Build GRPO's step curves; without panels if no step was logged."""
    metrics = run.metrics
    if not len(metrics):
        return Training(steps=0, first=math.nan, last=math.nan, window=1, panels=[])
    by_name = {
        name: name.removeprefix("rewards/").removesuffix("/mean")
        for name in metrics.names
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    specs = (_REWARD, PanelSpec("Rewards by name", by_name), _VALIDATION, *_GRPO_PANELS)
    panels = [panel for spec in specs if (panel := build_panel(metrics, spec))]
    return Training(
        steps=len(metrics),
        first=metrics.steps[0],
        last=metrics.steps[-1],
        window=smoothing_window(metrics),
        panels=panels,
    )


def supervised_section(run: Run) -> list[SupervisedStage] | None:
    """Build the curves of the supervised stages: the cold start, and the control that went on without GRPO."""
    stages = []
    for name, label in STAGE_LABELS.items():
        if name not in run.supervised:
            continue
        metrics = run.supervised[name]
        # The colour of the cold start is the one that it has in the result table; the control stays in the background.
        colour = "before" if name == COLD_START else "muted"
        panels = [panel for spec in _SUPERVISED_PANELS if (panel := build_panel(metrics, spec, colour))]
        stages.append(SupervisedStage(label, panels))
    return stages or None


def build_panel(metrics: Curves, spec: PanelSpec, colour: str = "after") -> Panel | None:
    """Draw the metrics of a panel that were logged; None if none was. `colour` is that of a single curve."""
    labels = {name: label for name, label in spec.curves.items() if name in metrics}
    if not labels:
        return None
    colours = figures.colours(list(labels)) if len(labels) > 1 else dict.fromkeys(labels, colour)
    band = metrics[spec.band] if spec.band and spec.band in metrics else None
    lines = [Line(spec.scale * metrics[name], colours[name], band, spec.sparse) for name in labels]
    window = smoothing_window(metrics) if spec.smooth else 1
    unit = ""
    if len(labels) == 1:
        unit = next(iter(labels.values())) + (" ± std over a group" if band is not None else "")
    return Panel(
        title=spec.title,
        svg=figures.curve(spec.title, metrics.steps, lines, window, spec.floor),
        unit=unit,
        legend=[(label, colours[name]) for name, label in labels.items()] if len(labels) > 1 else [],
        missing=sum(metrics.missing(name) for name in labels),
    )


def smoothing_window(metrics: Curves) -> int:
    """Steps that a bold curve averages: a twentieth of the run; 1 (no smoothing) below 30 steps."""
    return max(1, len(metrics) // 20) if len(metrics) >= 30 else 1


def time_section(run: Run) -> Time | None:
    """Build the table and figure of seconds per phase; None if no timing was logged."""
    metrics = run.metrics
    present = [name for name in metrics.names if name.startswith("time/") and name in metrics]
    # The phases in the order of a step, then others that were timed, alphabetically.
    known = [f"time/{phase}" for phase in _PHASES if f"time/{phase}" in present]
    names = known + sorted(set(present) - set(known))
    if not names:
        return None
    colours = figures.colours(names)
    layers = [Line(metrics[name], colours[name]) for name in names]
    spent = {name: float(np.nansum(metrics[name])) for name in names}
    total = sum(spent.values())
    return Time(
        svg=figures.stacked("Seconds per step by phase, stacked", metrics.steps, layers),
        phases=[
            Phase(
                name=name.removeprefix("time/"),
                colour=colours[name],
                per_step=seconds / len(metrics),
                total=seconds,
                percent=100 * seconds / total if total else math.nan,
            )
            for name, seconds in spent.items()
        ],
        per_step=total / len(metrics),
        total=total,
    )
