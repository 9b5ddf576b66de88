"""What a run left in its folder, read leniently: a report of a killed run is worth more than none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
STAGES = ("cold_start", "sft_continued")  # folders of a run's supervised stages


class Curves:
    """Rows of a metrics file as columns: one float64 array per name, NaN where a step has no (numeric) value.

    A step that stands twice (a run that was killed and resumed) keeps its last row.
    """

    def __init__(self, rows: list[Row]) -> None:
        by_step = {float(row["step"]): row for row in rows if _is_number(row.get("step"))}
        self.steps = np.array(sorted(by_step), dtype=np.float64)  # [T]
        self._rows = [by_step[step] for step in self.steps]
        self.names = list(dict.fromkeys(name for row in self._rows for name in row if name != "step"))

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, name: str) -> bool:
        """True where at least one step holds a finite value: a curve that can be drawn."""
        return bool(np.isfinite(self[name]).any())

    def __getitem__(self, name: str) -> np.ndarray:
        values = (row.get(name) for row in self._rows)
        return np.array([value if _is_number(value) else np.nan for value in values], dtype=np.float64)

    def missing(self, name: str) -> int:
        """Steps that logged this name without a finite value: null, NaN, infinite (not those that did not log it)."""
        return sum(name in row and not (_is_number(row[name]) and np.isfinite(row[name])) for row in self._rows)


@dataclass
class Run:
    """The files of one run folder.

    Attributes:
        summary: `summary.json`.
        metrics: step curves of GRPO.
        supervised: step curves of the stages before it and beside it, `<stage>/metrics.jsonl`, where they are.
        completions: rows of `completions.jsonl`, one per sampled completion.
        evaluations: `evaluations/<name>.json` by name, its scores turned from fractions into percent.
        notes: what could not be read, in words for the reader of the report.
    """

    name: str
    config: str = ""
    summary: Row = field(default_factory=dict)
    metrics: Curves = field(default_factory=lambda: Curves([]))
    supervised: dict[str, Curves] = field(default_factory=dict)
    completions: list[Row] = field(default_factory=list)
    evaluations: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Read a run folder. Only `metrics.jsonl` is required.

    Raises:
        FileNotFoundError: `folder` holds no `metrics.jsonl`.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder / 'metrics.jsonl'} is missing: give the folder that a training run wrote")
    run = Run(folder.resolve().name)
    run.metrics = Curves(_read_lines(folder / "metrics.jsonl", run.notes))
    stages = {stage: Curves(_read_lines(folder / stage / "metrics.jsonl", run.notes)) for stage in STAGES}
    run.supervised = {stage: curves for stage, curves in stages.items() if len(curves)}
    run.completions = [
        row
        for row in _read_lines(folder / "completions.jsonl", run.notes)
        if _is_number(row.get("step")) and "prompt_id" in row
    ]
    run.summary = _read_object(folder / "summary.json", run.notes)
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text("utf-8", errors="replace")
    for path in sorted((folder / "evaluations").glob("*.json")):
        if evaluation := _read_object(path, run.notes):
            run.evaluations[path.stem] = _in_percent(evaluation)
    return run


def _in_percent(evaluation: Row) -> Row:
    """Its scores times 100: those of the corpus, of each wheel and of each sample."""

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
    """A JSON object; empty (with a note) when the file cannot be parsed, empty when there is none."""
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
    """JSON objects, one a line. A half-written last line is what a killed run leaves: dropped without a word."""
    if not path.is_file():
        return []
    rows, broken = [], 0
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except json.JSONDecodeError:
            broken += number < len(lines)
            continue
        if isinstance(row, dict):
            rows.append(row)
    if broken:
        notes.append(f"{path.parent.name}/{path.name}: {broken} unreadable line{'s' if broken > 1 else ''} skipped.")
    return rows


def _parse(text: str) -> Any:
    """JSON, with half surrogate pairs (escapes of a cut text) replaced: no file could hold them."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
