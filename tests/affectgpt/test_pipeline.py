"""Rewards and evaluation of answers, and what a run's folder keeps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from affectgpt.config import DataConfig, R1Config
from affectgpt.data.datasets import Sample
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.evaluation import score_answers
from affectgpt.pipeline import open_run, split_samples
from affectgpt.rewards import AccuracyReward, FormatReward, RewardConfig, has_think_answer_format
from grpo_core.config.loader import to_dict
from grpo_core.config.options import RunConfig
from grpo_core.distributed import Distributed
from grpo_core.types import Completion, Group, Prompt

WHEEL = EmotionWheel.default()


def sample(name: str, labels: str | None) -> Sample:
    return Sample(name, None, None, None, labels=labels)


def group(labels: str, *texts: str) -> Group:
    completions = [Completion((1,), np.zeros(1, np.float32), "stop", text) for text in texts]
    return Group(Prompt("p", (1,), sample=sample("p", labels)), completions)


def test_accuracy_is_the_mean_f_over_wheels_of_every_completion():
    groups = [group("[happy, sad]", "happy, sad", "happy", "angry"), group("[angry]", "sad", "angry", "zorp")]
    values = AccuracyReward(WHEEL)(groups)
    truth, answers = ["[happy, sad]"] * 3 + ["[angry]"] * 3, ["happy, sad", "happy", "angry", "sad", "angry", "zorp"]
    expected = WHEEL.score(truth, answers).mean("skip").reshape(2, 3)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-15)
    assert values[0].tolist() == pytest.approx([1.0, 2 / 3, 0.0])
    assert values[1].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_accuracy_cannot_judge_a_sample_that_is_on_no_wheel():
    assert np.isnan(AccuracyReward(WHEEL)([group("[neutral]", "happy", "neutral")])).all()


def test_in_think_mode_only_the_answer_counts():
    text = "<think> he smiles, so not angry </think> <answer> happy </answer>"
    values = AccuracyReward(WHEEL, mode="think")([group("[happy]", text, "happy", text.replace("</answer>", ""))])
    assert values.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("<think> a </think> <answer> happy </answer>", True),
        ("  <think>a</think><answer>happy</answer>\n", True),
        ("<think>line\nline</think>\n<answer>happy</answer>", True),
        ("<answer> happy </answer>", False),
        ("<think> a </think> <answer> happy </answer> and more", False),
        ("well, <think> a </think> <answer> happy </answer>", False),
        ("<think> a </think> <answer> </answer>", False),
        ("<think></think><answer>happy</answer>", False),
        ("<think> a </think> <answer> x </answer> <answer> y </answer>", False),
        ("<think> <think> a </think> <answer> x </answer>", False),
        ("<think> a </think> so <answer> x </answer>", False),
    ],
)
def test_format_is_one_think_block_and_one_answer_block(text, valid):
    assert has_think_answer_format(text) is valid
    assert FormatReward()([group("[happy]", text, "")]).tolist() == [[float(valid), 0.0]]


def test_unknown_and_impossible_rewards_are_refused_with_the_config():
    with pytest.raises(ValueError, match=r"unknown reward 'speed': choose among .*accuracy"):
        R1Config(reward=RewardConfig(names=("speed",)))
    with pytest.raises(ValueError, match="judges think and answer tags"):
        R1Config(reward=RewardConfig(names=("accuracy", "format")))


def test_evaluation_is_the_corpus_metric(tmp_path):
    samples = [sample("a", "[happy]"), sample("b", "[sad, angry]"), sample("c", "[neutral]")]
    answers = ["joyful.", "sad; furious", "happy"]
    evaluation = score_answers(WHEEL, samples, answers, name="x", split="test")
    corpus = WHEEL.corpus([s.labels for s in samples], ["joyful", "sad, furious", "happy"])
    assert evaluation.f1 == corpus.f1
    assert evaluation.scored == corpus.scored.tolist()
    assert [row.labels for row in evaluation.samples] == [["joyful"], ["sad", "furious"], ["happy"]]
    written = json.loads(evaluation.save(tmp_path).read_text())
    assert written["f1"] == corpus.f1
    assert written["samples"][2]["f1"] is None


def test_an_unlabelled_sample_cannot_be_evaluated():
    with pytest.raises(ValueError, match="sample 'a' of the test set has no labels"):
        score_answers(WHEEL, [sample("a", None)], ["happy"], name="x", split="test")


def test_a_split_is_a_partition_that_the_seed_fixes():
    samples = [sample(str(i), None) for i in range(20)]
    training, validation = split_samples(samples, 0.25, seed=3)
    assert len(validation) == 5
    assert sorted(training + validation, key=samples.index) == samples
    assert split_samples(samples, 0.25, seed=3) == (training, validation)
    assert split_samples(samples, 0.25, seed=4) != (training, validation)


def test_a_run_goes_on_in_its_folder_and_another_one_moves_it_aside(tmp_path):
    def config(**run) -> R1Config:
        return R1Config(run=RunConfig(name="r", output_dir=tmp_path, **run))

    folder, previous = tmp_path / "r", tmp_path / "r.previous"
    open_run(config(), Distributed())
    (folder / "progress").write_text("half")
    open_run(config(max_steps=1000), Distributed())
    assert (folder / "progress").read_text() == "half"
    open_run(config(seed=1), Distributed())
    assert not (folder / "progress").exists()
    assert (previous / "progress").read_text() == "half"
    (folder / "summary.json").write_text("{}")
    open_run(config(seed=1), Distributed())
    assert (previous / "summary.json").exists()
    assert [path.name for path in Path(folder).iterdir()] == ["config.yaml"]
    (folder / "progress").write_text("half")
    open_run(replace(config(seed=1), run=replace(config(seed=1).run, resume=False)), Distributed())
    assert (previous / "progress").exists()


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
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    (folder / "progress").write_text("half")
    open_run(config, Distributed())
    assert (folder / "progress").read_text() == "half"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["layout"] == {"clips": [8, 2]}
    saved["data"]["synthetic_clips"] = [9, 2]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    open_run(config, Distributed())
    assert not (folder / "progress").exists()
