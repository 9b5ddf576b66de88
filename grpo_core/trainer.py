"""The GRPO loop: sample groups, score them, compare members, and take a step towards the better ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_core.advantages import combine_moments, group_advantages, has_signal, moments, moments_std
from grpo_core.config import GRPOConfig
from grpo_core.data import by_token_budget, step_items
from grpo_core.distributed import Distributed, all_reduce_sum, gather_objects, gather_rows, shard
from grpo_core.groups import Completion, Group, GroupLayout, Prompt
from grpo_core.loop import TrainingLoop
from grpo_core.losses import LOSS_TYPES, importance_ratio, kl_penalty, policy_loss, sampler_correction, token_weights
from grpo_core.metrics import CompletionsWriter, MetricsWriter
from grpo_core.policy import Policy, disable_dropout
from grpo_core.rewards import Reward, check_reward_weights, score_groups
from grpo_core.sampler import GroupSampler


@dataclass
class MicroBatch:
    """Some groups of a step, packed for one forward and backward; R predicted tokens."""

    prompts: list[Prompt]
    layout: GroupLayout
    advantages: Tensor
    """float32 `[R]`."""
    weights: Tensor
    """float32 `[R]`, of each token's loss in the whole step."""
    sampler_logprob: Tensor
    """float32 `[R]`."""
    reference_logprob: Tensor | None = None
    """float32 `[R]`; None when β = 0."""
    old_logprob: Tensor | None = None
    """float32 `[R]`; set by the first pass over the batch, whose policy is the one that sampled."""


