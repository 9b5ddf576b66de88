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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from grpo_core import GroupSampler, GRPOConfig, GRPOTrainer, Policy, Reward, load_config, load_reward, pretrained
from grpo_core.chat import turn_end
from grpo_core.config import option
from grpo_core.distributed import finalize, init
from grpo_core.errors import InputError, run_program
from grpo_core.model_folder import is_adapter
from grpo_core.report import try_report
from grpo_core.storage.run_folder import open_run
from grpo_core.text_prompts import load_text_prompts
from grpo_core.training.grpo import check_inputs


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
        if self.lora_r < 0:
            raise InputError(f"lora_r is {self.lora_r}: set it to 0 (all weights are trained) or above")
        if not 0 <= self.min_coverage <= 1:
            raise InputError(f"min_coverage is {self.min_coverage}: set it in [0, 1]")


def load_model(config: TextConfig) -> tuple[Any, Callable[[Path], None]]:
    """Load the model with what is trained of it (all weights, fresh adapters, or those of an adapter's folder), and
    return it with the function that writes that into a folder."""
    if is_adapter(config.model):
        rank = getattr(pretrained.read_adapter(config.model, "model")[0], "r", 0)
        if config.lora_r not in (0, rank):
            raise InputError(
                f"lora_r is {config.lora_r}, but {config.model} holds an adapter of rank {rank}, which is continued: "
                "leave lora_r out, or merge the adapter into its base and give that"
            )
        adapted = pretrained.load_causal_lm(config.model, "model")
        return adapted, partial(pretrained.save_model, adapted)
    # Trained weights are float32: an update of 1e-6 would vanish in bfloat16. A frozen base may be in half precision.
    model: Any = pretrained.load_causal_lm(config.model, "model", dtype="auto" if config.lora_r else "float32")
    if config.lora_r:
        # all-linear leaves the head alone, whose weight the fused log-probs read as it is
        adapters = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear")
        model = get_peft_model(model, adapters)
        return model, partial(pretrained.save_model, model)
    # the float32 is for training: the file has the dtype that the model came in
    auto = config.save_dtype == "auto"
    dtype = pretrained.stored_dtype(config.model, "model") if auto else getattr(torch, config.save_dtype)
    return model, partial(pretrained.save_model, model, dtype=dtype)


def main() -> None:
    config = load_config(TextConfig, description=__doc__)

    # Under torchrun, one process per GPU; otherwise this process is all there is.
    dist = init(timeout_seconds=config.run.rank_timeout, watchdog_seconds=config.run.watchdog_seconds)
    # What is quick to check comes first: a wrong path or column should not cost the minutes that loading a model takes.
    rewards: list[Reward] = [load_reward(spec) for spec in config.reward]
    tokenizer = pretrained.load_tokenizer(config.model, "model")
    prompts = load_text_prompts(
        config.data,
        tokenizer,
        pretrained.read_causal_lm_config(config.model, "model"),
        max_new_tokens=config.rollout.max_new_tokens,
        min_coverage=config.min_coverage,
        report=dist.main_process,
    )
    check_inputs(prompts, rewards, config)
    # Find the run's folder. One that holds another run is refused now, and not after the model is loaded.
    run = open_run(config, dist)
    config = run.config
    # Every rank makes the same fresh adapters. Sampling needs no seed here: its random numbers are counters.
    set_seed(config.run.seed)

    model, save = load_model(config)
    if dist.main_process and is_adapter(config.model):
        print(f"the adapter in {config.model} is continued")
    model.to(dist.device)
    # The policy computes log-probs of whole groups, each prompt once. It keeps a reference only if there is a KL
    # penalty, as the reference is a copy of all trained weights.
    reference: Any = config.algorithm.reference if config.algorithm.beta > 0 else None
    policy = Policy(model, reference=reference, offload=config.algorithm.reference_offload)
    # Prompts by a chat template are answered until its turn ends, which need not be the end of the sequence.
    chat = any(isinstance(prompt.sample["prompt"], list) for prompt in prompts)
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
