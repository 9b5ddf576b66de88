"""Write a run's `report.html`: its metrics as curves, its last completions and its settings. It knows of no task.

    python -m grpo_core.report runs/run

The page is made of the files in the run's folder alone, is one file, and loads nothing. Emotion runs have a report of
their own, with scores, wheels and clips: `affectgpt report`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from grpo_core.data import read_jsonl
from grpo_core.storage.files import write_text

# what a reader looks at first; the other curves follow in the order in which they were logged
_FIRST = ("reward", "loss", "kl", "entropy", "completions/mean_length", "grad_norm", "learning_rate", "step_time")
_COMPLETIONS = 24  # of the last step
_WIDTH, _HEIGHT, _MARGIN = 320, 110, 6

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1em }
figure { margin: 0 }
figcaption { font-size: 13px }
svg { background: #f6f7f8; width: 100%; height: auto }
polyline { fill: none; stroke: #2a6fb0; stroke-width: 1.5 }
circle { fill: #2a6fb0 }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: 4px 8px; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.text { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: #f6f7f8; padding: 1em; overflow: auto }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. The same files give the same page.

    Raises:
        FileNotFoundError: the folder has no `metrics.jsonl`.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder / 'metrics.jsonl'} is missing: give the folder that a training run wrote")
    metrics = list(_rows(folder / "metrics.jsonl"))
    sessions = list(_rows(folder / "sessions.jsonl"))
    name = escape(folder.resolve().name)
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>',
        f"<h1>{name}</h1><p>{len(metrics)} steps, {len(sessions)} starts.</p>",
        '<h2>Curves</h2><div class="curves">',
        *_curves(metrics),
        "</div>",
        *_completions(list(_rows(folder / "completions.jsonl"))),
        *_settings(folder, sessions),
        "</html>\n",
    ]
    write_text(folder / "report.html", "\n".join(page))
    return folder / "report.html"


def try_report(folder: Path) -> None:
    """Write the report, and print its path. If that fails say why: the run is whole without it."""
    try:
        print(write_report(folder))
    except Exception as error:  # whatever it is: it can be made again, and must not cost the end of a run
        print(
            f"warning: the report was not written ({type(error).__name__}: {error}): the run is whole, and "
            f"`python -m grpo_core.report {folder}` writes it again",
            file=sys.stderr,
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a file, one a line; a line that a killed run has cut is left out."""
    if path.is_file():
        yield from (row for _, _, row in read_jsonl(path, broken=[]) if isinstance(row, dict))


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in metrics for name in row if name != "step"))
    for name in [*(name for name in _FIRST if name in names), *(name for name in names if name not in _FIRST)]:
        points = [(row["step"], row[name]) for row in metrics if _finite(row.get("step")) and _finite(row.get(name))]
        if points:
            caption = f"{escape(name)}: {points[0][1]:.4g} → {points[-1][1]:.4g}"
            yield f"<figure><figcaption>{caption}</figcaption>{_drawn(points)}</figure>"


def _drawn(points: Sequence[tuple[float, float]]) -> str:
    """Draw a curve as SVG, scaled to its own smallest and largest value."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    # a constant curve lies in the middle
    width, height = (max(steps) - min(steps)) or 1, (max(values) - min(values)) or 1
    middle = 0.5 * (max(values) == min(values))
    scaled = [
        (
            _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - min(steps)) / width,
            _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * ((value - min(values)) / height + middle),
        )
        for step, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in scaled)
    x, y = scaled[-1]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{min(values):.4g} to {max(values):.4g}</title>'
        f'<polyline points="{line}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/></svg>'
    )


def _completions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    steps = [row["step"] for row in rows if _finite(row.get("step"))]
    if not steps:
        return
    shown = [row for row in rows if row.get("step") == max(steps)][:_COMPLETIONS]
    names = list(dict.fromkeys(name for row in shown for name in (row.get("rewards") or {})))
    yield f"<h2>Completions of step {max(steps)}</h2><table><tr><th>prompt</th><th>completion</th>"
    yield from (f"<th>{escape(name)}</th>" for name in ("reward", *names))
    yield "</tr>"
    for row in shown:
        rewards = row.get("rewards") or {}
        yield f'<tr><td>{escape(str(row.get("prompt_id")))}</td><td class="text">{escape(str(row.get("text")))}</td>'
        yield from _numbers([row.get("reward"), *(rewards.get(name) for name in names)])
        yield "</tr>"
    yield "</table>"


def _numbers(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield f'<td class="number">{format(value, ".4g") if _finite(value) else "–"}</td>'


def _settings(folder: Path, sessions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if sessions:
        yield "<h2>Starts</h2><table><tr><th>when</th><th>at</th><th>command</th><th>changed options</th></tr>"
        for session in sessions:
            changes = [f"{c.get('key')}: {c.get('before')} → {c.get('now')}" for c in session.get("changes") or []]
            command = " ".join(map(str, session.get("command") or []))
            cells = (session.get("started"), session.get("position"), command, "; ".join(changes))
            yield "<tr>" + "".join(f'<td class="text">{escape(str(cell))}</td>' for cell in cells) + "</tr>"
        versions = sessions[-1].get("versions") or {}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f"</table><p>{escape(listed)}; git {escape(str(sessions[-1].get('git')))}</p>"
    if (folder / "config.yaml").is_file():
        text = (folder / "config.yaml").read_text("utf-8", errors="replace")
        yield f"<h2>Configuration</h2><pre>{escape(text)}</pre>"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m grpo_core.report RUN_FOLDER")
    try:
        print(write_report(Path(sys.argv[1])))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
