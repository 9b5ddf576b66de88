"""GRPO on any causal LM of Hugging Face, with rewards written in Python. Read this first; copy it for your own task.

    python recipes/examples/text_grpo.py --model MODEL --data prompts.jsonl --reward rewards.py:brevity
    torchrun --nproc_per_node=8 recipes/examples/text_grpo.py --model MODEL ...      the same on eight GPUs

Each line of the data is a JSON object with a `prompt`, which is text or a list of chat messages. Its other columns are
for the rewards: a function `brevity(completion, wanted)` gets the column `wanted`. docs/guides/own_reward.md has the
forms that a reward may have. The trained model, its metrics and its completions are written to `runs/run/`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from grpo_core import GroupSampler, GRPOConfig, GRPOTrainer, Policy, Prompt, Reward, load_config, load_reward
from grpo_core.distributed import finalize, init
from grpo_core.reward_adapters import check_columns
from grpo_core.training.guards import TrainingStopped


# A run's options are the fields of a dataclass: GRPOConfig brings the sections algorithm, rollout, optim and run. Each
# field is a command-line option and a YAML key, and the text below it is its help.
@dataclass(kw_only=True)
class TextConfig(GRPOConfig):
    model: str
    """Folder of a causal LM in safetensors."""
    data: Path
    """Jsonl file of prompts."""
    reward: tuple[str, ...]
    """Rewards, each file.py:name or package.module:name, separated by commas; algorithm.reward_weights weighs them."""
    lora_r: int = 0
    """Rank of LoRA adapters on all linear layers but the head. 0: all weights are trained, in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward:
            raise ValueError("reward is empty: name at least one, file.py:name or package.module:name")


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Make one prompt of each line of a jsonl.

    Raises:
        ValueError: a line that is not a JSON object with a `prompt`.
    """
    prompts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): write one object per line") from error
            if not isinstance(row, dict) or "prompt" not in row:
                columns = ", ".join(row) if isinstance(row, dict) else repr(row)
                raise ValueError(f"{path}, line {number} has no column 'prompt', but {columns}: add it")
            prompts.append(make_prompt(number, row, tokenizer))
    return prompts


def make_prompt(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenize the `prompt` of a row, and keep the row for the rewards.

    Args:
        number: of the line, from 1. It becomes the prompt's id, which names the group in logs and keys its random
            numbers: it must be unique, and the same when a run is resumed.
    """
    text = row["prompt"]
    if isinstance(text, str):
        token_ids = tokenizer(text).input_ids
    else:
        text = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        # the template has written the special tokens already; with a second BOS the model would see a new kind of text
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
    return Prompt(str(number), tuple(token_ids), sample=row)


def main() -> None:
    config = load_config(TextConfig, description=__doc__)

    # What is quick to check comes first: a wrong path or column should not cost the minutes that loading a model takes.
    rewards: list[Reward] = [load_reward(spec) for spec in config.reward]
    tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    prompts = read_prompts(config.data, tokenizer)
    for reward in rewards:
        for prompt in prompts:
            check_columns(reward, prompt)

    # Under torchrun, one process per GPU; otherwise this process is all there is.
    dist = init()
    # Every rank makes the same fresh adapters. Sampling needs no seed here: its random numbers are counters.
    set_seed(config.run.seed)

    # Trained weights are float32: an update of 1e-6 would vanish in bfloat16. A frozen base may be in half precision.
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype="auto" if config.lora_r else "float32", local_files_only=True, use_safetensors=True
    )
    if config.lora_r:
        # all-linear leaves the head alone, whose weight the fused log-probs read as it is
        adapters = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    model.to(dist.device)

    # The policy computes log-probs of whole groups, each prompt once. It keeps a reference only if there is a KL
    # penalty, as the reference is a copy of all trained weights.
    reference: Any = config.algorithm.reference if config.algorithm.beta > 0 else None
    policy = Policy(model, reference=reference, offload=config.algorithm.reference_offload)
    # The sampler draws from the same weights: there is no second engine to keep in step.
    sampler = GroupSampler(policy, tokenizer, seed=config.run.seed)
    trainer = GRPOTrainer(policy, sampler, prompts, rewards, config, dist=dist, save_model=model.save_pretrained)
    trainer.train()  # continues from the newest checkpoint in run.folder, if there is one

    if dist.main_process:
        folder = config.run.folder / "model"
        model.save_pretrained(folder)  # with LoRA, the adapters alone
        tokenizer.save_pretrained(folder)
        print(folder)
    finalize(dist)


if __name__ == "__main__":
    # Mistakes in paths, columns and options, and a run that stops itself, are one line and not a traceback.
    try:
        main()
    except (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
