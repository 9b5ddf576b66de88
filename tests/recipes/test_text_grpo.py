"""The text recipe as a user runs it: a saved model, a jsonl of prompts, a reward in a file."""

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_core.algorithm.losses import LOSS_TYPES
from grpo_core.config.fields import ConfigError
from grpo_core.errors import run_program

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


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_another_experiment_under_the_name_of_a_finished_one_goes_beside_it(
    recipe, monkeypatch, inputs, tmp_path, capsys
):
    short = {"run.output_dir": str(tmp_path), "run.max_steps": "1"}
    start(recipe, monkeypatch, flags(inputs, **short))
    kept = contents(tmp_path / "run")
    assert {"config.yaml", "sessions.jsonl", "finished.json", "report.html", "model/model.safetensors"} <= kept.keys()
    with pytest.raises((ValueError, OSError), match="none"):
        start(recipe, monkeypatch, flags(inputs, **short | {"model": str(inputs / "none")}))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    capsys.readouterr()
    start(recipe, monkeypatch, flags(inputs, **short | {"optim.learning_rate": "1e-3", "run.seed": "5"}))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"run folder: {tmp_path / 'run-2'} ({tmp_path / 'run'} holds a finished run)"
    assert said[-1] == f"run folder: {tmp_path / 'run-2'}"
    assert contents(tmp_path / "run") == kept
    (row,) = [json.loads(line) for line in (tmp_path / "run-2/metrics.jsonl").read_text().splitlines()]
    assert row["learning_rate"] == pytest.approx(1e-3)
    page = kept["report.html"].decode()
    assert "reward: " in page
    assert "Completions of step 1" in page
    assert "emotion" not in page


