"""Read the files of a run folder. Damaged files are noted, not fatal: a killed run gets a report too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt.stages import STAGE_LABELS
from grpo_core.data import read_jsonl

Row = dict[str, Any]


class Curves:
    """Rows of a metrics file as columns: one float64 array per name, NaN where a step has no (numeric) value.

    If a step appears twice (a run that was killed and resumed), its last row counts.
    """

    def __init__(self, rows: list[Row]) -> None:
        by_step = {float(row["step"]): row for row in rows if _is_number(row.get("step"))}
        self.steps = np.array(sorted(by_step), dtype=np.float64)  # [T]
        self._rows = [by_step[step] for step in self.steps]
        self.names = list(dict.fromkeys(name for row in self._rows for name in row if name != "step"))

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: str) -> bool:
        """Whether at least one step has a finite value, so that there is a curve to draw."""
        return bool(np.isfinite(self[name]).any())

    def __getitem__(self, name: str) -> np.ndarray:
        values = (row.get(name) for row in self._rows)
        return np.array([value if _is_number(value) else np.nan for value in values], dtype=np.float64)

    def missing(self, name: str) -> int:
        """Number of steps that logged this name as null, NaN or infinite; steps that did not log it are not counted."""
        return sum(name in row and not (_is_number(row[name]) and np.isfinite(row[name])) for row in self._rows)


@dataclass
class Run:
    """The files of one run folder.

    Attributes:
        summary: `summary.json`.
        metrics: step curves of GRPO.
        supervised: step curves of the supervised stages by name, `<stage>/metrics.jsonl`, of those that ran.
        completions: rows of `completions.jsonl`, one per sampled completion.
        evaluations: `evaluations/<name>.json` by name, scores converted from fractions to percent.
        sessions: rows of `sessions.jsonl`, one per start of the run.
        notes: one sentence for the reader of the report about each file that could not be read.
    """

    name: str
    config: str = ""
    summary: Row = field(default_factory=dict)
    metrics: Curves = field(default_factory=lambda: Curves([]))
    supervised: dict[str, Curves] = field(default_factory=dict)
    completions: list[Row] = field(default_factory=list)
    evaluations: dict[str, Row] = field(default_factory=dict)
    sessions: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def level(self) -> int:
        """The level of the emotion wheels that the run was scored at."""
        return next((evaluation["level"] for evaluation in self.evaluations.values() if "level" in evaluation), 1)


def read_run(folder: Path) -> Run:
    """Read a run folder. Only `metrics.jsonl` is required.

    Raises:
        FileNotFoundError: `folder` has no `metrics.jsonl`.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder / 'metrics.jsonl'} is missing: give the folder that a training run wrote")
    run = Run(folder.resolve().name)
    run.metrics = Curves(_read_lines(folder / "metrics.jsonl", run.notes))
    for stage, label in STAGE_LABELS.items():
        if label.supervised and len(curves := Curves(_read_lines(folder / stage / "metrics.jsonl", run.notes))):
            run.supervised[stage] = curves
    run.completions = [
        row
        for row in _read_lines(folder / "completions.jsonl", run.notes)
        if _is_number(row.get("step")) and "prompt_id" in row
    ]
    run.summary = _read_object(folder / "summary.json", run.notes)
    run.sessions = _read_lines(folder / "sessions.jsonl", run.notes)
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text("utf-8", errors="replace")
    for path in sorted((folder / "evaluations").glob("*.json")):
        if evaluation := _read_object(path, run.notes):
            run.evaluations[path.stem] = _in_percent(evaluation)
    return run


def _in_percent(evaluation: Row) -> Row:
    """Multiply the scores of an evaluation by 100: those of the corpus, of each wheel and of each sample."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(item) for item in value]
        return 100 * value if _is_number(value) else value

    def scores(row: Row) -> Row:
        return {name: scaled(value) if name in ("f1", "precision", "recall") else value for name, value in row.items()}

    evaluation = scores(evaluation)
    if isinstance(evaluation.get("per_wheel"), dict):
        evaluation["per_wheel"] = scores(evaluation["per_wheel"])
    evaluation["samples"] = [scores(sample) for sample in evaluation.get("samples") or []]
    return evaluation


def _read_object(path: Path, notes: list[str]) -> Row:
    """Read a JSON object; empty if there is no file, empty with a note if it cannot be parsed."""
    if not path.is_file():
        return {}
    try:
        value = _parse(path.read_text("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        notes.append(f"{path.name} is not valid JSON ({error}) and is left out.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object and is left out.")
        return {}
    return value


def _read_lines(path: Path, notes: list[str]) -> list[Row]:
    """Read one JSON object per line. A killed run leaves a half-written last line: dropped without a note."""
    if not path.is_file():
        return []
    broken: list[int] = []
    rows = [value for _, _, value in read_jsonl(path, broken) if isinstance(value, dict)]
    if broken:
        lines = f"unreadable line{'s' if len(broken) > 1 else ''}"
        notes.append(f"{path.parent.name}/{path.name}: {len(broken)} {lines} skipped.")
    return rows


def _parse(text: str) -> Any:
    """Parse JSON and replace lone surrogates, the `\\udXXX` escapes of a text cut in the middle of a character."""
    value = json.loads(text)
    if "\\ud" in text.lower():  # only then the second pass, which costs as much as the first
        # a lone surrogate cannot be encoded: "replace" makes it a question mark, and the page stays valid UTF-8
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
