"""AffectGPT-R1 (arXiv 2508.01318): GRPO on the emotion-wheel score, after a cold start where the model is fresh.

python recipes/affectgpt_r1.py                                   the embedded default, whole, on any machine
python recipes/affectgpt_r1.py --config r1_no_think --model.path DIR --data.root DIR
torchrun --nproc_per_node=8 recipes/affectgpt_r1.py ...          the same on eight GPUs
python recipes/affectgpt_r1.py --help                            every option
"""

from __future__ import annotations

import json
import logging
import sys

from affectgpt.config import R1Config
from affectgpt.configs import CONFIGS
from affectgpt.pipeline import Stages, open_run
from affectgpt.report import write_report
from affectgpt.synthetic import shuffle_media
from grpo_core import distributed
from grpo_core.config.loader import load_config

ROWS = {
    "untrained": "untrained",
    "cold_start": "cold start",
    "sft_continued": "cold start continued for as long",
    "grpo": "GRPO",
    "shuffled_media": "GRPO, clips swapped",
}


def main() -> None:
    config = load_config(R1Config, description=__doc__, default_config=CONFIGS / "demo.yaml", config_folder=CONFIGS)
    dist = distributed.init()
    logging.basicConfig(level=logging.INFO if dist.main_process else logging.ERROR, format="%(message)s")
    open_run(config, dist)
    stages = Stages(config, dist)

    evaluations = {}
    if config.cold_start.max_steps:
        evaluations["untrained"] = stages.evaluate_test("untrained")
        cold = config.cold_start
        stages.supervised(config.supervised("cold_start", cold.max_steps, cold.early_stopping_patience))
    evaluations["cold_start"] = stages.evaluate_test("cold_start")
    if config.controls:
        before_grpo = stages.folder / "cold_start" / "model" if config.cold_start.max_steps else config.model.path
        stages.supervised(config.supervised("sft_continued", config.run.max_steps, patience=0))
        evaluations["sft_continued"] = stages.evaluate_test("sft_continued")
        stages.load(before_grpo)
    stages.grpo(config.rewards(stages.wheel), config.algorithm, config.optim)
    evaluations["grpo"] = stages.evaluate_test("grpo")
    if config.controls and stages.test:
        swapped = stages.prompts(shuffle_media([prompt.sample for prompt in stages.test], config.run.seed))
        evaluations["shuffled_media"] = stages.evaluate_test("shuffled_media", swapped)

    if dist.main_process:
        finish(config, stages, {name: scored for name, scored in evaluations.items() if scored})
    distributed.finalize(dist)


def finish(config: R1Config, stages: Stages, evaluations: dict) -> None:
    """Write `summary.json` and `report.html`, and print the table."""
    summary = {f"{name}_f1": 100 * scored.f1 for name, scored in evaluations.items()} | {"seed": config.run.seed}
    (config.run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = write_report(
        config.run.folder,
        samples={prompt.sample.name: prompt.sample for prompt in (*stages.training, *stages.test)},
        wheel=stages.wheel,
    )
    if evaluations:
        clips = f"{len(stages.test)} held-out clips (level {config.metric.level}, seed {config.run.seed})"
        print(f"\nemotion-wheel F on {clips}")
        for name, scored in evaluations.items():
            f1, precision, recall = (100 * value for value in (scored.f1, scored.precision, scored.recall))
            print(f"  {ROWS[name]:34}{f1:6.2f}   P {precision:6.2f}   R {recall:6.2f}")
    print(f"\n{report}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