def test_an_unfinished_run_refuses_another_experiment_and_goes_on_with_its_own(recipe, monkeypatch, inputs, tmp_path):
    (inputs / "length.py").write_text("def short(completions):\n    return [-float(len(c)) for c in completions]\n")
    options = {"run.output_dir": str(tmp_path), "run.max_steps": "3", "run.save_steps": "1"}

    class Killed(Exception):
        pass

    step = recipe.GRPOTrainer.step

    def die_in_the_third_step(trainer):
        if trainer.step_index == 2:
            raise Killed
        return step(trainer)

    monkeypatch.setattr(recipe.GRPOTrainer, "step", die_in_the_third_step)
    with pytest.raises(Killed):
        start(recipe, monkeypatch, flags(inputs, **options))
    monkeypatch.setattr(recipe.GRPOTrainer, "step", step)
    kept = contents(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"unfinished run .at step 2. of other options .reward was .*rewards.py:share"
    ):
        start(recipe, monkeypatch, flags(inputs, **options | {"reward": f"{inputs / 'length.py'}:short"}))
    assert contents(tmp_path / "run") == kept
    # less memory, and the model's folder under another name: the same run
    moved = tmp_path / "moved"
    moved.symlink_to(inputs / "model")
    same = {"optim.max_tokens_per_micro_batch": "64", "model": str(moved)}
    start(recipe, monkeypatch, flags(inputs, **options | same))
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "moved"}


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(recipe, monkeypatch, inputs, tmp_path, capsys):
    options = {"run.output_dir": str(tmp_path), "run.max_steps": "2", "run.save_steps": "1"}
    start(recipe, monkeypatch, flags(inputs, **options | {"run.name": "whole"}))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["text_grpo.py", *flags(inputs, **options)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "whole/model/model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # every larger file fails, as on a full disk
    try:
        assert run_program(recipe.main) in (1, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "27" in said[0]  # EFBIG; on a full disk ENOSPC
    assert not (tmp_path / "run/finished.json").exists()
    start(recipe, monkeypatch, flags(inputs, **options))
    files = ("model/model.safetensors", "completions.jsonl")
    assert all((tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_adapters_alone_are_trained_and_saved_with_lora(recipe, monkeypatch, inputs, tmp_path):
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "2", "run.save_steps": "0", "lora_r": "4"}
    start(recipe, monkeypatch, flags(inputs, **changed))
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert tensors
    assert all("lora_" in name for name in tensors)
    assert not any("lm_head" in name for name in tensors)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_an_adapter_folder_is_continued_and_saved_as_one_adapter(recipe, monkeypatch, inputs, tmp_path, capsys):
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "2", "run.save_steps": "0"}
    start(recipe, monkeypatch, flags(inputs, **changed, lora_r="4", **{"run.name": "first"}))
    adapter = tmp_path / "first" / "model"
    first = load_file(adapter / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "second", ignore_errors=True)
    start(recipe, monkeypatch, flags(inputs, model=adapter, **changed, **{"run.name": "second"}))
    assert f"the adapter in {adapter} is continued" in capsys.readouterr().out
    second = load_file(tmp_path / "second" / "model" / "adapter_model.safetensors")
    assert second.keys() == first.keys()
    moved = max(float((second[name] - tensor).abs().max()) for name, tensor in first.items())
    assert 0 < moved < 0.2  # on from the first one's weights, not from fresh ones, whose B are zero
    base = Qwen2ForCausalLM.from_pretrained(inputs / "model")
    whole = PeftModel.from_pretrained(base, tmp_path / "second" / "model")
    assert len(whole.peft_config) == 1
    with pytest.raises(ValueError, match=r"lora_r is 8, but .* holds an adapter of rank 4, which is continued"):
        start(recipe, monkeypatch, flags(inputs, model=adapter, lora_r="8", **changed, **{"run.name": "third"}))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(("option", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_bf16_checkpoint_is_written_as_it_came_or_as_asked(recipe, monkeypatch, inputs, tmp_path, option, dtype):
    shutil.copytree(inputs / "model", tmp_path / "half")
    Qwen2ForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "1", "run.save_steps": "1", "save_dtype": option}
    start(recipe, monkeypatch, flags(inputs, model=tmp_path / "half", **changed))
    for file in (tmp_path / "run").rglob("model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    (trained,) = (tmp_path / "run").rglob("trained.safetensors")
    assert {tensor.dtype for tensor in load_file(trained).values()} == {torch.float32}  # a resumed run loses nothing
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == dtype


def test_a_prompt_knows_its_template_and_its_begin_token(recipe, inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.chat_template = "{% for m in messages %}x{{ m['content'] }}{% endfor %}y<think>"
    chat = recipe.make_prompt(1, {"prompt": [{"role": "user", "content": "a"}]}, tokenizer)
    assert chat.opened == "<think>"
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    frame = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.backend_tokenizer.post_processor = frame
    for text in ("<pad>ab", "ab"):
        assert recipe.make_prompt(1, {"prompt": text}, tokenizer).token_ids == (0, 2, 3)


def test_the_end_of_a_turn_ends_completions_of_chats(recipe, monkeypatch, inputs, tmp_path):
    """The template ends turns with z, the tokenizer's end of sequence is another token."""
    shutil.copytree(inputs / "model", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.chat_template = "{% for m in messages %}x{{ m['content'] }}<turn>{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("z")
    tokenizer.chat_template = tokenizer.chat_template.replace("<turn>", "z")
    tokenizer.add_tokens([AddedToken("z", special=True)])
    tokenizer.save_pretrained(tmp_path / "base")
    assert tokenizer.convert_tokens_to_ids("z") == turn
    made = []
    sampler = recipe.GroupSampler
    monkeypatch.setattr(recipe, "GroupSampler", lambda *a, **k: made.append(k["end_tokens"]) or sampler(*a, **k))
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "1"}
    start(recipe, monkeypatch, flags(inputs, model=tmp_path / "base", **changed))
    assert made == [(turn,)]


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
    monkeypatch.setattr(LOSS_TYPES, "_entries", dict(LOSS_TYPES._entries))  # what the plug-in adds is undone
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


def test_prompts_that_cannot_be_used_are_named_and_the_others_go_on(recipe, monkeypatch, inputs, tmp_path, caplog):
    good = [{"prompt": "abcde"[i:] + "\u2028", "wanted": "g", "chat": False} for i in range(4)]
    rows = [
        *good,
        {"prompt": 5},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [{"role": "user"}]},
        {"prompt": "a" * 32_763},  # with six tokens more than the model's 32,768 positions
    ]
    data = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"wanted": "g", "chat": False} | row, ensure_ascii=False) for row in rows]
    data.write_text("\n".join(lines), encoding="utf-8")
    changed = {"run.output_dir": str(tmp_path), "run.max_steps": "1", "data": str(data), "min_coverage": "0.4"}
    with caplog.at_level("WARNING"):
        start(recipe, monkeypatch, flags(inputs, **changed))
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().split("\n")[:-1]]
    assert {row["prompt_id"] for row in completions} == {"1", "2", "3", "4"}
    skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert [text.split(": ")[0] for text in skipped[:-1]] == [f"skipped {data}, line {n}" for n in range(5, 11)]
    assert skipped[-1] == "skipped 6 of 10 prompts"
    assert "config.max_position_embeddings 32768" in skipped[-2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "{inputs}/none"}, "model: there is no folder .*none: give the folder of a model"),
        ({"model": "Qwen/Qwen2.5-0.5B"}, "hf download Qwen/Qwen2.5-0.5B --local-dir DIR"),
        ({"model": "{inputs}/rewards.py"}, "rewards.py is a file"),
        ({"reward": "{inputs}/none.py:share"}, "there is no file .*none.py"),
        ({"reward": "{inputs}/rewards.py:shares"}, "defines no 'shares'; did you mean 'share'"),
        ({"reward": "no_such_module:share"}, "no_such_module cannot be imported"),
        ({"reward": "{inputs}/rewards.py"}, "is not an import path"),
        ({"data": "{inputs}/none.jsonl"}, "none.jsonl"),
        ({"data": "{inputs}/without_wanted.jsonl"}, "share reads the column 'wanted', which prompt '2' lacks"),
        ({"data": "{inputs}/without_prompt.jsonl"}, "line 2 has no column 'prompt', but wanted, chat"),
        ({"data": "{inputs}/without_object.jsonl"}, "line 1 has no column 'prompt', but 3"),
        ({"data": "{inputs}/cut_off.jsonl"}, "cut_off.jsonl, line 1: not JSON"),
        ({"data": "{inputs}/broken.jsonl"}, "broken.jsonl, line 3: not JSON"),
        ({"data": "{inputs}/table.jsonl"}, "table.jsonl: a parquet file. Convert it to a text file in UTF-8 with one"),
        ({"data": "{inputs}/numbers.jsonl"}, "only 1 of 3 prompts can be used, .* line 2: prompt is 5, not text"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_trained(recipe, monkeypatch, inputs, tmp_path, changed, message):
    whole = '{"prompt": "ab", "wanted": "a", "chat": false}\n'
    (inputs / "without_wanted.jsonl").write_text(whole + '{"prompt": "ab", "chat": false}\n')
    (inputs / "without_prompt.jsonl").write_text(whole + '{"wanted": "ab", "chat": false}\n')
    (inputs / "without_object.jsonl").write_text("3\n")
    (inputs / "cut_off.jsonl").write_text(whole[:9])
    (inputs / "broken.jsonl").write_text(whole + "\n" + whole[:9] + "\n")
    (inputs / "table.jsonl").write_bytes(b"PAR1\x15\x04")
    (inputs / "numbers.jsonl").write_text(whole + whole.replace('"ab"', "5") + whole.replace('"ab"', "null"))
    changed = {key: value.format(inputs=inputs) for key, value in changed.items()}
    with pytest.raises((ValueError, OSError), match=message):
        start(recipe, monkeypatch, flags(inputs, **changed, **{"run.output_dir": str(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line_and_exit_status_2(inputs):
    command = [sys.executable, str(RECIPE), *flags(inputs, reward=f"{inputs / 'rewards.py'}:shares")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: reward ")
    assert "Traceback" not in run.stderr


def test_a_bug_in_a_reward_is_one_line_with_the_users_line_and_exit_status_1(
    recipe, monkeypatch, inputs, tmp_path, capsys
):
    (inputs / "buggy.py").write_text("def share(completion, wanted):\n    return open('/no/such/key').read()\n")
    arguments = flags(inputs, reward=f"{inputs / 'buggy.py'}:share", **{"run.output_dir": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["text_grpo.py", *arguments])
    assert run_program(recipe.main) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: reward 'share' failed on 100 % of the completions of step 1, such as prompt '")
    assert f"{inputs / 'buggy.py'}:2, `return open('/no/such/key').read()`" in line
    assert not (tmp_path / "run" / "model").exists()


def test_options_are_refused_with_exit_status_2(recipe, monkeypatch, inputs, capsys):
    with pytest.raises(SystemExit) as leaving:
        start(recipe, monkeypatch, flags(inputs, reward="[]"))
    assert leaving.value.code == 2
    assert "reward is empty" in capsys.readouterr().err
