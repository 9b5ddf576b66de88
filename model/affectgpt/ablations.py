"""Train AffectGPT-R1's ablations (rewards, thinking, penalty) on synthetic clips, beside the paper's numbers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from affectgpt.config import R1Config
from affectgpt.configs import CONFIGS
from grpo_core.config.loader import load_config
from grpo_core.errors import TrainingStopped

DESCRIPTION = f"""{__doc__}

    affectgpt ablations --steps 40

Every row is one `affectgpt train`; rows of a mode share one cold start. Options not listed below are passed to every
row. Writes `table.md` and `table.json` to the output folder.
"""

MODES = {"think": ("demo", "demo_think"), "no_think": ("demo",)}
"""Configs of each mode, read in this order."""
PAPER_WITHOUT_RL = 62.52


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: the row's first cell.
        options: options of this row's training.
        paper: the paper's F on OV-MERD+ (level 1), in percent.
        note: difference of the paper's row.
    """

    name: str
    label: str
    mode: str
    options: dict[str, str]
    paper: float
    note: str = ""


ROWS = (
    Row("accuracy", "accuracy", "think", {"reward.names": "[accuracy]", "algorithm.reward_weights": "{}"}, 63.35),
    Row("accuracy_format", "accuracy + format", "think", {}, 66.49),
    Row(
        "four",
        "accuracy + format + alignment + dual",
        "think",
        {
            "reward.names": "[accuracy, format, alignment, dual]",
            "algorithm.reward_weights": "{format: 0.2, alignment: 0.4, dual: 0.6}",
        },
        59.53,
        "with perception too",
    ),
    Row("no_think", "accuracy", "no_think", {}, 68.39),
    Row("no_think_p2", "accuracy × P2", "no_think", {"reward.length_penalty": "P2"}, 67.79),
)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Spell options as on a command line."""
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def row_arguments(row: Row, output_dir: Path, steps: int, cold_start: Path | None, more: Sequence[str]) -> list[str]:
    """Spell the arguments of `affectgpt train` for a row.

    Args:
        cold_start: a model to start from; None trains one.
        more: options of every row; they override the row's (a list adds to it).
    """
    options = {
        "run.output_dir": output_dir,
        "run.name": row.name,
        "run.max_steps": steps,
        "run.eval_steps": 0,
        "run.save_steps": 0,
        "controls": "false",
        **row.options,
    }
    start = {} if cold_start is None else {"model.path": cold_start, "cold_start.max_steps": 0}
    configs = [text for name in MODES[row.mode] for text in ("--config", name)]
    return [*configs, *flags(options), *more, *flags(start)]  # the start last: no option of every row can undo it


def train(row: Row, output_dir: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Train a row in a separate process.

    Returns:
        The row's fields, its scores in percent before and after GRPO, and the mean number of labels of an answer.

    Raises:
        TrainingStopped: training failed, after its process printed the error.
    """
    # a process per row: memory and random numbers start fresh, as if the row had been trained alone
    if subprocess.run([sys.executable, "-m", "affectgpt", "train", *arguments], check=False).returncode:
        raise TrainingStopped(f"row {row.name!r} failed: its error is above")
    from grpo_core.storage.run_folder import newest_folder

    # where the row has gone: beside the folder of its name, if a finished run was there
    folder = newest_folder(output_dir, row.name)
    evaluations = folder / "evaluations"
    before, after = (json.loads((evaluations / f"{name}.json").read_text()) for name in ("cold_start", "grpo"))
    scores = {"cold_start": 100 * before["f1"], **{key: 100 * after[key] for key in ("f1", "precision", "recall")}}
    counts = [len(sample["labels"]) for sample in after["samples"]]
    return (
        asdict(row)
        | scores
        | {
            "labels_per_answer": sum(counts) / len(counts),
            "clips": len(counts),
            "folder": str(folder),
        }
    )


def table(results: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Write the table as Markdown."""
    lines = [
        f"Emotion-wheel F, level 1; ours on {results[0]['clips']} synthetic clips after {steps} GRPO steps, the "
        f"paper's on OV-MERD+ (without RL: {PAPER_WITHOUT_RL}).",
        "",
        "| rewards | thinks | cold start | GRPO | P | R | labels | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        ours = " | ".join(f"{row[key]:.2f}" for key in ("cold_start", "f1", "precision", "recall", "labels_per_answer"))
        paper = f"{row['paper']:.2f}" + (f" ({row['note']})" if row["note"] else "")
        lines.append(f"| {row['label']} | {'yes' if row['mode'] == 'think' else 'no'} | {ours} | {paper} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Train all rows and write the table.

    Raises:
        ConfigError: a row has an option that is refused.
        TrainingStopped: a row failed.
    """
    parser = argparse.ArgumentParser(
        prog="affectgpt ablations", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps of every row")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablations"), help="folder of the rows' runs")
    options, more = parser.parse_known_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: set it to 1 or more")
    for row in ROWS:  # all before the first is trained: the last row's mistake would show after hours
        load_config(R1Config, row_arguments(row, options.output_dir, options.steps, None, more), config_folder=CONFIGS)
    results: list[dict[str, Any]] = []
    cold_starts: dict[str, Path] = {}  # by mode; the first row trains it, the others start from it
    for row in ROWS:
        start = cold_starts.get(row.mode)
        results.append(
            train(row, options.output_dir, row_arguments(row, options.output_dir, options.steps, start, more))
        )
        cold_starts.setdefault(row.mode, Path(results[-1]["folder"]) / "cold_start" / "model")
    text = table(results, options.steps)
    (options.output_dir / "table.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.output_dir / 'table.md'}")
