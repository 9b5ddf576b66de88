"""AffectGPT-R1's ablations on the embedded synthetic clips, beside the paper's numbers: rewards, thinking, penalty.

    python recipes/ablations.py --steps 40

Every row is recipes/affectgpt_r1.py with a config of its own; rows of one mode start from one cold start. Options that
are not named here go to every row. Writes `table.md` and `table.json` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
MODES = {"think": ("demo", "demo_think"), "no_think": ("demo",)}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is rewarded, in which mode, and the paper's F on OV-MERD+ (level 1)."""

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
PAPER_WITHOUT_RL = 62.52


def flags(options: dict) -> list[str]:
    """Options as they stand on a command line."""
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def train(row: Row, output_dir: Path, steps: int, cold_start: Path | None, more: list[str]) -> dict:
    """Run a row; its scores before and after GRPO, and the labels an answer has after it.

    Raises:
        RuntimeError: the recipe failed; its own error is above.
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
    shared = {} if cold_start is None else {"model.path": cold_start, "cold_start.max_steps": 0}
    command = [sys.executable, str(HERE / "affectgpt_r1.py")]
    for file in MODES[row.mode]:
        command += ["--config", file]
    if subprocess.run([*command, *flags(options), *more, *flags(shared)], check=False).returncode:
        raise RuntimeError(f"row {row.name!r} failed: its error is above")
    evaluations = output_dir / row.name / "evaluations"
    before, after = (json.loads((evaluations / f"{name}.json").read_text()) for name in ("cold_start", "grpo"))
    scores = {"cold_start": 100 * before["f1"], **{key: 100 * after[key] for key in ("f1", "precision", "recall")}}
    counts = [len(sample["labels"]) for sample in after["samples"]]
    return asdict(row) | scores | {"labels_per_answer": sum(counts) / len(counts), "clips": len(counts)}


def table(results: list[dict], steps: int) -> str:
    """The table as Markdown."""
    lines = [
        f"Emotion-wheel F, level 1; ours on {results[0]['clips']} synthetic clips after {steps} GRPO steps, the "
        f"paper's on OV-MERD+ (without RL: {PAPER_WITHOUT_RL}).",
        "",
        "| rewards | thinks | cold start | GRPO | P | R | labels | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours = " | ".join(f"{r[key]:.2f}" for key in ("cold_start", "f1", "precision", "recall", "labels_per_answer"))
        paper = f"{r['paper']:.2f}" + (f" ({r['note']})" if r["note"] else "")
        lines.append(f"| {r['label']} | {'yes' if r['mode'] == 'think' else 'no'} | {ours} | {paper} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps of every row")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablations"), help="folder of the rows' runs")
    arguments, more = parser.parse_known_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}: set it to 1 or more")
    results, cold_starts = [], {}
    for row in ROWS:
        results.append(train(row, arguments.output_dir, arguments.steps, cold_starts.get(row.mode), more))
        cold_starts.setdefault(row.mode, arguments.output_dir / row.name / "cold_start" / "model")
    text = table(results, arguments.steps)
    (arguments.output_dir / "table.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output_dir / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{arguments.output_dir / 'table.md'}")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
