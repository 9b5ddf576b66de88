"""The run report: scores, curves, emotion wheels, completions and clips of one run, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from affectgpt.report.page import render_page
from affectgpt.report.run import read_run
from grpo_core.storage.files import write_text

if TYPE_CHECKING:
    from affectgpt.data.datasets import Sample
    from affectgpt.emotion_wheel import EmotionWheel

__all__ = ["write_report"]


def write_report(run_dir: str | Path, *, samples: Mapping[str, Sample], wheel: EmotionWheel) -> Path:
    """Write `report.html` into a run folder, from the files that the run left there, and return its path.

    Only `metrics.jsonl` is required; a section whose files are absent is left out, and lines or files that cannot be
    read are named on the page. Scores are fractions in `evaluations/*.json` and `eval/f1`, percent in `summary.json`
    and on the page. The same files give the same page, byte for byte.

    Args:
        samples: the clips by name; those that are missing or cannot be decoded get a placeholder.
        wheel: names the sectors, and recomputes the scores of which intervals are computed.

    Raises:
        FileNotFoundError: `run_dir` has no `metrics.jsonl`.
    """
    folder = Path(run_dir)
    page = render_page(read_run(folder), samples, wheel)
    path = folder / "report.html"
    write_text(path, page + "\n")  # a browser that reloads meanwhile never sees half a page
    return path
