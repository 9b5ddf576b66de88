"""Rewards, losses, dataset layouts and model families of a user's own, added from outside the source tree and trained.

Every command runs in a process of its own in an empty folder, with the user's files beside it, and trains two steps on
a tiny model; what the run writes shows that the added thing was used.
"""

from __future__ import annotations

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

RECIPE = Path(__file__).parents[2] / "recipes/examples/text_grpo.py"
# the end of a plug-in, by which a test sees when it is imported
NOTE_IMPORT = """

from pathlib import Path

with Path(__file__).with_suffix(".log").open("a") as log:
    log.write("imported\\n")
"""

# --- the user's files --------------------------------------------------------------------------------------------

REWARD = """
def letters(groups):
    return [[c.text.count("g") for c in group.completions] for group in groups]


def share(completion, wanted="g", **others):
    return completion.count(wanted) / len(completion) if completion else None


def brevity(completions, **kwargs):
    return [-len(completion) for completion in completions]
"""
LOSS = (
    """
from grpo_core.algorithm.losses import register_loss


@register_loss("tempered", average="token", source="a test")
class Tempered:
    '''The ratio times the advantage, without a clip.'''

    slope: float = 1.0
    '''Factor of the loss.'''

    def __call__(self, logprob, ratio, advantages):
        return -self.slope * ratio * advantages
"""
    + NOTE_IMPORT
)
LAYOUT = (
    """
from __future__ import annotations

import json
from pathlib import Path

from affectgpt.data.datasets import Sample, register_layout


@register_layout("splits")
class Splits:
    '''A folder per split, with one json of labels.'''

    split: str = "train"
    '''Which folder is read.'''

    def load(self, root: Path, *, labels, reasons, labelled):
        folder = root / self.split
        known = json.loads((folder / "labels.json").read_text())
        return [
            Sample(f"{self.split}/{name}", folder / f"{name}.mp4", folder / f"{name}.wav", folder / f"{name}.npy",
                   subtitle="hello", labels=label if labelled else None)
            for name, label in known.items()
        ]
"""
    + NOTE_IMPORT
)
FAMILY = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
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


# --- a text run --------------------------------------------------------------------------------------------------


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


