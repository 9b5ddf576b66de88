"""The supervised loop: token-level loss on given targets, over the same policy and layout as GRPO."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_core.config.options import SFTConfig
from grpo_core.data import by_token_budget, step_items
from grpo_core.distributed.collectives import Distributed, all_reduce_sum, shard
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rng import row_key
from grpo_core.training.loop import TrainingLoop
from grpo_core.types import Prompt


@dataclass(frozen=True)
class Example:
    """A prompt and the completion it should get, end token included."""

    prompt: Prompt
    target_ids: tuple[int, ...]


class SFTTrainer(TrainingLoop):
    """Minimises the mean negative log-likelihood of target tokens, averaged over all tokens of a step.

    Dropout, if the policy has any, is on, and seeded by step and rank: a resumed run draws what it would have drawn.
    """

    phases = ("forward", "backward", "optimizer")
    shown = ("loss", "eval/f1")

    def __init__(
        self,
        policy: Policy,
        examples: Sequence[Example],
        config: SFTConfig,
        *,
        dist: Distributed | None = None,
        save_model: Callable[[Path], Any] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ):
        super().__init__(policy, config.optim, config.run, dist=dist, save_model=save_model, evaluate=evaluate)
        step_items(examples, 0, config.run.prompts_per_step, config.run.seed)
        self.examples = examples

    def step(self) -> dict[str, float]:
        """One optimiser step over `run.prompts_per_step` examples."""
        start = time.perf_counter()
        examples = step_items(self.examples, self.step_index, self.run.prompts_per_step, self.run.seed)
        examples = shard(examples, self.dist.rank, self.dist.world_size)
        counts = torch.tensor([sum(len(example.target_ids) for example in examples)], device=self.policy.device)
        total = max(all_reduce_sum(counts, self.dist).item(), 1)
        torch.manual_seed(int(row_key(self.run.seed, self.step_index, 0, self.dist.rank)) >> 1)
        self.policy.module.train()
        self.metrics.register("sum", "loss")
        for part in self.micro_batches(examples):
            layout = GroupLayout.pack(
                [example.prompt.token_ids for example in part],
                [[example.target_ids] for example in part],
                self.policy.device,
            )
            with self.phase("forward"):
                loss = -self.policy.logprobs(layout, [example.prompt for example in part]).logprob.sum() / total
            with self.phase("backward"):
                loss.backward()
            self.metrics.sum("loss", loss)
        self.policy.module.eval()
        with self.phase("optimizer"):
            self.optimizer_step(self.step_index, self.run.max_steps)
        self.step_index += 1
        self.metrics.max("step_time", time.perf_counter() - start)
        self.report_phases()
        return self.metrics.reduce()

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Consecutive examples of together at most `optim.max_tokens_per_micro_batch` tokens."""
        lengths = [len(example.prompt.token_ids) + len(example.target_ids) for example in examples]
        return by_token_budget(examples, lengths, self.optim.max_tokens_per_micro_batch)
