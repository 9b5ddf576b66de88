"""Draw the figures as inline SVG whose colours are CSS variables of the page, so that they follow its theme.

Texts from data reach an SVG in two ways: drawn by matplotlib, which escapes them, and as `aria-label`, escaped here.
That is why `to_svg` may return Markup, which the templates do not escape again; nothing else in the report may.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from markupsafe import Markup, escape

from affectgpt.report.formatting import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.projections.polar import PolarAxes

    from affectgpt.report.compare import SectorCounts

# matplotlib cannot draw with a CSS variable, so every colour is drawn as a placeholder that nothing else uses, and
# `to_svg` replaces the placeholder by `var(--name)`.
_NAMES = ("paper", "ink", "muted", "line", "before", "after", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_PLACEHOLDER = {name: f"#fe{index:02x}01" for index, name in enumerate(_NAMES)}
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_SIZE = (4.2, 1.9)  # inches: about one third of the page at its own scale, the width of a phone
_FONT = 8.5
_POINTS = 400  # about one point per pixel of a panel; more only make the file larger


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        values: float64 `[T]`, NaN where there is none.
        colour: name of a CSS variable, one of `_NAMES`.
        band: float64 `[T]`, drawn as ± around the curve.
        sparse: the metric was logged at some steps only; drawn as dots joined across the gaps.
    """

    values: np.ndarray
    colour: str = "after"
    band: np.ndarray | None = None
    sparse: bool = False


def curve(label: str, steps: np.ndarray, lines: Sequence[Line], window: int = 1, floor: float | None = None) -> Markup:
    """Draw curves over steps `[T]`. With window > 1 each step is faint and the mean of the last `window` is bold."""
    figure, axes = _panel()
    for line in lines:
        colour = _PLACEHOLDER[line.colour]
        values = np.where(np.isfinite(line.values), line.values, np.nan)
        if line.sparse:
            kept = np.isfinite(values)
            axes.plot(steps[kept], values[kept], color=colour, lw=1.5, marker="o", ms=3.2)
            continue
        if line.band is not None:
            low, high = (running_mean(values + sign * line.band, window) for sign in (-1, 1))
            axes.fill_between(*_thin_band(steps, low, high), color=colour, alpha=0.15, lw=0)
        if window > 1:
            axes.plot(*_thin(steps, values), color=colour, lw=0.6, alpha=0.35)
        smooth = running_mean(values, window)
        axes.plot(*_thin(steps, smooth), color=colour, lw=1.6)
        lonely = _lonely(smooth)  # a line needs two points; these would be invisible
        axes.plot(steps[lonely], smooth[lonely], color=colour, lw=0, marker="o", ms=2.6)
    if floor is not None:
        lowest = min((np.nanmin(line.values, initial=floor) for line in lines), default=floor)
        axes.set_ylim(bottom=floor if lowest >= floor else None)
    _steps_axis(axes, steps)
    return to_svg(figure, label)


def stacked(label: str, steps: np.ndarray, layers: Sequence[Line]) -> Markup:
    """Draw layers over steps `[T]` on top of each other; a missing value counts as 0."""
    figure, axes = _panel()
    heights = np.stack([np.nan_to_num(layer.values, nan=0.0, posinf=0.0, neginf=0.0) for layer in layers])
    # Averaged, not thinned: dropping steps would change the area, which is the time spent.
    buckets = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    x = np.array([steps[bucket].mean() for bucket in buckets])
    y = np.stack([heights[:, bucket].mean(axis=1) for bucket in buckets], axis=1)
    if len(x) == 1:  # an area needs a width
        x, y = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(y, 2, axis=1)
    axes.stackplot(x, y, colors=[_PLACEHOLDER[layer.colour] for layer in layers], lw=0)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    _steps_axis(axes, steps)
    return to_svg(figure, label)


def wheel(label: str, counts: SectorCounts, before: str | None, after: str | None, limit: float) -> Markup:
    """Draw one emotion wheel: the ground truth in grey, and a bar per model on it, solid where the two agree.

    All are shares of the scored clips. `limit` is the share at the rim, common to the wheels of a page.
    """
    figure = _figure((4.2, 3.3))
    axes = cast("PolarAxes", figure.add_axes((0.152, 0.055, 0.696, 0.885), projection="polar"))
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    sectors = max(len(counts.sectors), 1)
    width = 2 * np.pi / sectors
    centres = 2 * np.pi * np.arange(len(counts.sectors)) / sectors  # angle of each sector
    axes.set_ylim(0, limit)
    axes.set_rorigin(-0.22 * limit)  # a hole in the middle, or small shares would be slivers
    _draw_shares(axes, counts, centres, width, before, after)
    _draw_rings(axes, width, limit)
    for centre, sector in zip(centres, counts.sectors, strict=True):
        side = np.sin(centre)
        axes.text(
            centre,
            1.06 * limit,
            printable(sector),  # before drawing: matplotlib has no glyph for a control character
            parse_math=False,  # a name with $ in it is a name, not TeX
            fontsize=_FONT,
            color=_PLACEHOLDER["ink"],
            ha="center" if abs(side) < 0.2 else "left" if side > 0 else "right",
            va="bottom" if np.cos(centre) > 0.9 else "top" if np.cos(centre) < -0.9 else "center",
        )
    return to_svg(figure, label)