def start(folder: Path, program: Sequence[str], **options: object) -> subprocess.CompletedProcess:
    """Run a program of ours in a folder."""
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, *program, *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TEXT_OPTIONS = {
    "data": "prompts.jsonl",
    "reward": "rewards.py:share",
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
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after two steps with a reward and a loss of theirs, on a Llama."""
    folder = tmp_path_factory.mktemp("text")
    make_llama(folder / "llama")
    make_nova(folder / "llama", folder / "nova")
    prompts = [{"prompt": "abcd"[i:] + "e", "wanted": "g"} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for name, code in (("rewards.py", REWARD), ("loss.py", LOSS), ("family.py", FAMILY)):
        (folder / name).write_text(code)
    done = start(folder, [str(RECIPE)], model="llama", plugins="loss.py", **TEXT_OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_reward_per_completion_is_what_the_text_recipe_trains_on(text):
    completions = rows(text / "runs/run/completions.jsonl")
    assert len(completions) == 2 * 4 * 8
    expected = [row["text"].count("g") / len(row["text"]) if row["text"] else None for row in completions]
    assert [row["rewards"]["share"] for row in completions] == pytest.approx(expected)
    assert len(set(expected)) > 2


def test_a_loss_of_a_plugin_and_its_option_make_the_loss(text):
    """Sampled and trained by the same weights, a token's ratio is 1: the loss is −slope times the mean advantage."""
    completions = [row for row in rows(text / "runs/run/completions.jsonl") if row["step"] == 1]
    tokens = sum(row["length"] for row in completions)
    mean = sum(row["advantage"] * row["length"] for row in completions) / tokens
    first = rows(text / "runs/run/metrics.jsonl")[0]
    assert abs(mean) > 1e-3
    assert first["loss"] == pytest.approx(-3 * mean, rel=1e-4)


def test_a_model_family_of_a_plugin_is_sampled_and_trained_as_the_llama_it_is(text):
    options = TEXT_OPTIONS | {"model": "nova", "run.name": "nova"}
    flags = ["--plugins", "family.py", "--plugins", "loss.py"]
    done = start(text, [str(RECIPE), *flags], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((text / "runs/nova/model/config.json").read_text())["model_type"] == "nova"
    ours, theirs = (rows(text / "runs" / name / "completions.jsonl") for name in ("nova", "run"))
    assert [row["text"] for row in ours] == [row["text"] for row in theirs]
    trained = load_file(text / "runs/nova/model/model.safetensors")
    before = load_file(text / "nova/model.safetensors")
    assert trained.keys() == before.keys()
    moved = "model.blocks.0.attend.q_proj.weight"
    assert (trained[moved] - before[moved]).abs().max() > 1e-3

    # without its entry the sampler has to use the model's own forward, and this one cannot sample
    (text / "unlisted.py").write_text(FAMILY.partition("register_family(\n")[0])
    flags = ["--plugins", "unlisted.py", "--plugins", "loss.py"]
    refused = start(text, [str(RECIPE), *flags], **options | {"run.name": "unlisted"})
    assert refused.returncode == 1
    assert "rollout/backends/transformers.py" in refused.stderr


def test_a_resumed_run_imports_its_plugin_again(text):
    (text / "loss.log").unlink()
    done = start(text, [str(RECIPE)], model="llama", plugins="loss.py", **TEXT_OPTIONS | {"run.max_steps": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (text / "loss.log").read_text() == "imported\n"
    assert [row["step"] for row in rows(text / "runs/run/metrics.jsonl")] == [1, 2, 3]


# --- an emotion run ----------------------------------------------------------------------------------------------

TRAIN = ["-m", "affectgpt", "train"]


@pytest.fixture(scope="module")
def emotions(
    tiny_llm_folder: Path, tiny_clip_folder: Path, tiny_hubert_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A user's folder after two steps on clips in a layout of theirs, with rewards of all three signatures."""
    folder = tmp_path_factory.mktemp("emotions")
    clips = make_dataset(tmp_path_factory.mktemp("made") / "clips", seed=0, train=6, test=2, workers=1)
    split = folder / "clips/held_in"
    split.mkdir(parents=True)
    labels = {}
    for line in (clips / "track2_train_ovmerd.csv").read_text().splitlines()[1:]:
        name, _, label = line.partition(",")
        labels[name] = label.strip('"')
        for source in ("video/{}.mp4", "audio/{}.wav", "openface_face/{0}/{0}.npy"):
            file = clips / source.format(name)
            file.rename(split / f"{name}{file.suffix}")
    (split / "labels.json").write_text(json.dumps(labels))
    for name, code in (("rewards.py", REWARD), ("layout.py", LAYOUT), ("loss.py", LOSS)):
        (folder / name).write_text(code)
    config = {
        "data": {"format": "splits", "layout": {"split": "held_in"}, "root": "clips", "cache_dir": "features"},
        "model": {
            "llm": str(tiny_llm_folder),
            "visual_encoder": str(tiny_clip_folder),
            "audio_encoder": str(tiny_hubert_folder),
        },
        "reward": {"names": [f"rewards.py:{name}" for name in ("letters", "share", "brevity")]},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "run": {"max_steps": 2, "prompts_per_step": 3, "save_steps": 2},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    plugins = ["--plugins", "layout.py", "--plugins", "loss.py"]
    done = start(
        folder, [*TRAIN, "--config", "mine.yaml", *plugins], loss_type="tempered", **{"algorithm.loss.slope": 0.5}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_rewards_of_all_three_signatures_judge_the_completions(emotions):
    completions = rows(emotions / "runs/run/completions.jsonl")
    assert len(completions) == 2 * 3 * 4
    for row in completions:
        text = row["text"]
        share = text.count("g") / len(text) if text else None
        assert row["rewards"] == {"letters": text.count("g"), "share": share, "brevity": -len(text)}
        assert row["reward"] == pytest.approx(text.count("g") + (share or 0) - len(text))
    assert len({row["reward"] for row in completions}) > 2


def test_a_layout_of_a_plugin_and_its_option_give_the_samples(emotions):
    labels = json.loads((emotions / "clips/held_in/labels.json").read_text())
    completions = rows(emotions / "runs/run/completions.jsonl")
    assert {row["prompt_id"] for row in completions} <= {f"held_in/{name}" for name in labels}
    assert all(row["ground_truth"] == labels[row["prompt_id"].removeprefix("held_in/")] for row in completions)


def test_the_saved_config_names_the_plugins_and_their_options(emotions):
    saved = yaml.safe_load((emotions / "runs/run/config.yaml").read_text())
    assert saved["run"]["plugins"] == [str(emotions / "layout.py"), str(emotions / "loss.py")]
    assert (saved["algorithm"]["loss_type"], saved["algorithm"]["loss"]) == ("tempered", {"slope": 0.5})
    assert (saved["data"]["format"], saved["data"]["layout"]) == ("splits", {"split": "held_in"})


def test_a_run_resumed_from_its_saved_config_imports_its_plugins_again(emotions):
    (emotions / "layout.log").unlink()
    (emotions / "runs/run/summary.json").unlink()  # as if it had been killed before its end
    done = start(emotions, [*TRAIN, "--config", "runs/run/config.yaml"], **{"run.max_steps": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (emotions / "layout.log").read_text() == "imported\n"
    assert [row["step"] for row in rows(emotions / "runs/run/metrics.jsonl")] == [1, 2, 3]
    assert not (emotions / "runs/run.previous").exists()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that import a loss and a layout; what they register is gone afterwards."""
    for registry in (LOSS_TYPES, LAYOUTS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    (tmp_path / "loss.py").write_text(LOSS)
    (tmp_path / "layout.py").write_text(LAYOUT)
    return ["--plugins", str(tmp_path / "loss.py"), "--plugins", str(tmp_path / "layout.py")]


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("algorithm.loss_type", "temperd", "is 'temperd': it wants one of {losses}"),
        ("data.format", "split", "is 'split': it wants one of {layouts}"),
        ("algorithm.loss.steepness", "1", "is no option of loss_type tempered: it has slope"),
        ("data.layout.part", "1", "is no option of format splits: it has split"),
    ],
)
def test_unknown_names_in_a_file_and_on_the_command_line_are_refused_with_those_that_are_known(
    plugins, tmp_path, key, value, fault
):
    chosen = {"algorithm": {"loss_type": "tempered"}, "data": {"format": "splits"}}
    section, *between, leaf = key.split(".")
    target = chosen[section]
    for name in between:
        target = target.setdefault(name, {})
    flags = [word for name in ("algorithm.loss_type tempered", "data.format splits") for word in f"--{name}".split()]
    with pytest.raises(ConfigError) as on_the_command_line:
        load_config(R1Config, [*plugins, *flags, f"--{key}", value])
    target[leaf] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(chosen))
    with pytest.raises(ConfigError) as in_a_file:
        load_config(R1Config, [*plugins, "--config", str(tmp_path / "mine.yaml")])
    assert {"tempered"} <= set(LOSS_TYPES)
    fault = fault.format(losses=", ".join(LOSS_TYPES), layouts=", ".join(LAYOUTS))
    assert str(on_the_command_line.value) == f"{key} (command line) {fault}"
    assert str(in_a_file.value).startswith(f"{key} ({tmp_path / 'mine.yaml'}:")
    assert str(in_a_file.value).endswith(f") {fault}")


def test_unknown_names_from_python_are_refused_with_those_that_are_known(plugins):
    load_config(GRPOConfig, plugins[:2])
    with pytest.raises(ValueError, match=r"^algorithm\.loss_type is 'temperd': it wants one of grpo, .*, tempered$"):
        AlgorithmConfig(loss_type="temperd")
    with pytest.raises(ValueError, match=r"^algorithm\.loss\.steepness is no option of loss_type tempered: it has sl"):
        AlgorithmConfig(loss_type="tempered", loss={"steepness": 1.0})
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
    known = f"choose among {', '.join(REWARDS)}, or name your own by import path, file.py:name or package.module:name"
    assert str(refused.value) == f"unknown reward 'accurcy': {known}"


def test_a_mistyped_name_ends_the_command_with_one_line_and_status_2(tmp_path):
    (tmp_path / "loss.py").write_text(LOSS)
    options = {"plugins": "loss.py", "loss_type": "temperd"}
    for program in ([str(RECIPE), "--model", "x", "--data", "x", "--reward", "x.py:x"], TRAIN):
        done = start(tmp_path, program, **options)
        assert done.returncode == 2
        expected = f"algorithm.loss_type (command line) is 'temperd': it wants one of {', '.join(LOSS_TYPES)}, tempered"
        assert done.stderr == f"error: {expected}\n"
    assert not (tmp_path / "runs").exists()
