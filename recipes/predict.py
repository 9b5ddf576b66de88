"""Name the emotions of clips, labelled or not: writes `name,openset` rows and the full answers.

    python recipes/predict.py --model.path runs/demo/model --data.format folder --data.root CLIPS --output answers.csv
    python recipes/predict.py --model.path DIR --data.root MER2025 --data.labels track_all_candidates.csv

The csv has the form of the MER challenges' label tables; `<output>.jsonl` beside it has each clip's whole answer.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from affectgpt.config import TaskConfig
from affectgpt.configs import CONFIGS
from affectgpt.emotion_wheel import parse_labels
from affectgpt.pipeline import Stages, answer, load_samples
from affectgpt.prompts import answer_text
from grpo_core import distributed
from grpo_core.config.loader import load_config


@dataclass
class Config(TaskConfig):
    """Prediction."""

    output: Path = Path("predictions.csv")
    """The csv to write."""


def main() -> None:
    config = load_config(Config, description=__doc__, config_folder=CONFIGS)
    dist = distributed.init()
    logging.basicConfig(level=logging.INFO if dist.main_process else logging.ERROR, format="%(message)s")
    stages = Stages(config, dist, splits=False)
    prompts = stages.prompts(load_samples(stages.config.data, labelled=False))
    _, sampler = stages.policy()
    texts = answer(sampler, prompts, stages.rollout, dist, progress=True)
    if dist.main_process:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.output.open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table)
            writer.writerow(("name", "openset"))
            for prompt, text in zip(prompts, texts, strict=True):
                labels = parse_labels(answer_text(text, config.prompt.mode), "tolerant")
                writer.writerow((prompt.id, f"[{', '.join(labels)}]"))
        with config.output.with_suffix(".jsonl").open("w", encoding="utf-8") as lines:
            for prompt, text in zip(prompts, texts, strict=True):
                lines.write(json.dumps({"name": prompt.id, "answer": text}, ensure_ascii=False) + "\n")
        print(f"{len(prompts)} clips: {config.output}")
    distributed.finalize(dist)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
