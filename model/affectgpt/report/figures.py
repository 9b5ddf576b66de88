"""Pictures as inline SVG whose colours are the page's CSS variables, so that they follow light, dark and print."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from affectgpt.report.compare import SectorCounts

# Each colour name stands in the drawing as a colour nobody else uses, and leaves as `var(--name)`.
_NAMES = ("paper", "ink", "muted", "line", "before", "after", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_STANDS_FOR = {name: f"#fe{index:02x}01" for index, name in enumerate(_NAMES)}
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_SIZE = (4.2, 1.9)  # inches: about one third of the page at its own scale, the width of a phone
_FONT = 8.5
_POINTS = 400  # more points than a panel has pixels only make the file heavy


@dataclass(frozen=True)
class Line:
    """One curve: values float64 `[T]`, NaN where there is none; `band` ± around it; `sparse`: dots joined over gaps."""

    label: str
    values: np.ndarray
    colour: str = "after"
    band: np.ndarray | None = None
    sparse: bool = False


def curve(label: str, steps: np.ndarray, lines: Sequence[Line], window: int = 1, floor: float | None = None) -> str:
    """A panel of curves over steps `[T]`. With window > 1 each step is faint, the mean of the last `window` is bold."""
    figure, axes = _panel()
    for line in lines:
        colour = _STANDS_FOR[line.colour]
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
        lonely = _lonely(smooth)
        axes.plot(steps[lonely], smooth[lonely], color=colour, lw=0, marker="o", ms=2.6)
    if floor is not None:
        lowest = min((np.nanmin(line.values, initial=floor) for line in lines), default=floor)
        axes.set_ylim(bottom=floor if lowest >= floor else None)
    _steps_axis(axes, steps)
    return _svg(figure, label)


def stacked(label: str, steps: np.ndarray, layers: Sequence[Line]) -> str:
    """Layers over steps, added up; a step that has no value of a layer spends nothing on it."""
    figure, axes = _panel()
    heights = np.stack([np.nan_to_num(layer.values, nan=0.0, posinf=0.0, neginf=0.0) for layer in layers])
    buckets = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    x = np.array([steps[bucket].mean() for bucket in buckets])
    y = np.stack([heights[:, bucket].mean(axis=1) for bucket in buckets], axis=1)
    if len(x) == 1:  # an area needs a width
        x, y = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(y, 2, axis=1)
    axes.stackplot(x, y, colors=[_STANDS_FOR[layer.colour] for layer in layers], lw=0)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    _steps_axis(axes, steps)
    return _svg(figure, label)


def wheel(label: str, counts: SectorCounts, before: str | None, after: str | None, limit: float) -> str:
    """One emotion wheel, read outwards: grey = ground truth, bars on it = the models, solid = where they meet.

    All are shares of the scored clips; `limit` is the share at the rim, common to the wheels of a page.
    """
    figure = _figure((4.2, 3.3))
    axes = figure.add_axes((0.152, 0.055, 0.696, 0.885), projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    number, scored = len(counts.sectors), max(counts.scored, 1)
    centres = 2 * np.pi * np.arange(number) / max(number, 1)
    width = 2 * np.pi / max(number, 1)
    axes.set_ylim(0, limit)
    axes.set_rorigin(-0.22 * limit)

    truth = counts.truth / scored
    axes.bar(centres, truth, width=0.90 * width, color=_STANDS_FOR["muted"], alpha=0.22, lw=0)
    for centre, share in zip(centres[truth > 0], truth[truth > 0], strict=True):
        arc = np.linspace(centre - 0.45 * width, centre + 0.45 * width, 24)
        axes.plot(arc, np.full_like(arc, share), color=_STANDS_FOR["ink"], lw=1.5, solid_capstyle="butt")
    models = [(model, colour) for model, colour in ((before, "before"), (after, "after")) if model in counts.named]
    for (model, colour), place in zip(models, (-0.2, 0.2) if len(models) == 2 else (0.0,), strict=False):
        for values, alpha in ((counts.named[model], 0.33), (counts.hits[model], 1.0)):
            axes.bar(
                centres + place * width,
                values / scored,
                width=0.32 * width,
                color=_STANDS_FOR[colour],
                alpha=alpha,
                lw=0,
            )

    ticks = np.arange(1, 6) * _tick(limit)
    ticks = ticks[ticks < limit * 1.001]
    axes.set_rgrids(ticks, labels=[])
    axes.set_thetagrids([])
    axes.grid(color=_STANDS_FOR["line"], lw=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_linewidth(0)  # hidden, the inner one would come back when drawn
    for tick in ticks:
        axes.text(
            0.5 * width,
            tick,
            f"{100 * tick:.0f} %",
            fontsize=6.5,
            color=_STANDS_FOR["muted"],
            ha="center",
            va="center",
            zorder=5,
            bbox={"facecolor": _STANDS_FOR["paper"], "alpha": 0.75, "lw": 0, "pad": 0.6},
        )
    for centre, sector in zip(centres, counts.sectors, strict=True):
        side = np.sin(centre)
        axes.text(
            centre,
            1.06 * limit,
            sector,
            fontsize=_FONT,
            color=_STANDS_FOR["ink"],
            ha="center" if abs(side) < 0.2 else "left" if side > 0 else "right",
            va="bottom" if np.cos(centre) > 0.9 else "top" if np.cos(centre) < -0.9 else "center",
        )
    return _svg(figure, label)


def rim(counts: Sequence[SectorCounts], models: Sequence[str]) -> float:
    """The share that the rim of all wheels stands for: the largest drawn, rounded up to a tick."""
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
    """Mean of the finite values among the last `window` steps `[T]`; NaN where the step itself has none."""
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    number = np.cumsum(finite).astype(np.float64)
    total[window:] -= total[:-window].copy()
    number[window:] -= number[:-window].copy()
    return np.where(finite, total / np.maximum(number, 1.0), np.nan)


def _tick(limit: float) -> float:
    """A round distance between rings, for three to five of them."""
    return next((step for step in (0.02, 0.05, 0.1, 0.2) if limit / step <= 5), 0.25)


def _lonely(values: np.ndarray) -> np.ndarray:
    """Values between two gaps: a line would not show them."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return finite[1:-1] & ~finite[:-2] & ~finite[2:]


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` points, the lowest and highest of each stretch kept, so that no spike is lost."""
    if len(x) <= _POINTS:
        return x, y
    kept: set[int] = set()
    for bucket in np.array_split(np.arange(len(x)), _POINTS // 3):
        finite = bucket[np.isfinite(y[bucket])]
        if len(finite) < len(bucket):
            kept.add(int(bucket[np.argmin(np.isfinite(y[bucket]))]))  # one gap stays a gap
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
    axes.spines["bottom"].set_color(_STANDS_FOR["line"])
    axes.grid(axis="y", color=_STANDS_FOR["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelsize=_FONT, labelcolor=_STANDS_FOR["muted"])
    return figure, axes


def _steps_axis(axes: Axes, steps: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1] + 0.01 * (steps[-1] - steps[0]))


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` without a size: ids unique to it, text in the page's font, colours as variables."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "axes.unicode_minus": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0] if view_box else ""} role="img"'
    text = re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{_attribute(label)}">', text, count=1)
    own = "f" + hashlib.sha256(text.encode()).hexdigest()[:8] + "-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = text.replace('href="#', f'href="#{own}').replace("url(#", f"url(#{own}")
    text = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 var(--font)", text)
    for name, colour in _STANDS_FOR.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r">\s+<", "><", text).strip()


def _attribute(text: str) -> str:
    from html import escape

    return escape(text)


def colours(names: Sequence[str]) -> Mapping[str, str]:
    """A colour for each name, in order; they come round again after eight."""
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(names)}
