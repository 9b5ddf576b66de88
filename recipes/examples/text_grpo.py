"""GRPO on any causal LM of Hugging Face, with rewards written in Python. Read this first; copy it for your own task.

    python recipes/examples/text_grpo.py --model MODEL --data prompts.jsonl --reward rewards.py:brevity
    torchrun --nproc_per_node=8 recipes/examples/text_grpo.py --model MODEL ...      the same on eight GPUs

Each line of the data is a JSON object with a `prompt`, which is text or a list of chat messages. Its other columns are
for the rewards: a function `brevity(completion, wanted)` gets the column `wanted`. docs/guides/own_reward.md has the
forms that a reward may have. The trained model, its metrics, its completions and a report are written to `runs/run/`.
The same command again continues a run that was killed; beside a finished one it starts the next, `runs/run-2/`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, set_seed

from grpo_core import GroupSampler, GRPOConfig, GRPOTrainer, Policy, Prompt, Reward, load_config, load_reward
from grpo_core.chat import encode_chat, encode_text, turn_end
from grpo_core.config import option
from grpo_core.data import check_coverage, length_limit, read_jsonl, report_skipped
from grpo_core.distributed import finalize, init
from grpo_core.errors import InputError, run_program
from grpo_core.model_folder import is_adapter
from grpo_core.pretrained import load_causal_lm, load_tokenizer, read_adapter, save_model, stored_dtype
from grpo_core.report import try_report
from grpo_core.reward_adapters import check_columns
from grpo_core.storage.run_folder import open_run


# A run's options are the fields of a dataclass: GRPOConfig brings the sections algorithm, rollout, optim and run. Each
# field is a command-line option and a YAML key, and the text below it is its help.
@dataclass(kw_only=True)
class TextConfig(GRPOConfig):
    model: str = option(free=True)  # a folder may move between the starts of a run
    """Folder of a causal LM in safetensors, or of a LoRA adapter, whose training is then continued."""
    data: Path
    """Jsonl file of prompts."""
    reward: tuple[str, ...]
    """Rewards, each file.py:name or package.module:name, separated by commas; algorithm.reward_weights weighs them."""
    lora_r: int = 0
    """Rank of LoRA adapters on all linear layers but the head. 0: all weights are trained, in float32."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", free=True)
    """Dtype of the trained model's file where all weights are trained; auto is that of the checkpoint in `model`."""
    min_coverage: float = option(0.8, free=True)
    """Share of the lines whose prompt must be usable; the others are left out and named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward:
            raise InputError("reward is empty: name at least one, file.py:name or package.module:name")
        if not 0 <= self.min_coverage <= 1:
            raise InputError(f"min_coverage is {self.min_coverage}: set it in [0, 1]")


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict[str, str]]:
    """Make one prompt of each line of a jsonl.

    Returns:
        The prompts, and the reason by file and line for each line whose prompt cannot be used: it is left out.

    Raises:
        InputError: a line that is not a JSON object with a `prompt`.
    """
    prompts: list[Prompt] = []
    skipped: dict[str, str] = {}
    for where, line, row in read_jsonl(path):
        if not isinstance(row, dict) or "prompt" not in row:
            columns = ", ".join(row) if isinstance(row, dict) else repr(row)
            raise InputError(f"{where} has no column 'prompt', but {columns}: add it")
        if not is_prompt(row["prompt"]):
            skipped[where] = f"prompt is {row['prompt']!r}, not text or a list of messages with role and content"
            continue
        try:
            prompts.append(make_prompt(line, row, tokenizer))
        except Exception as error:  # a chat template may refuse a conversation by any error
            skipped[where] = f"its prompt cannot be tokenized ({type(error).__name__}: {error})"
    return prompts, skipped


def is_prompt(value: object) -> bool:
    """Whether a value is text or chat messages. Templates print what they do not find as nothing, or as `None`."""
    if not isinstance(value, list):
        return isinstance(value, str) and bool(value)
    return bool(value) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
        for message in value
    )


def make_prompt(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenize the `prompt` of a row, and keep the row for the rewards.

    Args:
        number: of the line, from 1. It becomes the prompt's id, which names the group in logs and keys its random
            numbers: it must be unique, and the same when a run is resumed.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Prompt(str(number), tuple(encode_text(tokenizer, prompt)), sample=row)
    # What the template opens for the answer (`<think>`) is the prompt's to the model, and the answer's to the rewards.
    token_ids, opened = encode_chat(tokenizer, prompt)
    return Prompt(str(number), tuple(token_ids), sample=row, opened=opened)


def load_model(config: TextConfig) -> Any:
    """Load the model with what is trained of it: all weights, fresh adapters, or those of an adapter's folder."""
    if is_adapter(config.model):
        rank = getattr(read_adapter(config.model, "model")[0], "r", 0)
        if config.lora_r not in (0, rank):
            raise InputError(
                f"lora_r is {config.lora_r}, but {config.model} holds an adapter of rank {rank}, which is continued: "
                "leave lora_r out, or merge the adapter into its base and give that"
            )
        return load_causal_lm(config.model, "model")
    # Trained weights are float32: an update of 1e-6 would vanish in bfloat16. A frozen base may be in half precision.
    model: Any = load_causal_lm(config.model, "model", dtype="auto" if config.lora_r else "float32")
    if config.lora_r:
        # all-linear leaves the head alone, whose weight the fused log-probs read as it is
        adapters = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    return model


