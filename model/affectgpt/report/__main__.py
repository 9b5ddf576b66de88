"""`affectgpt report RUN_DIR [--data ROOT] [--wheel FOLDER]`: write a run's report again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from affectgpt.config import R1Config
from affectgpt.data.datasets import Sample, SyntheticLayout, load_folder, load_mer2025
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.report import write_report
from grpo_core.config.fields import ConfigError
from grpo_core.config.loader import load_config
from grpo_core.errors import InputError
from grpo_core.report import write_report as write_core_report


def main(argv: list[str] | None = None) -> Path:
    """Parse the command line and write the report; returns its path.

    Clips and wheel are those of the run's `config.yaml`, so that a report written again has the pictures and scores of
    the first one. Clips that are no longer there are named on standard error, and the report is written without them.
    """
    parser = argparse.ArgumentParser(prog="affectgpt report", description="Write a run's report.html again.")
    parser.add_argument("run_dir", type=Path, help="the folder that the run wrote (metrics.jsonl is in it)")
    parser.add_argument(
        "--data",
        type=Path,
        help="where the clips are, if they have moved since the run: MER2025 layout, or a folder of clips",
    )
    parser.add_argument("--wheel", type=Path, help="published wheel tables, if they have moved since the run")
    options = parser.parse_args(argv)
    try:
        if is_text_run(options.run_dir):
            path = write_core_report(options.run_dir)
            print(path)
            return path
        config = read_config(options.run_dir / "config.yaml")
        if options.data:
            samples = load_samples(options.data)
        else:
            samples = run_samples(config) if config else {}
        if options.wheel:
            wheel = EmotionWheel.from_published(options.wheel)
        else:
            wheel = config.metric.wheel() if config else EmotionWheel.default()
        path = write_report(options.run_dir, samples=samples, wheel=wheel)
    except (FileNotFoundError, InputError) as error:
        parser.error(str(error))
    print(path)
    return path


def is_text_run(folder: Path) -> bool:
    """Whether a run folder is of a program that knows no emotions, by the sections of its config."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and "run" in config and "metric" not in config


def read_config(path: Path) -> R1Config | None:
    """Read the config that a run saved; None, with a note, if it is missing or not an emotion run's."""
    try:
        return load_config(R1Config, ["--config", str(path)])
    except ConfigError as error:
        print(f"clips and wheel of the run are not known ({error}): name them by --data and --wheel", file=sys.stderr)
        return None


def run_samples(config: R1Config) -> dict[str, Sample]:
    """Load the samples of a run's tables, training and held-out; what cannot be loaded is left out with a note."""
    from affectgpt.pipeline import load_samples, synthetic_root  # imports torch

    if config.data.root is None and isinstance(config.data.layout, SyntheticLayout):
        config.data.root = synthetic_root(config)
    samples: dict[str, Sample] = {}
    for table in (config.data.labels, config.data.test_labels):
        if table:
            try:
                samples |= {sample.name: sample for sample in load_samples(config.data, table)}
            except (FileNotFoundError, InputError) as error:
                print(f"clips are left out ({error}): if they have moved, name their folder by --data", file=sys.stderr)
    return samples


def load_samples(root: Path) -> dict[str, Sample]:
    """Load the samples of every `track2*.csv` of a MER2025 folder; without one, of a plain folder of clips."""
    tables = sorted(root.glob("track2*.csv"))
    loaded = [sample for table in tables for sample in load_mer2025(root, table.name)] if tables else load_folder(root)
    return {sample.name: sample for sample in loaded}


if __name__ == "__main__":
    main()
