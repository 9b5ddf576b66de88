"""The run report: scores, curves, emotion wheels, completions and clips of one run, in one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from affectgpt.report import sections
from affectgpt.report.html import escape
from affectgpt.report.run import read_run
from affectgpt.report.style import CSS

if TYPE_CHECKING:
    from affectgpt.data.datasets import Sample
    from affectgpt.emotion_wheel import EmotionWheel

__all__ = ["write_report"]

_TITLES = {
    "result": "Result",
    "wheels": "Emotion wheels",
    "held-out": "Held-out clips",
    "training": "GRPO training",
    "completions": "Completions",
    "supervised": "Supervised training",
    "time": "Time",
    "settings": "Settings",
}


def write_report(run_dir: str | Path, *, samples: Mapping[str, Sample], wheel: EmotionWheel) -> Path:
    """Write `report.html` into a run folder, from the files that the run left there.

    Only `metrics.jsonl` is required; a section whose files are absent is left out, and lines or files that cannot be
    read are named on the page. Scores are fractions in `evaluations/*.json` and `eval/f1`, percent in `summary.json`
    and on the page. The same files give the same page, byte for byte.

    Args:
        samples: the clips by name; those that are missing or cannot be decoded get a placeholder.
        wheel: draws the sectors and recomputes the scores that intervals are made from.

    Raises:
        FileNotFoundError: `run_dir` holds no `metrics.jsonl`.
    """
    folder = Path(run_dir)
    run = read_run(folder)
    parts = [
        sections.headline(run, wheel),
        sections.wheels(run, wheel),
        sections.held_out(run, samples, wheel),
        sections.curves(run),
        sections.completions(run, wheel),
        sections.supervised(run),
        sections.time(run),
        sections.settings(run),
    ]
    body = "".join(parts)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in _TITLES.items() if f'id="{anchor}"' in body)
    notes = "".join(f'<p class="note warn">{escape(note)}</p>' for note in run.notes)
    seed = f", seed {escape(run.summary['seed'])}" if "seed" in run.summary else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: training report</title><style>{CSS}</style></head><body>"
        f"<header><h1>{escape(run.name)}</h1>"
        f'<p class="sub">AffectGPT-R1, trained by GRPO on the emotion-wheel reward{seed}</p><nav>{links}</nav></header>'
        f"{notes}{body}</body></html>\n"
    )
    path = folder / "report.html"
    partial = folder / "report.html.part"
    partial.write_text(page, "utf-8")
    os.replace(partial, path)
    return path
