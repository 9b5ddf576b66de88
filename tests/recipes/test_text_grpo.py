"""The text recipe as a user runs it: a saved model, a jsonl of prompts, a reward in a file."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes/examples/text_grpo.py"
REWARDS = """
def share(prompt, completion, wanted, **others):
    assert isinstance(prompt, str if others["chat"] is False else list)
    return completion.count(wanted) / len(completion) if completion else None
"""
SMALL = {
    "run.max_steps": "12",
    "run.prompts_per_step": "4",
    "run.save_steps": "12",
    "rollout.group_size": "8",
    "rollout.max_new_tokens": "6",
    "optim.learning_rate": "1e-2",
    "algorithm.beta": "0.001",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer, prompts of both kinds and a reward."""
    folder = tmp_path_factory.mktemp("text")
    letters = {letter: i for i, letter in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    spelling = Tokenizer(models.BPE(letters, merges=[]))
    spelling.pre_tokenizer, spelling.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}x{{ m['content'] }}{% endfor %}y"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=28, num_hidden_layers=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": "abcd"[i:] + "e", "wanted": "g", "chat": False} for i in range(4)]
    rows += [{"prompt": [{"role": "user", "content": "abcd"[i:]}], "wanted": "g", "chat": True} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags(inputs: Path, **changed: str) -> list[str]:
    options = {"model": inputs / "model", "data": inputs / "prompts.jsonl", "reward": f"{inputs / 'rewards.py'}:share"}
    return [text for key, value in (options | SMALL | changed).items() for text in (f"--{key}", str(value))]


def test_two_ranks_learn_what_a_python_function_rewards(inputs, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(RECIPE)]
    command = [*launcher, *flags(inputs, **{"run.output_dir": str(tmp_path)})]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert metrics[0]["reward"] < 0.15
    assert sum(row["rewards/share/mean"] for row in metrics[-3:]) / 3 > metrics[0]["reward"] + 0.2
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 12 * 4 * 8
    for row in completions[:50]:
        assert not row["text"] or row["rewards"]["share"] == row["text"].count("g") / len(row["text"])
    saved = Qwen2ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(saved.lm_head.weight, Qwen2ForCausalLM.from_pretrained(inputs / "model").lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").decode([8]) == "g"


@pytest.fixture(scope="module")
def recipe():
    found = importlib.util.spec_from_file_location("text_grpo", RECIPE)
    module = importlib.util.module_from_spec(found)
    sys.modules["text_grpo"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    yield module
    del sys.modules["text_grpo"]


def start(recipe, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["text_grpo.py", *arguments])
    recipe.main()


def test_adapters_alone_are_trained_and_saved_with_lora(recipe, monkeypatch, inputs, tmp_path):
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "2", "run.save_steps": "0", "lora_r": "4"}
    start(recipe, monkeypatch, flags(inputs, **changed))
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert tensors
    assert all("lora_" in name for name in tensors)
    assert not any("lm_head" in name for name in tensors)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_several_rewards_are_weighed_by_name(recipe, monkeypatch, inputs, tmp_path):
    (inputs / "length.py").write_text("def short(completions):\n    return [-float(len(c)) for c in completions]\n")
    specs = f"{inputs / 'rewards.py'}:share,{inputs / 'length.py'}:short"
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "1", "algorithm.reward_weights.short": "0.25"}
    start(recipe, monkeypatch, flags(inputs, reward=specs, **changed))
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert {tuple(row["rewards"]) for row in completions} == {("share", "short")}
    shares = {}
    for row in completions:
        if row["text"]:
            shares.setdefault(row["prompt_id"], []).append(row["text"].count("g") / len(row["text"]))
    for row in completions:
        # None for an empty text, which then counts as the mean of what the group's others got
        others = shares.get(row["prompt_id"], [0.0])
        share = row["text"].count("g") / len(row["text"]) if row["text"] else sum(others) / len(others)
        # TRL's signature gets a chat's completion as a list of one message
        length = 1 if row["prompt_id"] in "5678" else len(row["text"])
        assert row["rewards"]["short"] == -length
        assert row["reward"] == pytest.approx(share - 0.25 * length)


def test_a_loss_type_of_a_plug_in_can_be_named(recipe, monkeypatch, inputs, tmp_path):
    (inputs / "plain.py").write_text(
        "from grpo_core import register_loss\n\n\n"
        '@register_loss("plain", average="token")\n'
        "def plain(logprob, ratio, advantages):\n"
        "    return -ratio * advantages\n"
    )
    plugin = {"plugins": str(inputs / "plain.py"), "loss_type": "plain"}
    start(recipe, monkeypatch, flags(inputs, **plugin, **{"run.output_dir": str(tmp_path), "run.max_steps": "1"}))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["grad_norm"] > 0
    assert row["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "{inputs}/none"}, "none"),
        ({"reward": "{inputs}/none.py:share"}, "there is no file .*none.py"),
        ({"reward": "{inputs}/rewards.py:shares"}, "defines no 'shares'; did you mean 'share'"),
        ({"reward": "no_such_module:share"}, "no_such_module cannot be imported"),
        ({"reward": "{inputs}/rewards.py"}, "is not an import path"),
        ({"data": "{inputs}/none.jsonl"}, "none.jsonl"),
        ({"data": "{inputs}/without_wanted.jsonl"}, "share reads the column 'wanted', which prompt '2' lacks"),
        ({"data": "{inputs}/without_prompt.jsonl"}, "line 2 has no column 'prompt', but wanted, chat"),
        ({"data": "{inputs}/without_object.jsonl"}, "line 1 has no column 'prompt', but 3"),
        ({"data": "{inputs}/cut_off.jsonl"}, "line 1 is not JSON"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_trained(recipe, monkeypatch, inputs, tmp_path, changed, message):
    whole = '{"prompt": "ab", "wanted": "a", "chat": false}\n'
    (inputs / "without_wanted.jsonl").write_text(whole + '{"prompt": "ab", "chat": false}\n')
    (inputs / "without_prompt.jsonl").write_text(whole + '{"wanted": "ab", "chat": false}\n')
    (inputs / "without_object.jsonl").write_text("3\n")
    (inputs / "cut_off.jsonl").write_text(whole[:9])
    changed = {key: value.format(inputs=inputs) for key, value in changed.items()}
    with pytest.raises((ValueError, OSError), match=message):
        start(recipe, monkeypatch, flags(inputs, **changed, **{"run.output_dir": str(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line_and_exit_status_1(inputs):
    command = [sys.executable, str(RECIPE), *flags(inputs, reward=f"{inputs / 'rewards.py'}:shares")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("error: reward ")
    assert "Traceback" not in run.stderr


def test_options_are_refused_with_exit_status_2(recipe, monkeypatch, inputs, capsys):
    with pytest.raises(SystemExit) as leaving:
        start(recipe, monkeypatch, flags(inputs, reward="[]"))
    assert leaving.value.code == 2
    assert "reward is empty" in capsys.readouterr().err