def _draw_shares(
    axes: PolarAxes, counts: SectorCounts, centres: np.ndarray, width: float, before: str | None, after: str | None
) -> None:
    """Draw the ground truth of each sector and the models' bars; `width` is the angle of a sector."""
    scored = max(counts.scored, 1)
    truth = counts.truth / scored
    axes.bar(centres, truth, width=0.90 * width, color=_PLACEHOLDER["muted"], alpha=0.22, lw=0)
    for centre, share in zip(centres[truth > 0], truth[truth > 0], strict=True):
        arc = np.linspace(centre - 0.45 * width, centre + 0.45 * width, 24)
        axes.plot(arc, np.full_like(arc, share), color=_PLACEHOLDER["ink"], lw=1.5, solid_capstyle="butt")
    models = [(model, colour) for model, colour in ((before, "before"), (after, "after")) if model in counts.named]
    for (model, colour), offset in zip(models, (-0.2, 0.2) if len(models) == 2 else (0.0,), strict=False):
        # The hits cover the lower end of the pale bar: all that stays pale is wrong.
        for values, alpha in ((counts.named[model], 0.33), (counts.hits[model], 1.0)):
            axes.bar(
                centres + offset * width,
                values / scored,
                width=0.32 * width,
                color=_PLACEHOLDER[colour],
                alpha=alpha,
                lw=0,
            )


def _draw_rings(axes: PolarAxes, width: float, limit: float) -> None:
    """Draw rings at round shares, each labelled between the first two sectors."""
    ticks = np.arange(1, 6) * _tick(limit)
    ticks = ticks[ticks < limit * 1.001]  # rounding must not drop the ring at the rim
    axes.set_rgrids(ticks, labels=[])
    axes.set_thetagrids([])
    axes.grid(color=_PLACEHOLDER["line"], lw=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_linewidth(0)  # not `set_visible(False)`: drawing makes the inner spine visible again
    for tick in ticks:
        axes.text(
            0.5 * width,
            tick,
            f"{100 * tick:.0f} %",
            fontsize=6.5,
            color=_PLACEHOLDER["muted"],
            ha="center",
            va="center",
            zorder=5,
            bbox={"facecolor": _PLACEHOLDER["paper"], "alpha": 0.75, "lw": 0, "pad": 0.6},
        )


def rim(counts: Sequence[SectorCounts], models: Sequence[str]) -> float:
    """Compute the share at the rim of all wheels: the largest one drawn, rounded up to a tick."""
    largest = max(
        (
            values.max() / wheel.scored
            for wheel in counts
            if wheel.scored
            for values in (wheel.truth, *(wheel.named[model] for model in models))
        ),
        default=1.0,
    )
    tick = _tick(largest)
    return max(tick * np.ceil(largest / tick - 1e-9), tick)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average the finite values among the last `window` steps `[T]`; NaN where the step itself has none."""
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    number = np.cumsum(finite).astype(np.float64)
    total[window:] -= total[:-window].copy()
    number[window:] -= number[:-window].copy()
    return np.where(finite, total / np.maximum(number, 1.0), np.nan)


def _tick(limit: float) -> float:
    """Choose a round distance between rings, which gives three to five of them."""
    return next((step for step in (0.02, 0.05, 0.1, 0.2) if limit / step <= 5), 0.25)


def _lonely(values: np.ndarray) -> np.ndarray:
    """Mask the values between two gaps."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return finite[1:-1] & ~finite[:-2] & ~finite[2:]


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin a line to `_POINTS` points: the lowest and highest value of each stretch, so that no spike is lost."""
    if len(x) <= _POINTS:
        return x, y
    kept: set[int] = set()
    for bucket in np.array_split(np.arange(len(x)), _POINTS // 3):
        finite = bucket[np.isfinite(y[bucket])]
        if len(finite) < len(bucket):
            kept.add(int(bucket[np.argmin(np.isfinite(y[bucket]))]))  # the first gap stays visible
        if len(finite):
            kept |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
    index = np.array(sorted(kept))
    return x[index], y[index]


def _thin_band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stride = max(1, len(x) // (_POINTS // 2))
    return x[::stride], low[::stride], high[::stride]


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _panel() -> tuple[Figure, Axes]:
    figure = _figure(_SIZE)
    axes = figure.add_axes((0.125, 0.15, 0.855, 0.80))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_PLACEHOLDER["line"])
    axes.grid(axis="y", color=_PLACEHOLDER["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelsize=_FONT, labelcolor=_PLACEHOLDER["muted"])
    return figure, axes


def _steps_axis(axes: Axes, steps: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1] + 0.01 * (steps[-1] - steps[0]))


def to_svg(figure: Figure, label: str) -> Markup:
    """Turn a figure into an `<svg>` that scales with the page, with `label` as its alternative text.

    The same figure gives the same bytes: no date, no random salt in the ids.
    """
    import matplotlib

    buffer = io.StringIO()
    # fonttype none: text stays text, in the font of the page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "axes.unicode_minus": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # inside HTML there is no XML declaration and no doctype
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0] if view_box else ""} role="img"'
    # A function as replacement: in a string, re.sub would read a backslash in the label as a group.
    text = re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{escape(label)}">', text, count=1)
    # matplotlib numbers its ids per figure, and ids are global to a page: prefix them with a hash of the figure.
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8] + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    text = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 var(--font)", text)
    for name, colour in _PLACEHOLDER.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(re.sub(r">\s+<", "><", text).strip())


def colours(names: Sequence[str]) -> Mapping[str, str]:
    """Assign a colour to each name, in order; a ninth name gets the first colour again."""
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(names)}
