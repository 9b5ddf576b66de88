"""How samples are split, and which options an emotion run may change when it goes on."""

from pathlib import Path

import pytest
import yaml

from affectgpt.config import DataConfig, R1Config
from affectgpt.configs import CONFIGS
from affectgpt.pipeline import split_samples
from affectgpt.stages import RUN_FILES
from grpo_core.config.fields import ConfigError
from grpo_core.config.loader import load_config, to_dict
from grpo_core.config.options import RunConfig
from grpo_core.distributed import Distributed
from grpo_core.storage.run_folder import open_run
from tests.affectgpt.answers import sample


def test_a_split_is_a_partition_that_the_seed_fixes():
    samples = [sample(str(i), None) for i in range(20)]
    training, validation = split_samples(samples, 0.25, seed=3)
    assert len(validation) == 5
    assert sorted(training + validation, key=samples.index) == samples
    assert split_samples(samples, 0.25, seed=3) == (training, validation)
    assert split_samples(samples, 0.25, seed=4) != (training, validation)


def begin(config: R1Config) -> Path:
    run = open_run(config, Distributed(), writes=RUN_FILES)
    run.begin()
    (run.path / "cold_start/checkpoints/step-000007").mkdir(parents=True, exist_ok=True)
    run.release()
    return run.path


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--data.root", "elsewhere"), ""),
        (("--data.cache_dir", "elsewhere"), ""),
        (("--data.test_labels", "none"), ""),
        (("--gradient_checkpointing",), ""),
        (("--controls", "false"), ""),
        (("--model.llm", "elsewhere"), "model.llm"),
        (("--lora_r", "4"), "model.lora_r"),
        (("--model.dtype", "bfloat16"), "model.dtype"),
        (("--metric.emotion_wheel", "tables"), "metric.emotion_wheel"),
        (("--reward.names", "[accuracy, mine.py:words]"), "reward.names"),
        (("--cold_start.optim.weight_decay", "0.1"), "cold_start.optim.weight_decay"),
        (("--validation_fraction", "0.3"), "data.validation_fraction"),
        (("--max_new_tokens", "8"), "rollout.max_new_tokens"),
        (("--run.max_steps", "200"), "run.max_steps"),  # the demo's learning rate falls to 0 at its end
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_an_emotion_run_goes_on_with_what_trains_the_same(tmp_path, flags, key):
    demo = ["--config", str(CONFIGS / "demo.yaml"), "--run.output_dir", str(tmp_path)]
    folder = begin(load_config(R1Config, demo))
    changed = load_config(R1Config, [*demo, *flags])
    if not key:
        assert begin(changed) == folder
        return
    with pytest.raises(ConfigError, match=rf"at step 7 of cold_start\) of other options \({key} was"):
        begin(changed)


def test_the_demos_name_carries_its_seed(tmp_path):
    demo = ["--config", str(CONFIGS / "demo.yaml"), "--run.output_dir", str(tmp_path)]
    folders = [begin(load_config(R1Config, [*demo, "--seed", str(seed)])) for seed in (0, 1, 2)]
    assert [folder.name for folder in folders] == ["demo-seed0", "demo-seed1", "demo-seed2"]


def test_a_run_whose_config_an_earlier_version_saved_goes_on(tmp_path):
    config = R1Config(
        data=DataConfig(format="synthetic", layout={"clips": (8, 2)}), run=RunConfig(name="r", output_dir=tmp_path)
    )
    saved = to_dict(config)
    # as it was saved: options of all layouts and of all loss types beside the others, no plug-ins
    del saved["data"]["layout"], saved["algorithm"]["loss"], saved["run"]["plugins"]
    saved["data"] |= {"subtitle_language": "english", "synthetic_clips": [8, 2]}
    saved["algorithm"] |= {"epsilon": None, "epsilon_high": None, "delta": None, "cispo_cap": 5.0}
    folder = tmp_path / "r"
    (folder / "checkpoints/step-000003").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert begin(config) == folder
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["layout"] == {"clips": [8, 2]}
    saved["data"]["synthetic_clips"] = [9, 2]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"data\.layout\.clips was 9,2 and is 8,2"):
        begin(config)


def test_a_stage_without_evaluations_ends_with_its_last_model(tmp_path):
    stage = ["--config", str(CONFIGS / "demo.yaml"), "--cold_start.eval_steps", "0"]
    run = load_config(R1Config, stage).supervised("cold_start", 5, patience=3).run
    assert (run.metric_for_best_model, run.early_stopping_patience) == ("", 0)


@pytest.mark.parametrize("name", ["max_steps", "prompts_per_step", "eval_steps", "early_stopping_patience"])
def test_a_negative_length_of_the_cold_start_is_refused(name):
    with pytest.raises(ConfigError, match=rf"cold_start\.{name} is -1: set it to"):
        load_config(R1Config, ["--config", str(CONFIGS / "demo.yaml"), f"--cold_start.{name}", "-1"])
