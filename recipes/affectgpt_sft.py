"""Supervised training of AffectGPT on a label table: the cold start that GRPO begins from.

    python recipes/affectgpt_sft.py --config sft \\
        --model.llm QWEN --model.visual_encoder CLIP --model.audio_encoder HUBERT --data.root MER2025

Writes `runs/<name>/model`, which recipes/affectgpt_r1.py takes as --model.path.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

from affectgpt.config import TaskConfig
from affectgpt.configs import CONFIGS
from affectgpt.pipeline import Stages, open_run
from grpo_core import distributed
from grpo_core.config.loader import load_config
from grpo_core.config.options import OptimConfig, SFTConfig


@dataclass
class Config(TaskConfig):
    """Supervised training."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))


def main() -> None:
    config = load_config(Config, description=__doc__, config_folder=CONFIGS)
    dist = distributed.init()
    logging.basicConfig(level=logging.INFO if dist.main_process else logging.ERROR, format="%(message)s")
    open_run(config, dist)
    stages = Stages(config, dist)
    stages.supervised(SFTConfig(config.optim, config.run))
    evaluation = stages.evaluate_test("sft")
    if dist.main_process:
        print(f"\n{stages.folder / 'model'}")
        if evaluation:
            print(evaluation.table())
    distributed.finalize(dist)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
