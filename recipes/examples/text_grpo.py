"""GRPO on any causal LM of Hugging Face, with a reward written in Python: the way in for those who know TRL.

    python recipes/examples/text_grpo.py --model Qwen2.5-0.5B-Instruct --data prompts.jsonl --reward rewards.py:brevity

A line of the data has a `prompt`, text or a list of chat messages, and what else the reward reads: it is called as
`reward(prompt=…, completion=…, **columns)` and gives a float, or None where it cannot judge. Also under torchrun."""

import json
import pkgutil
import runpy
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from grpo_core import distributed, policy
from grpo_core import types as groups
from grpo_core.config import loader as cli
from grpo_core.config import options as config
from grpo_core.rollout import sampler
from grpo_core.training import grpo as trainer


@dataclass(kw_only=True)
class Config(config.GRPOConfig):
    model: str
    """Folder of a causal LM in safetensors."""
    data: Path
    """Jsonl file of prompts."""
    reward: str
    """The reward, file.py:function or module:function."""
    lora_r: int = 0
    """Rank of LoRA adapters on all linear layers but the head. 0: all weights are trained, in float32."""


class PythonReward:
    def __init__(self, spec: str):
        source, _, self.name = spec.rpartition(":")
        code = runpy.run_path(source).get(self.name) if source.endswith(".py") else pkgutil.resolve_name(spec)
        if not callable(code):
            raise ValueError(f"--reward {spec} names no function: give file.py:function or module:function")
        self.function, self.signature = code, signature(code)

    def __call__(self, groups):
        return [[self.function(completion=c.text, **g.prompt.sample) for c in g.completions] for g in groups]


def read_prompt(number: int, row: dict, tokenizer, reward: PythonReward) -> groups.Prompt:
    try:
        text = reward.signature.bind(completion="", **row) and row["prompt"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"--data, line {number}: columns {list(row)} do not fit {reward.name}: {error}") from error
    if chat := not isinstance(text, str):
        text = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
    return groups.Prompt(str(number), tuple(tokenizer(text, add_special_tokens=not chat).input_ids), sample=row)


def main() -> None:
    run, dist = cli.load_config(Config, description=__doc__), distributed.init()
    local = {"local_files_only": True, "use_safetensors": True}
    set_seed(run.run.seed)  # fresh adapters are drawn from it
    reward, tokenizer = PythonReward(run.reward), AutoTokenizer.from_pretrained(run.model, **local)
    with run.data.open(encoding="utf-8") as lines:
        prompts = [read_prompt(number, json.loads(line), tokenizer, reward) for number, line in enumerate(lines, 1)]
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto" if run.lora_r else "float32", **local)
    if run.lora_r:
        model = get_peft_model(model, LoraConfig(r=run.lora_r, lora_alpha=2 * run.lora_r, target_modules="all-linear"))
    reference = run.algorithm.reference if run.algorithm.beta else None
    learner = policy.Policy(model.to(dist.device), reference=reference, offload=run.algorithm.reference_offload)
    draws = sampler.GroupSampler(learner, tokenizer, seed=run.run.seed)
    trainer.GRPOTrainer(learner, draws, prompts, [reward], run, dist=dist, save_model=model.save_pretrained).train()
    if dist.main_process:
        model.save_pretrained(run.run.folder / "model"), tokenizer.save_pretrained(run.run.folder / "model")
    distributed.finalize(dist)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
