"""`python -m affectgpt.report RUN_DIR [--data ROOT] [--wheel FOLDER]`: write a run's report again."""

from __future__ import annotations

import argparse
from pathlib import Path

from affectgpt.data.datasets import Sample, load_folder, load_mer2025
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.report import write_report


def main(argv: list[str] | None = None) -> Path:
    """Parse the command line and write the report; returns its path."""
    parser = argparse.ArgumentParser(prog="python -m affectgpt.report", description="Write a run's report.html again.")
    parser.add_argument("run_dir", type=Path, help="the folder that the run wrote (metrics.jsonl is in it)")
    parser.add_argument(
        "--data", type=Path, help="the dataset, for frames and subtitles: MER2025 layout, or a folder of clips"
    )
    parser.add_argument("--wheel", type=Path, help="published wheel tables, if the run was scored by them")
    options = parser.parse_args(argv)
    wheel = EmotionWheel.from_published(options.wheel) if options.wheel else EmotionWheel.default()
    try:
        path = write_report(options.run_dir, samples=load_samples(options.data) if options.data else {}, wheel=wheel)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(path)
    return path


def load_samples(root: Path) -> dict[str, Sample]:
    """The samples of every `track2*.csv` of a MER2025 folder; without one, of a plain folder of clips."""
    tables = sorted(root.glob("track2*.csv"))
    loaded = [sample for table in tables for sample in load_mer2025(root, table.name)] if tables else load_folder(root)
    return {sample.name: sample for sample in loaded}


if __name__ == "__main__":
    main()
