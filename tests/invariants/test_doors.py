"""Rewards, losses, dataset layouts and model families of a user's own, added from outside the source tree and trained.

Every command runs in a process of its own, in a folder that holds nothing but the files that docs/guides has readers
write, and trains two steps on a tiny model; what the run writes shows that the added thing was used.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from affectgpt.config import R1Config
from affectgpt.data.datasets import LAYOUTS
from affectgpt.rewards import REWARDS
from affectgpt.synthetic import make_dataset
from grpo_core.algorithm.losses import LOSS_TYPES
from grpo_core.config.fields import ConfigError
from grpo_core.config.loader import load_config
from grpo_core.config.options import AlgorithmConfig, GRPOConfig
from grpo_core.families import family_names, get_family
from tests.commands import split
from tests.test_docs import BLOCKS, commands_of, files_of_readers

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/examples/text_grpo.py")
TRAIN = ["-m", "affectgpt", "train"]

# --- what the guides do not have ---------------------------------------------------------------------------------

# a loss whose value can be told from what the run writes
LOSS = """
from grpo_core import register_loss


@register_loss("tempered", average="token", source="a test")
class Tempered:
    slope: float = 1.0

    def __call__(self, logprob, ratio, advantages):
        return -self.slope * ratio * advantages
"""
# Llama's computation under other attribute names; its own forward has no cache: only the fused decoder can sample it
FAMILY = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from grpo_core.families import Family, register_family


class NovaConfig(LlamaConfig):
    model_type = "nova"


class NovaBlock(LlamaDecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.attend, self.norm1 = self.self_attn, self.input_layernorm
        del self.self_attn, self.input_layernorm

    def forward(self, x, rotations, mask, **kwargs):
        x = x + self.attend(self.norm1(x), position_embeddings=rotations, attention_mask=mask, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class NovaModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.final, self.blocks = self.norm, self.layers
        del self.norm, self.layers
        for index in range(config.num_hidden_layers):
            self.blocks[index] = NovaBlock(config, index)
        self.post_init()

    def forward(self, inputs_embeds, position_ids, attention_mask, use_cache, **kwargs):
        x, rotations = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids=position_ids)
        for block in self.blocks:
            x = block(x, rotations, attention_mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.final(x))


class NovaForCausalLM(LlamaForCausalLM):
    config_class = NovaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = NovaModel(config)
        self.post_init()

    def forward(self, input_ids, use_cache=False):  # one sequence alone: what the comparison needs
        length = input_ids.shape[1]
        mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
        positions = torch.arange(length)[None]
        x = self.model(self.get_input_embeddings()(input_ids), positions, mask, use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(x))


AutoConfig.register("nova", NovaConfig)
AutoModelForCausalLM.register(NovaConfig, NovaForCausalLM)
register_family(
    Family(
        "nova",
        layers="blocks",
        final_norm="final",
        input_norm="norm1",
        q="attend.q_proj",
        k="attend.k_proj",
        v="attend.v_proj",
        o="attend.o_proj",
    )
)
"""
NOVA_NAMES = {
    "model.layers": "model.blocks",
    "model.norm": "model.final",
    "self_attn": "attend",
    "input_layernorm": "norm1",
}


# --- running -----------------------------------------------------------------------------------------------------


def start(folder: Path, program: Sequence[str], **options: object) -> subprocess.CompletedProcess:
    """Run a program of ours in a folder."""
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, *program, *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def follow(guide: str, program: str, folder: Path, *more: str) -> None:
    """Run the commands of a guide that start with this program, as they are written but for options behind them."""
    page = f"docs/guides/{guide}.md"
    commands = [split(command) for block in BLOCKS if block.page == page for command in commands_of(block)]
    commands = [words for words in commands if " ".join(words).startswith(program) and "--help" not in words]
    assert commands
    for words in commands:
        script = [str(ROOT / words[1])] if words[1].startswith("recipes/") else [words[1]]
        front = script if words[0] == "python" else ["-m", *words[:2]]
        done = start(folder, [*front, *words[2:], *more])
        assert done.returncode == 0, (words, done.stderr[-3000:])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guides' files, and the tiny model and prompts that one of them makes."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in files_of_readers().items():
        (folder / name).write_text(text)
    follow("own_reward", "python make_inputs.py", folder)
    return folder


# --- text runs ---------------------------------------------------------------------------------------------------