class GRPOTrainer(TrainingLoop):
    """Trains a policy on prompts with rewards. `step` reads top to bottom, a line a stage.

    The policy's dropout is switched off: with it, the ratio to the policy that sampled would not be 1.

    Args:
        policy: what is trained; made with a reference when β > 0.
        sampler: samples groups from the same policy.
        prompts: the training set, the same on every rank.
        rewards: judged together, weighed by `algorithm.reward_weights`.
        config: see `GRPOConfig`.
        dist: this process's place among the ranks.
        save_model: writes a loadable model into a folder; called for every checkpoint.
        evaluate: gives metrics (`eval/…`) of the policy as it is; called on every rank.
        describe: adds columns to a completion's row in `completions.jsonl`.

    Raises:
        ValueError: a weight names no reward, β > 0 without a reference, or too few prompts for a step.
    """

    phases = ("sample", "reward", "reference", "forward", "backward", "optimizer")
    shown = ("reward", "kl", "entropy", "completions/mean_length")

    def __init__(
        self,
        policy: Policy,
        sampler: GroupSampler,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        config: GRPOConfig,
        *,
        dist: Distributed | None = None,
        save_model: Callable[[Path], None] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        describe: Callable[[Group, int], dict[str, Any]] | None = None,
    ):
        check_reward_weights(rewards, config.algorithm.reward_weights)
        if config.algorithm.beta > 0 and policy.reference is None:
            raise ValueError("algorithm.beta is above 0, but the policy keeps no reference: make it with one")
        step_items(prompts, 0, config.run.prompts_per_step, config.run.seed)
        super().__init__(policy, config.optim, config.run, dist=dist, save_model=save_model, evaluate=evaluate)
        self.sampler, self.prompts, self.rewards, self.describe = sampler, prompts, rewards, describe
        self.algorithm, self.rollout = config.algorithm, config.rollout
        disable_dropout(policy.module)

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        self.completions_file = CompletionsWriter(self.run.folder, resume_step)
        return super().open_writer(resume_step)

    def step(self) -> dict[str, float]:
        """One rollout and its optimiser steps."""
        start = time.perf_counter()
        prompts = self.next_prompts()
        groups = self.sample(prompts)
        self.score(groups)
        self.compare(groups)
        batches = self.pack(groups)
        self.reference(batches)
        for iteration in range(self.algorithm.num_iterations):
            self.update(batches, iteration)
        self.step_index += 1
        self.record(groups)
        self.metrics.max("step_time", time.perf_counter() - start)
        return self.report()

    def next_prompts(self) -> Sequence[Prompt]:
        """This rank's share of the step's prompts."""
        run = self.run
        prompts = step_items(self.prompts, self.step_index, run.prompts_per_step, run.seed)
        return shard(prompts, self.dist.rank, self.dist.world_size)

    def sample(self, prompts: Sequence[Prompt]) -> list[Group]:
        """G completions of each prompt."""
        with self.phase("sample"):
            groups = self.sampler.sample(prompts, self.rollout, step=self.step_index)
        completions = [completion for group in groups for completion in group.completions]
        lengths = np.array([len(c.token_ids) for c in completions], dtype=np.float64)
        stopped = np.array([c.finish_reason == "stop" for c in completions], dtype=bool)
        for kind, name in (("mean", "mean_length"), ("min", "min_length"), ("max", "max_length")):
            getattr(self.metrics, kind)(f"completions/{name}", lengths)
        self.metrics.mean("completions/mean_terminated_length", lengths[stopped])
        self.metrics.mean("completions/clipped_ratio", (~stopped).astype(np.float64))
        self.metrics.sum("num_tokens", lengths.sum() + sum(len(prompt.token_ids) for prompt in prompts))
        return groups

    def score(self, groups: list[Group]) -> None:
        """Fill every group's rewards."""
        with self.phase("reward"):
            seconds = score_groups(groups, self.rewards, self.algorithm.reward_weights)
        for name, value in seconds.items():
            values = np.concatenate([group.rewards_by_name[name] for group in groups] or [np.zeros(0)])
            judged = values[~np.isnan(values)]
            self.metrics.mean(f"rewards/{name}/mean", judged)
            self.metrics.mean(f"rewards/{name}/std", _group_std([group.rewards_by_name[name] for group in groups]))
            self.metrics.max(f"rewards/{name}/seconds", value)

    def compare(self, groups: list[Group]) -> None:
        """Fill every group's advantages."""
        rewards = np.array([group.rewards for group in groups]).reshape(len(groups), self.rollout.group_size)
        algorithm, batch_std = self.algorithm, None
        if algorithm.scale_rewards == "batch":
            row = torch.from_numpy(moments(rewards)).to(self.dist.device)
            batch_std = moments_std(combine_moments(gather_rows(row, self.dist).cpu().numpy()))
        advantages = group_advantages(rewards, algorithm.scale_rewards, algorithm.baseline, batch_std=batch_std)
        for group, row in zip(groups, advantages, strict=True):
            group.advantages = row
        signal = has_signal(rewards)
        self.metrics.mean("reward", rewards[~np.isnan(rewards)])
        self.metrics.mean("reward_std", _group_std(rewards))
        self.metrics.mean("frac_reward_zero_std", (~signal).astype(np.float64))
        self.metrics.sum("effective_groups", signal.astype(np.float64))

    def pack(self, groups: list[Group]) -> list[MicroBatch]:
        """Pack groups into micro-batches by the token budget; weigh every token by the counts of the whole step."""
        algorithm, device = self.algorithm, self.policy.device
        lengths = [len(c.token_ids) for group in groups for c in group.completions if self.counts(c)]
        counts = torch.tensor([sum(len(group.completions) for group in groups), sum(lengths)], device=device)
        completions, tokens = all_reduce_sum(counts, self.dist).tolist()
        batches = []
        sizes = [len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups]
        for part in by_token_budget(groups, sizes, self.optim.max_tokens_per_micro_batch):
            layout = GroupLayout.from_groups(part, device)
            members = [completion for group in part for completion in group.completions]
            weights = token_weights(
                torch.tensor([len(c.token_ids) for c in members], device=device),
                layout.completion_index,
                algorithm.loss_type,
                total_completions=completions,
                total_tokens=tokens,
                max_length=self.rollout.max_new_tokens,
                completion_weights=torch.tensor([float(self.counts(c)) for c in members], device=device),
            )
            batches.append(
                MicroBatch(
                    prompts=[group.prompt for group in part],
                    layout=layout,
                    advantages=layout.per_token(np.concatenate([group.advantages for group in part])),
                    weights=weights,
                    sampler_logprob=torch.from_numpy(np.concatenate([c.logprobs for c in members])).to(device),
                )
            )
        return batches

    def counts(self, completion: Completion) -> bool:
        """Whether a completion takes part in the loss: a truncated one may be masked."""
        return not (self.algorithm.mask_truncated_completions and completion.finish_reason == "length")

    def reference(self, batches: list[MicroBatch]) -> None:
        """Log-probabilities under the reference, unless β = 0."""
        if self.algorithm.beta == 0:
            return
        with self.phase("reference"):
            for batch in batches:
                batch.reference_logprob = self.policy.reference_logprobs(
                    batch.layout, batch.prompts, temperature=self.rollout.temperature
                )

    def update(self, batches: list[MicroBatch], iteration: int) -> None:
        """Accumulate the gradient over micro-batches and ranks, and take one optimiser step."""
        algorithm = self.algorithm
        clip_low, clip_high = algorithm.clip_range
        self.policy.module.train()  # gradient checkpointing asks for it; dropout is off
        for batch in batches:
            with self.phase("forward"):
                result = self.policy.logprobs(
                    batch.layout, batch.prompts, temperature=self.rollout.temperature, entropy=True
                )
                if batch.old_logprob is None:
                    batch.old_logprob = result.logprob.detach()
                completions = (batch.layout.completion_index, batch.layout.num_completions)
                surrogate = policy_loss(
                    algorithm.loss_type,
                    result.logprob,
                    batch.old_logprob,
                    batch.advantages,
                    *completions,
                    clip_low=clip_low,
                    clip_high=clip_high,
                    delta=algorithm.delta,
                    cispo_cap=algorithm.cispo_cap,
                )
                token_loss = surrogate.loss
                if algorithm.sampler_correction != "none":
                    token_loss = token_loss * sampler_correction(
                        batch.old_logprob,
                        batch.sampler_logprob,
                        *completions,
                        algorithm.sampler_correction,
                        low=algorithm.sampler_low,
                        high=algorithm.sampler_high,
                    )
                if batch.reference_logprob is not None:
                    ratio = None
                    if algorithm.unbiased_kl:
                        level = LOSS_TYPES[algorithm.loss_type].ratio
                        ratio = importance_ratio(result.logprob, batch.old_logprob, *completions, level)
                    kl = kl_penalty(result.logprob, batch.reference_logprob, algorithm.kl_estimator, ratio)
                    token_loss = token_loss + algorithm.beta * kl
                    self.metrics.mean("kl", kl)
                loss = (batch.weights * token_loss).sum()
            with self.phase("backward"):
                loss.backward()
            self.metrics.sum("loss", loss / algorithm.num_iterations)
            self.metrics.mean("entropy", result.entropy)
            self.metrics.mean("clip_ratio/low_mean", surrogate.clipped_low)
            self.metrics.mean("clip_ratio/high_mean", surrogate.clipped_high)
            self.metrics.mean("clip_ratio/region_mean", surrogate.clipped_low | surrogate.clipped_high)
            if iteration == 0:
                self.compare_with_sampler(result.logprob.detach(), batch.sampler_logprob)
        self.policy.module.eval()
        with self.phase("optimizer"):
            iterations = self.algorithm.num_iterations
            self.optimizer_step(self.step_index * iterations + iteration, self.run.max_steps * iterations)

    def compare_with_sampler(self, logprob: Tensor, sampler_logprob: Tensor) -> None:
        """How far the trainer's log-probabilities are from the sampler's: both come from the same policy."""
        difference = logprob - sampler_logprob
        self.metrics.mean("sampling/sampling_logp_difference/mean", difference.abs())
        self.metrics.max("sampling/sampling_logp_difference/max", difference.abs())
        for kind in ("min", "mean", "max"):
            getattr(self.metrics, kind)(f"sampling/importance_sampling_ratio/{kind}", difference.exp())

    def report(self) -> dict[str, float]:
        """The step's metrics over all ranks: one collective, one host synchronisation."""
        names = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
        names += ["kl"] * (self.algorithm.beta > 0)
        self.metrics.register("sum", "loss")
        self.metrics.register("mean", *names, "sampling/sampling_logp_difference/mean")
        self.metrics.register("max", "sampling/sampling_logp_difference/max")
        for kind in ("min", "mean", "max"):
            self.metrics.register(kind, f"sampling/importance_sampling_ratio/{kind}")
        self.report_phases()
        return self.metrics.reduce()

    def record(self, groups: list[Group]) -> None:
        """Write every completion of the step, all ranks', into `completions.jsonl`."""
        rows = [
            {
                "prompt_id": group.id,
                "member": member,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "length": len(completion.token_ids),
                "rewards": {name: float(values[member]) for name, values in group.rewards_by_name.items()},
                "reward": float(group.rewards[member]),
                "advantage": float(group.advantages[member]),
                **(self.describe(group, member) if self.describe else {}),
            }
            for group in groups
            for member, completion in enumerate(group.completions)
        ]
        parts = gather_objects(rows, self.dist)
        if self.dist.main_process:
            self.completions_file.write(self.step_index, [row for part in parts for row in part])


def _group_std(rewards: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation within each group that has two judged members, `[≤ N]`."""
    judged = [row[~np.isnan(row)] for row in rewards]
    return np.array([row.std(ddof=1) for row in judged if len(row) > 1])
