"""The supervised loop: token-level loss on given targets, over the same policy and layout as GRPO."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_core.config.options import SFTConfig
from grpo_core.data import refuse_too_long
from grpo_core.distributed import Distributed, all_reduce_sum, shard
from grpo_core.distributed.stopping import until_stopped
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rng import row_key
from grpo_core.training.batch import check_enough_items, split_by_tokens, step_items
from grpo_core.training.guards import dump_once
from grpo_core.training.loop import TrainingLoop, describe_items
from grpo_core.training.optim import optimizer_step
from grpo_core.training.sanity import check_features_on_all_ranks
from grpo_core.types import Completion, Group, Prompt


@dataclass(frozen=True)
class Example:
    """A prompt and the completion it should get, end token included."""

    prompt: Prompt
    target_ids: tuple[int, ...]

    def as_group(self) -> Group:
        """The target as the only completion of its prompt."""
        unknown = np.full(len(self.target_ids), np.nan, dtype=np.float32)  # nobody sampled it
        return Group(self.prompt, [Completion(self.target_ids, unknown, "stop", "")])


class SFTTrainer(TrainingLoop):
    """Minimises the mean negative log-likelihood of target tokens, averaged over all tokens of a step.

    Dropout, if the policy has any, is on, and seeded by step and rank: a resumed run draws what it would have drawn.

    Raises:
        InputError: fewer examples than a step needs, one that is longer than the model's positions, or a token id that
            the model does not have.
        FirstStepError: in the first step, where a kind of feature has no effect.
    """

    phases = ("forward", "backward", "optimizer")
    shown = ("loss",)

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
        check_enough_items(len(examples), config.run.prompts_per_step)
        sizes = ((example.prompt.id, len(example.prompt.token_ids), len(example.target_ids)) for example in examples)
        refuse_too_long(sizes, policy.causal_lm.config, "its answer")
        policy.check_token_ids((e.prompt for e in examples), (e.target_ids for e in examples))
        super().__init__(policy, config.optim, config.run, dist=dist, save_model=save_model, evaluate=evaluate)
        self.examples = examples

    @cached_property
    def data(self) -> dict[str, Any]:
        return describe_items((e.prompt.id, (*e.prompt.token_ids, *e.target_ids)) for e in self.examples)

    def step(self) -> dict[str, float]:
        """Make one optimiser step over `run.prompts_per_step` examples."""
        started = time.perf_counter()
        step_examples = step_items(self.examples, self.step_index, self.run.prompts_per_step, self.run.seed)
        examples = shard(step_examples, self.dist.rank, self.dist.world_size)
        counts = torch.tensor([sum(len(example.target_ids) for example in examples)], device=self.policy.device)
        # of the whole step, so that gradients of micro-batches and ranks add up to that of the mean
        total_tokens = max(all_reduce_sum(counts, self.dist).item(), 1)
        if self.step_index == 0 and self.run.check_first_step:
            # before the first update, whatever it does: the policy as it was loaded must see every feature
            first = examples[0].as_group() if examples else None
            check_features_on_all_ranks(self.policy, first, 1.0, self.dist)
        # seeds dropout; a key of 64 bits, less one for the sign
        torch.manual_seed(int(row_key(self.run.seed, self.step_index, 0, self.dist.rank)) >> 1)
        self.policy.module.train()
        self.metrics.register("sum", "loss")  # a rank may have no example
        sizes = [len(example.prompt.token_ids) + len(example.target_ids) for example in examples]
        micro_batches = split_by_tokens(examples, sizes, self.optim.max_tokens_per_micro_batch)
        for micro_batch in until_stopped(micro_batches, self.dist):  # nothing moves before the optimiser step
            prompts = [example.prompt for example in micro_batch]
            layout = GroupLayout.pack(
                [prompt.token_ids for prompt in prompts],
                [[example.target_ids] for example in micro_batch],
                self.policy.device,
            )
            with self.clock.phase("forward"):
                loss = -self.policy.logprobs(layout, prompts).logprob.sum() / total_tokens
            with self.clock.phase("backward"):
                loss.backward()
            self.metrics.sum("loss", loss)
        self.policy.module.eval()
        with self.clock.phase("optimizer"):
            grad_norm, lr = optimizer_step(
                self.optimizer, self.parameters.values(), self.optim, self.dist, self.step_index, self.run.max_steps
            )
        self.step_index += 1
        self.metrics.mean("grad_norm", grad_norm)
        self.metrics.mean("learning_rate", lr)
        self.metrics.max("step_time", time.perf_counter() - started)
        for name, seconds in self.clock.read().items():
            self.metrics.max(f"time/{name}", seconds)
        values = self.metrics.reduce()
        if not math.isfinite(values["grad_norm"]):
            batch = [
                {
                    "prompt_id": e.prompt.id,
                    "prompt_token_ids": list(e.prompt.token_ids),
                    "target_ids": list(e.target_ids),
                }
                for e in examples
            ]
            dump_once(self.run.folder, self.step_index, self.dist.rank, {**values, "examples": batch})
        return values
