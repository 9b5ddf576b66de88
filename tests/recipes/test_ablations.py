"""The published variants as configs, and the ablation table they are compared in."""

import json
from functools import partial

import pytest

from affectgpt import ablations
from affectgpt import config as options
from affectgpt.config import R1Config
from affectgpt.configs import CONFIGS
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.synthetic import make_dataset
from grpo_core.config.loader import ConfigError, load_config

VARIANTS = {
    ("demo",): ["accuracy"],
    ("demo", "demo_think"): ["accuracy", "format"],
    ("r1_no_think",): ["accuracy"],
    ("r1_no_think", "r1_no_think_p1"): ["accuracy"],
    ("r1_no_think", "r1_no_think_p2"): ["accuracy"],
    ("r1_no_think", "r1_no_think_p3"): ["accuracy"],
    ("r1_think",): ["accuracy", "format"],
    ("r1_think", "r1_think_v3_without_judge"): ["accuracy", "format", "alignment", "dual"],
    ("r1_think", "r1_think_v3"): ["accuracy", "format", "alignment", "dual", "perception"],
}


def read(files, *more: str) -> R1Config:
    return load_config(R1Config, [*(text for f in files for text in ("--config", str(CONFIGS / f"{f}.yaml"))), *more])


def with_judge(monkeypatch) -> None:
    """Rewards as a script of one's own makes them, with a judge that always prefers the first answer."""
    monkeypatch.setattr(options, "make_rewards", partial(options.make_rewards, judge=lambda pairs: [1.0] * len(pairs)))


@pytest.mark.parametrize("files", VARIANTS, ids="+".join)
def test_every_variant_makes_its_rewards(files, monkeypatch, tmp_path):
    with_judge(monkeypatch)
    (tmp_path / "config.json").write_text("{}")  # a folder with this file passes for a judge until it is loaded
    config = read(files, *(["--reward.judge", str(tmp_path)] if files[-1] == "r1_think_v3" else []))
    names = [reward.name for reward in config.rewards(EmotionWheel.default())]
    assert names == VARIANTS[files]
    assert config.algorithm.reward_weights.keys() <= set(names)
    thinks = files[-1] == "demo_think" or files[0] == "r1_think"
    assert config.prompt.mode == ("think" if thinks else "no_think")
    if len(files) == 2 and files[1][-2:] in ("p1", "p2", "p3"):
        assert config.reward.length_penalty == files[1][-2:].upper()
        assert config.optim == read(files[:1]).optim


def test_every_config_file_is_tried_here():
    tried = {name for files in VARIANTS for name in files} | {"sft"}  # sft.yaml is of another recipe
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tried


def test_all_five_rewards_are_refused_without_a_judge():
    with pytest.raises(ConfigError, match=r"perception reward needs a judge .* set reward\.judge"):
        read(("r1_think", "r1_think_v3"))


def test_a_mistake_is_refused_before_any_row_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "train", lambda *arguments: pytest.fail("a row was trained"))
    with pytest.raises(ConfigError, match=r"unknown key 'algorithm\.bta'"):
        ablations.main(["--output-dir", str(tmp_path), "--algorithm.bta", "1"])


def test_rows_differ_by_what_they_say():
    def config(row):
        files = [text for file in ablations.MODES[row.mode] for text in ("--config", str(CONFIGS / f"{file}.yaml"))]
        return load_config(R1Config, files + ablations.flags(row.options))

    configs = {row.name: config(row) for row in ablations.ROWS}
    assert {name: (c.prompt.mode, c.reward.names, c.reward.length_penalty) for name, c in configs.items()} == {
        "accuracy": ("think", ("accuracy",), "none"),
        "accuracy_format": ("think", ("accuracy", "format"), "none"),
        "four": ("think", ("accuracy", "format", "alignment", "dual"), "none"),
        "no_think": ("no_think", ("accuracy",), "none"),
        "no_think_p2": ("no_think", ("accuracy",), "P2"),
    }
    assert configs["four"].algorithm.reward_weights == {"format": 0.2, "alignment": 0.4, "dual": 0.6}
    assert all(c.optim == configs["no_think"].optim for c in configs.values())


def test_the_table_has_our_scores_beside_the_papers(
    monkeypatch, tmp_path, tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder
):
    small = {
        "data.root": make_dataset(tmp_path / "clips", seed=0, train=16, test=4, workers=1),
        "data.cache_dir": tmp_path / "features",
        "data.layout.clips": "[16, 4]",
        "data.validation_fraction": 0.25,
        "model.llm": tiny_llm_folder,
        "model.visual_encoder": tiny_clip_folder,
        "model.audio_encoder": tiny_hubert_folder,
        "cold_start.max_steps": 2,
        "cold_start.eval_steps": 2,
        "cold_start.prompts_per_step": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 8,
        "run.prompts_per_step": 4,
    }
    monkeypatch.setattr(ablations, "ROWS", ablations.ROWS[-2:])  # a row costs seconds
    runs = tmp_path / "runs"
    ablations.main(["--steps", "1", "--output-dir", str(runs), *ablations.flags(small)])

    first, second = json.loads((runs / "table.json").read_text())
    assert (first["name"], second["name"]) == ("no_think", "no_think_p2")
    assert first["clips"] == 4
    for row in (first, second):
        evaluation = json.loads((runs / row["name"] / "evaluations" / "grpo.json").read_text())
        assert row["f1"] == pytest.approx(100 * evaluation["f1"])
    assert (runs / "no_think" / "cold_start").is_dir()
    assert not (runs / "no_think_p2" / "cold_start").exists()  # it starts from the first row's
    assert second["cold_start"] == first["cold_start"]
    table = (runs / "table.md").read_text()
    assert f"| accuracy × P2 | no | {second['cold_start']:.2f} | {second['f1']:.2f} |" in table
    assert table.splitlines()[-1].endswith("| 67.79 |")