def main() -> None:
    config = load_config(TextConfig, description=__doc__)

    # What is quick to check comes first: a wrong path or column should not cost the minutes that loading a model takes.
    rewards: list[Reward] = [load_reward(spec) for spec in config.reward]
    tokenizer = load_tokenizer(config.model, "model")
    prompts, skipped = read_prompts(config.data, tokenizer)
    check_coverage(skipped, len(prompts) + len(skipped), config.min_coverage, what="prompts", key="min_coverage")
    for reward in rewards:
        for prompt in prompts:
            check_columns(reward, prompt)

    # Under torchrun, one process per GPU; otherwise this process is all there is.
    dist = init(timeout_seconds=config.run.rank_timeout, watchdog_seconds=config.run.watchdog_seconds)
    # Find the run's folder. One that holds another run is refused now, and not after the model is loaded.
    run = open_run(config, dist)
    config = run.config
    # Every rank makes the same fresh adapters. Sampling needs no seed here: its random numbers are counters.
    set_seed(config.run.seed)

    model = load_model(config)
    model.to(dist.device)
    if dist.main_process and is_adapter(config.model):
        print(f"the adapter in {config.model} is continued")
    # Of a model that is trained whole, the file has the dtype that it came in; adapters are saved as they are.
    auto = config.save_dtype == "auto" and not isinstance(model, PeftModel)
    dtype = stored_dtype(config.model, "model") if auto else getattr(torch, config.save_dtype, None)
    save = partial(save_model, model, dtype=dtype)

    # The policy computes log-probs of whole groups, each prompt once. It keeps a reference only if there is a KL
    # penalty, as the reference is a copy of all trained weights.
    reference: Any = config.algorithm.reference if config.algorithm.beta > 0 else None
    policy = Policy(model, reference=reference, offload=config.algorithm.reference_offload)

    # A prompt that leaves no room for its completion would end the run in the step that draws it.
    limit, total = length_limit(policy.causal_lm.config), len(prompts) + len(skipped)
    for prompt in prompts if limit else ():
        if fault := limit.fault(len(prompt.token_ids), config.rollout.max_new_tokens, "rollout.max_new_tokens"):
            skipped[f"{config.data}, line {prompt.id}"] = fault
    prompts = [prompt for prompt in prompts if f"{config.data}, line {prompt.id}" not in skipped]
    if dist.main_process:
        report_skipped(skipped, total, "prompts")
    check_coverage(skipped, total, config.min_coverage, what="prompts", key="min_coverage")

    # Prompts by a chat template are answered until its turn ends, which need not be the end of the sequence.
    chat = any(not isinstance(prompt.sample["prompt"], str) for prompt in prompts)
    end = turn_end(tokenizer) if chat else None
    # The sampler draws from the same weights: there is no second engine to keep in step.
    sampler = GroupSampler(policy, tokenizer, seed=config.run.seed, end_tokens=() if end is None else (end,))
    trainer = GRPOTrainer(policy, sampler, prompts, rewards, config, dist=dist, save_model=save)
    # Everything is loaded, so the folder may become this run's: config, command and versions are written to it.
    run.begin()
    trainer.train()  # continues from the newest checkpoint in run.path, if there is one

    if dist.main_process:
        save(run.path / "model")  # with LoRA, the adapters alone
        tokenizer.save_pretrained(run.path / "model")
        try_report(run.path)
    run.finish()  # last: until this is written, the next start continues the run
    finalize(dist)


if __name__ == "__main__":
    # Mistakes in paths, columns and options are one line, not a traceback.
    sys.exit(run_program(main))
