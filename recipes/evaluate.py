"""Score a model on a labelled set: emotion-wheel F, precision and recall, per wheel and in the mean.

    python recipes/evaluate.py --model.path runs/demo/model --data.root MER2025 --data.labels track2_test.csv

The answers are greedy; they and the scores are kept in `runs/<name>/evaluations/evaluation.json`.
"""

from __future__ import annotations

import logging
import sys

from affectgpt.config import TaskConfig
from affectgpt.configs import CONFIGS
from affectgpt.pipeline import Stages, load_samples
from grpo_core import distributed
from grpo_core.config.loader import load_config


def main() -> None:
    config = load_config(TaskConfig, description=__doc__, config_folder=CONFIGS)
    dist = distributed.init()
    logging.basicConfig(level=logging.INFO if dist.main_process else logging.ERROR, format="%(message)s")
    stages = Stages(config, dist, splits=False)
    prompts = stages.prompts(load_samples(stages.config.data))
    evaluation = stages.evaluate_test("evaluation", prompts)
    if dist.main_process:
        print(evaluation.table())
    distributed.finalize(dist)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
