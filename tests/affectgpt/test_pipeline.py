"""How samples are read, split and left out, and which options an emotion run may change when it goes on."""

import json
import logging
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml

from affectgpt import pipeline
from affectgpt.config import DataConfig, ModelConfig, PromptConfig, R1Config
from affectgpt.configs import CONFIGS
from affectgpt.pipeline import Stages, load_samples, split_samples
from affectgpt.stages import RUN_FILES
from grpo_core.config.fields import ConfigError
from grpo_core.config.loader import load_config, to_dict
from grpo_core.config.options import RunConfig, SFTConfig
from grpo_core.distributed import Distributed
from grpo_core.errors import InputError
from grpo_core.storage.run_folder import open_run
from tests.affectgpt.answers import sample


def test_a_split_is_a_partition_that_the_seed_fixes():
    samples = [sample(str(i), None) for i in range(20)]
    training, validation = split_samples(samples, 0.25, seed=3)
    assert len(validation) == 5
    assert sorted(training + validation, key=samples.index) == samples
    assert split_samples(samples, 0.25, seed=3) == (training, validation)
    assert split_samples(samples, 0.25, seed=4) != (training, validation)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def heard(tmp_path, tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder):
    """Ten sounds, and a function that makes the stages of a run over a jsonl of them."""
    rows = []
    for i in range(10):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(((i + 1) * np.arange(16_000) % 3000).astype("<i2").tobytes())
        rows.append({"name": str(i), "audio": f"{i}.wav", "subtitle": "Well.", "labels": ["happy", "sad"]})

    def stages(root, **data):
        return Stages(
            R1Config(
                model=ModelConfig(
                    llm=tiny_llm_folder, visual_encoder=tiny_clip_folder, audio_encoder=tiny_hubert_folder
                ),
                data=DataConfig(format="jsonl", root=root, cache_dir=tmp_path / "features", **data),
                prompt=PromptConfig(face_or_frame="audio_text"),
                run=RunConfig(output_dir=tmp_path / "runs"),
            ),
            Distributed(),
        )

    return rows, stages


def test_samples_that_cannot_be_used_are_named_and_counted_and_the_others_go_on(heard, tmp_path, caplog):
    rows, stages = heard
    rows[2]["subtitle"] = "Well, well. " * 900  # beyond the model's 2,048 positions
    rows[5]["audio"] = None
    root = write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [row | ({"labels": None} if row["name"] == "5" else {}) for row in rows])
    with caplog.at_level(logging.WARNING):
        made = stages(root, test_labels="test.jsonl")
    assert [prompt.id for prompt in made.training] == [prompt.id for prompt in made.test] == list("01346789")
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "skipped 5: it has no audio, which prompt.face_or_frame audio_text shows" in messages
    assert "skipped 2: its prompt has" in messages
    assert "skipped 5: it has no labels to score against" in messages
    assert "config.max_position_embeddings 2048" in messages
    assert "9 of 10 test samples are training samples too, such as 0" in messages
    evaluation = made.evaluate_test("x")
    assert evaluation.table().startswith("x on 8 of 10 samples (80.0 %), level 1")
    with pytest.raises(ValueError, match=r"only 8 of 10 training samples can be used, and data\.min_coverage is 0\.9"):
        stages(root, min_coverage=0.9)


def test_a_target_that_is_too_long_is_left_out_of_supervised_training(heard, tmp_path, monkeypatch, caplog):
    rows, stages = heard
    rows[3]["labels"] = ["very happy " * 900]
    made = stages(write_jsonl(tmp_path / "train.jsonl", rows))
    assert len(made.training) == 10
    taken = []

    class Trainer:
        def __init__(self, policy, examples, *_, **__):
            taken.extend(example.prompt.id for example in examples)

        def train(self): ...

    monkeypatch.setattr(pipeline, "SFTTrainer", Trainer)
    with caplog.at_level(logging.WARNING):
        made.supervised(SFTConfig(run=RunConfig(output_dir=tmp_path / "runs")))
    assert taken == list("012456789")
    assert "of its answer is more than the model's config.max_position_embeddings 2048" in caplog.text


def test_a_jsonl_is_tested_on_the_jsonl_that_is_named_for_it(tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"name": name, "labels": "happy"}])
    data = DataConfig(format="jsonl", root=tmp_path / "train.jsonl", test_labels="test.jsonl")
    assert [sample.name for sample in load_samples(data)] == ["train"]
    assert [sample.name for sample in load_samples(data, data.test_labels)] == ["test"]
    folder = DataConfig(format="jsonl", root=tmp_path, labels="train.jsonl", test_labels="test.jsonl")
    assert [sample.name for sample in load_samples(folder)] == ["train"]
    assert [sample.name for sample in load_samples(folder, folder.test_labels)] == ["test"]
    for wrong, words in (
        ({"root": tmp_path / "train.jsonl", "labels": "test.jsonl"}, "names another: leave data.labels out"),
        ({"root": tmp_path}, "a folder: give the jsonl itself, or its name in data.labels"),
        ({"root": tmp_path / "train.jsonl", "reasons": "x.csv"}, "data.reasons is set, but the layout jsonl has no"),
        ({"root": tmp_path / "none.jsonl"}, "none.jsonl: no such file"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            load_samples(DataConfig(format="jsonl", **wrong))


def test_a_table_without_rows_is_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "labels.csv").write_text("name,openset\n")
    with pytest.raises(InputError, match=r"labels\.csv: it lists no sample"):
        load_samples(DataConfig(format="folder", root=tmp_path, labels="labels.csv"))
    with pytest.raises(InputError, match=r"data\.labels is not set: give the label table"):
        load_samples(DataConfig(format="folder", root=tmp_path))


def test_numbers_of_sentiment_are_refused_but_for_the_sentiment_reward(tmp_path):
    write_jsonl(tmp_path / "mosi.jsonl", [{"name": "a", "labels": "-1.6"}])
    data = DataConfig(format="jsonl", root=tmp_path / "mosi.jsonl")
    with pytest.raises(InputError, match=r"mosi\.jsonl: sample 'a' has the label '-1\.6', a number and not an emotion"):
        load_samples(data)
    assert load_samples(data, numbers=True)[0].labels == "-1.6"
    assert load_samples(data, labelled=False)[0].name == "a"


def test_an_encoding_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"data\.layout\.subtitle_encoding is 'utf9': give one that Python knows"):
        DataConfig(format="folder", layout={"subtitle_encoding": "utf9"})


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