def make_llama(folder: Path) -> None:
    """Save a two-layer Llama over the letters, and its tokenizer."""
    letters = {letter: i for i, letter in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    spelling = Tokenizer(models.BPE(letters, merges=[]))
    spelling.pre_tokenizer, spelling.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_nova(llama: Path, folder: Path) -> None:
    """Save the same weights as a model of another type, under other names."""
    folder.mkdir()
    weights = load_file(llama / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in NOVA_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "nova", "architectures": ["NovaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for file in llama.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


SHORT = ("--run.max_steps", "2", "--run.save_steps", "2")
TEXT = {
    "data": "prompts.jsonl",
    "reward": "my_rewards.py:share",
    "optim.learning_rate": 1e-2,
    "rollout.group_size": 8,
    "rollout.max_new_tokens": 6,
    "run.max_steps": 2,
    "run.prompts_per_step": 4,
    "run.save_steps": 2,
    "loss_type": "tempered",
    "algorithm.loss.slope": 3,
}


@pytest.fixture(scope="module")
def llama(written: Path) -> Path:
    """The folder, after two steps of a Llama with the loss above: `runs/llama`."""
    make_llama(written / "llama")
    (written / "loss.py").write_text(LOSS)
    done = start(written, [RECIPE], model="llama", plugins="loss.py", **TEXT, **{"run.name": "llama"})
    assert done.returncode == 0, done.stderr[-3000:]
    return written


def test_rewards_of_all_three_signatures_judge_and_log(written):
    follow("own_reward", "python recipes", written, *SHORT, "--run.name", "rewards")
    completions = rows(written / "runs/rewards/completions.jsonl")
    assert len(completions) == 2 * 4 * 8
    for first in range(0, len(completions), 8):
        group = completions[first : first + 8]
        shortest = min(row["length"] for row in group)
        for row in group:
            text = row["text"]
            share = text.count("g") / len(text) if text else None
            starts, short = float(text.startswith("g")), float(row["length"] == shortest)
            assert row["rewards"] == {"share": share, "starts": starts, "shortest": short}
            assert row["reward"] == pytest.approx((share or 0) + starts + 0.1 * short)
            assert row["tokens"] == row["length"]  # a column that `shortest` logs
    assert len({row["reward"] for row in completions}) > 2
    for step, row in enumerate(rows(written / "runs/rewards/metrics.jsonl"), 1):
        started = any(r["rewards"]["starts"] for r in completions if r["step"] == step)
        assert row["starts/any"] == float(started)


def test_a_loss_and_its_option_make_the_loss(llama):
    """Sampled and trained by the same weights, a token's ratio is 1: the loss is −slope times the mean advantage."""
    completions = [row for row in rows(llama / "runs/llama/completions.jsonl") if row["step"] == 1]
    tokens = sum(row["length"] for row in completions)
    mean = sum(row["advantage"] * row["length"] for row in completions) / tokens
    first = rows(llama / "runs/llama/metrics.jsonl")[0]
    assert abs(mean) > 1e-3
    assert first["loss"] == pytest.approx(-3 * mean, rel=1e-4)


def test_a_resumed_run_imports_its_plugin_again_and_is_refused_without(written):
    follow("own_loss", "python recipes", written, *SHORT, "--run.name", "loss")
    follow("own_loss", "python recipes", written, "--run.max_steps", "3", "--run.name", "loss")
    metrics = rows(written / "runs/loss/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[1]["grad_norm"] > 0
    options = TEXT | {"loss_type": "soft_reinforce", "algorithm.loss.sharpness": -1, "model": "tiny"}
    del options["algorithm.loss.slope"]
    done = start(written, [RECIPE, "--plugins", "my_loss.py"], **options)
    assert done.stderr == "error: algorithm.loss.sharpness is -1.0: set it to 0 or above\n"
    done = start(written, [RECIPE], **options)
    assert done.stderr.startswith("error: algorithm.loss_type (command line) is 'soft_reinforce': it wants one of grpo")


def test_a_model_family_is_sampled_and_trained_as_the_guide_says(written):
    follow("own_model", "python my_model.py", written)
    follow("own_model", "python recipes", written, *SHORT, "--run.name", "model")
    assert json.loads((written / "runs/model/model/config.json").read_text())["model_type"] == "my_llama"
    before, after = (
        load_file(written / f"{folder}/model.safetensors") for folder in ("tiny_llama", "runs/model/model")
    )
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (after[moved] - before[moved]).abs().max() > 1e-3


def test_a_model_family_of_other_attribute_names_writes_what_the_same_llama_writes(llama):
    make_nova(llama / "llama", llama / "nova")
    (llama / "family.py").write_text(FAMILY)
    options = TEXT | {"model": "nova", "run.name": "nova"}
    done = start(llama, [RECIPE, "--plugins", "family.py", "--plugins", "loss.py"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (rows(llama / "runs" / name / "completions.jsonl") for name in ("nova", "llama"))
    assert [row["text"] for row in ours] == [row["text"] for row in theirs]
    assert (
        load_file(llama / "runs/nova/model/model.safetensors").keys()
        == load_file(llama / "nova/model.safetensors").keys()
    )
    # without its entry the sampler has to use the model's own forward
    (llama / "unlisted.py").write_text(FAMILY.partition("register_family(\n")[0])
    flags = ["--plugins", "unlisted.py", "--plugins", "loss.py"]
    refused = start(llama, [RECIPE, *flags], **options | {"run.name": "unlisted"})
    assert refused.returncode == 2
    assert "model type 'nova'" in refused.stderr
    assert "unexpected keyword argument 'inputs_embeds'" in refused.stderr


# --- emotion runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(
    written: Path,
    tiny_llm_folder: Path,
    tiny_clip_folder: Path,
    tiny_hubert_folder: Path,
) -> Path:
    """The folder, with clips and models where the guide's slower commands put them."""
    make_dataset(written / "clips", seed=0, train=8, test=2, workers=1)
    (written / "models").mkdir()
    for name, folder in (("llm", tiny_llm_folder), ("visual", tiny_clip_folder), ("audio", tiny_hubert_folder)):
        (written / "models" / name).symlink_to(folder)
    return written


def test_a_layout_gives_supervised_training_and_evaluation_their_samples(clips):
    follow("own_dataset", "affectgpt sft", clips)
    follow("own_dataset", "affectgpt evaluate", clips)
    assert len(rows(clips / "runs/mine/metrics.jsonl")) == 2
    evaluation = json.loads((clips / "runs/run/evaluations/evaluation.json").read_text())
    with (clips / "clips/track2_test.csv").open(newline="") as table:
        names = {row["name"] for row in csv.DictReader(table)}
    assert {sample["name"] for sample in evaluation["samples"]} == names


@pytest.fixture(scope="module")
def emotions(clips: Path) -> Path:
    """The folder after two steps of `affectgpt train` with a layout, a loss and two rewards of the guides."""
    config = {
        "data": {"format": "my_table", "layout": {"labels_column": "openset"}, "root": "clips"},
        "model": {"llm": "models/llm", "visual_encoder": "models/visual", "audio_encoder": "models/audio"},
        "prompt": {"face_or_frame": "multiframe_audio_frame_text"},
        "reward": {"names": ["my_rewards.py:few_words", "my_rewards.py:shortest", "accuracy"]},
        "algorithm": {"loss_type": "soft_reinforce", "loss": {"sharpness": 2}},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "run": {"name": "emotions", "max_steps": 2, "prompts_per_step": 3, "save_steps": 2},
    }
    (clips / "mine.yaml").write_text(yaml.safe_dump(config))
    done = start(clips, [*TRAIN, "--config", "mine.yaml", "--plugins", "my_layout.py", "--plugins", "my_loss.py"])
    assert done.returncode == 0, done.stderr[-3000:]
    return clips


def test_rewards_read_the_columns_of_the_layouts_samples(emotions):
    with (emotions / "clips/track2_train_ovmerd.csv").open(newline="") as table:
        labels = {row["name"]: row["openset"] for row in csv.DictReader(table)}
    completions = rows(emotions / "runs/emotions/completions.jsonl")
    assert len(completions) == 2 * 3 * 4
    for row in completions:
        assert row["ground_truth"] == labels[row["prompt_id"]]
        words, wanted = row["text"].split(), labels[row["prompt_id"]].split()
        assert row["rewards"]["few_words"] == -float(len(words) > len(wanted))
        assert row["tokens"] == row["length"]
    assert {row["rewards"]["shortest"] for row in completions} == {0, 1}


def test_the_saved_config_names_the_plugins_and_their_options(emotions):
    saved = yaml.safe_load((emotions / "runs/emotions/config.yaml").read_text())
    assert saved["run"]["plugins"] == [str(emotions / "my_layout.py"), str(emotions / "my_loss.py")]
    assert (saved["algorithm"]["loss_type"], saved["algorithm"]["loss"]) == ("soft_reinforce", {"sharpness": 2})
    assert saved["data"]["format"] == "my_table"
    assert saved["data"]["layout"] == {"name_column": "name", "labels_column": "openset"}


def test_a_run_resumed_from_its_saved_config_imports_its_plugins_again(emotions):
    (emotions / "runs/emotions/finished.json").unlink()  # as if it had been killed before its end
    done = start(emotions, [*TRAIN, "--config", "runs/emotions/config.yaml"], **{"run.max_steps": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in rows(emotions / "runs/emotions/metrics.jsonl")] == [1, 2, 3]
    assert not (emotions / "runs/emotions-2").exists()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that import a loss and a layout; what they register is gone afterwards."""
    for registry in (LOSS_TYPES, LAYOUTS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    files = files_of_readers()
    for name in ("my_loss.py", "my_layout.py"):
        (tmp_path / name).write_text(files[name])
    return ["--plugins", str(tmp_path / "my_loss.py"), "--plugins", str(tmp_path / "my_layout.py")]


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("algorithm.loss_type", "soft_reinforse", "is 'soft_reinforse': it wants one of {losses}"),
        ("data.format", "my_tabel", "is 'my_tabel': it wants one of {layouts}"),
        ("algorithm.loss.slope", "1", "is not an option of loss_type soft_reinforce: it has sharpness"),
        ("data.layout.column", "1", "is not an option of format my_table: it has name_column, labels_column"),
    ],
)
def test_unknown_names_in_a_file_and_on_the_command_line_are_refused_with_those_that_are_known(
    plugins, tmp_path, key, value, fault
):
    chosen: dict[str, Any] = {"algorithm": {"loss_type": "soft_reinforce"}, "data": {"format": "my_table"}}
    flags = ["--algorithm.loss_type", "soft_reinforce", "--data.format", "my_table"]
    with pytest.raises(ConfigError) as on_the_command_line:
        load_config(R1Config, [*plugins, *flags, f"--{key}", value])
    section, *between, leaf = key.split(".")
    target = chosen[section]
    for name in between:
        target = target.setdefault(name, {})
    target[leaf] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(chosen))
    with pytest.raises(ConfigError) as in_a_file:
        load_config(R1Config, [*plugins, "--config", str(tmp_path / "mine.yaml")])
    assert "soft_reinforce" in LOSS_TYPES
    assert "my_table" in LAYOUTS
    fault = fault.format(losses=", ".join(LOSS_TYPES), layouts=", ".join(LAYOUTS))
    assert str(on_the_command_line.value) == f"{key} (command line) {fault}"
    assert str(in_a_file.value).startswith(f"{key} ({tmp_path / 'mine.yaml'}:")
    assert str(in_a_file.value).endswith(f") {fault}")


def test_unknown_names_from_python_are_refused_with_those_that_are_known(plugins):
    load_config(GRPOConfig, plugins[:2])
    with pytest.raises(ValueError, match=r"^algorithm\.loss_type is 'soft': it wants one of grpo, .*, soft_reinforce$"):
        AlgorithmConfig(loss_type="soft")
    with pytest.raises(
        ValueError, match=r"^algorithm\.loss\.slope is not an option of loss_type soft_reinforce: it has "
    ):
        AlgorithmConfig(loss_type="soft_reinforce", loss={"slope": 1.0})
    with pytest.raises(ValueError, match=f"^model family 'nova' is not known: use one of: {family_names()}; or add it"):
        get_family("nova")


@pytest.mark.parametrize("source", ["file", "command line"])
def test_an_unknown_reward_is_refused_with_those_that_are_known(tmp_path, source):
    if source == "file":
        (tmp_path / "mine.yaml").write_text("reward: {names: [accurcy]}")
        arguments = ["--config", str(tmp_path / "mine.yaml")]
    else:
        arguments = ["--reward.names", "[accurcy]"]
    with pytest.raises(ConfigError) as refused:
        load_config(R1Config, arguments)
    known = f"choose among {', '.join(REWARDS)}, or name one by import path, file.py:name or package.module:name"
    assert str(refused.value) == f"reward.names has 'accurcy', which is not a reward: {known}"


def test_a_mistyped_name_ends_the_command_with_one_line_and_status_2(written):
    known = f"{', '.join(LOSS_TYPES)}, soft_reinforce"
    for program in ([RECIPE, "--model", "tiny", "--data", "prompts.jsonl", "--reward", "my_rewards.py:share"], TRAIN):
        done = start(written, program, **{"plugins": "my_loss.py", "loss_type": "soft", "run.name": "mistyped"})
        assert done.returncode == 2
        assert done.stderr == f"error: algorithm.loss_type (command line) is 'soft': it wants one of {known}\n"
    assert not (written / "runs/mistyped").exists()
