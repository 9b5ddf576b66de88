"""A task small enough to train in seconds: write the token `7` as often as possible."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_core.config.options import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, RunConfig
from grpo_core.distributed import Distributed, all_reduce_gradients
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.training.batch import Experience
from grpo_core.training.grpo import GRPOTrainer
from grpo_core.types import Prompt
from tests.grpo_core.conftest import make_lm

PROMPTS = [Prompt(f"p{i}", tuple(10 + (i * k) % 50 for k in range(1, 4 + i % 3))) for i in range(12)]


class CountSevens:
    """Share of sevens among a completion's tokens; the text is words w0 w1 …, so `w7`."""

    name = "sevens"

    def __call__(self, groups):
        return np.array([[c.token_ids.count(7) / len(c.token_ids) for c in group.completions] for group in groups])


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0", unk_token="w2")


def make_trainer(
    folder: Path,
    *,
    dist: Distributed | None = None,
    lora: bool = True,
    steps: int = 6,
    evaluate: Callable[[], dict[str, float]] | None = None,
    **overrides,
) -> GRPOTrainer:
    """A GRPO run on the toy task; `overrides` go to the sections that have them."""
    options = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6, "learning_rate": 1e-2} | overrides

    def section(cls, **fixed):
        own = {key: value for key, value in options.items() if key in cls.__dataclass_fields__}
        return cls(**(own | fixed))

    config = GRPOConfig(
        section(AlgorithmConfig),
        section(RolloutConfig),
        section(OptimConfig),
        section(RunConfig, name="toy", output_dir=folder, max_steps=steps),
    )
    model = make_lm("qwen2", lora=lora, hidden_size=32)
    policy = Policy(model, reference=config.algorithm.reference if config.algorithm.beta else None)
    sampler = GroupSampler(policy, make_tokenizer(), seed=config.run.seed)
    return GRPOTrainer(policy, sampler, PROMPTS, [CountSevens()], config, dist=dist, evaluate=evaluate)


def loss_and_gradient(trainer: GRPOTrainer, experience: Experience) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of an epoch over the experience, over all ranks; the parameters stay as they are."""

    def no_step(optimizer, parameters, config, dist, step, max_steps):
        all_reduce_gradients(parameters, dist)
        return torch.zeros(()), 0.0

    if trainer.dist.main_process:
        trainer.open_writer(None)
    with patch("grpo_core.training.grpo.optimizer_step", no_step):
        updates = trainer.learn(experience)
    loss = trainer.report(experience, updates, 0.0)["loss"]
    return loss, torch.cat([p.grad.flatten() for p in trainer.parameters.values()])


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    """All trained parameters, flat."""
    return torch.cat([p.detach().flatten() for p in trainer.parameters.values()])


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl` or `completions.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]
