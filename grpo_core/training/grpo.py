"""The GRPO loop: sample groups, score them, compare members, and take a step towards the better ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_core.algorithm.advantages import (
    choose_groups,
    combine_moments,
    combined_advantages,
    group_advantages,
    has_signal,
    moments,
    moments_std,
    weighted_advantages,
)
from grpo_core.algorithm.controllers import Coefficients
from grpo_core.algorithm.entropy import entropy_histogram, entropy_threshold
from grpo_core.algorithm.kl import completion_kl, kl_penalty
from grpo_core.algorithm.losses import token_weights
from grpo_core.config.options import GRPOConfig
from grpo_core.data import by_token_budget, step_items
from grpo_core.distributed.collectives import Distributed, all_reduce_sum, gather_rows, send_to_main, shard
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy, disable_dropout
from grpo_core.rewards import Reward, check_reward_weights, score_groups
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.storage.metrics_writer import CompletionsWriter, MetricsWriter
from grpo_core.training.loop import TrainingLoop
from grpo_core.training.objective import MicroBatch, Objective
from grpo_core.training.sanity import check_features, check_first_step
from grpo_core.types import Completion, Group, Prompt

Rollout = list[list[MicroBatch]]
"""A step's groups, packed: a list of micro-batches for each optimiser step of a pass."""

REFERENCE_FILE = "reference.safetensors"


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

    phases = ("sample", "reward", "old", "reference", "forward", "backward", "optimizer")
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
        super().__init__(policy, config.optim, config.run, dist=dist, save_model=save_model, evaluate=evaluate)
        self.sampler, self.prompts, self.rewards, self.describe = sampler, prompts, rewards, describe
        self.algorithm, self.rollout = config.algorithm, config.rollout
        self.objective = Objective(config.algorithm, self.metrics)
        self.coefficients = Coefficients(config.algorithm, config.run.max_steps)
        self.next_prompts()  # refuses too few prompts
        disable_dropout(policy.module)
        policy.module.eval()

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        self.completions_file = CompletionsWriter(self.run.folder, resume_step)
        return super().open_writer(resume_step)

    def step(self) -> dict[str, float]:
        """One rollout and its optimiser steps."""
        start = time.perf_counter()
        groups = self.sample(self.next_prompts())
        self.score(groups)
        groups = self.choose(groups)
        rollout = self.pack(groups)
        self.old(rollout)
        self.reference(rollout)
        self.compare(groups, rollout)
        first = self.step_index == 0 and self.run.check_first_step
        if first and groups:
            check_features(self.policy, rollout[0][0], self.rollout.temperature)
        for iteration in range(self.algorithm.num_iterations):
            for part, batches in enumerate(rollout):
                self.update(batches, iteration, part)
        self.record(groups)
        values = self.report(start)
        if first:
            check_first_step(values, self.algorithm, self.policy.dtype)
        self.step_index += 1
        self.steer(values)
        return values

    def next_prompts(self) -> list[Prompt]:
        """This rank's share of the step's prompts, and of the reserve behind them."""
        run, reserve = self.run, self.algorithm.reserve_prompts
        prompts = step_items(self.prompts, self.step_index, run.prompts_per_step + reserve, run.seed)
        return [
            prompt
            for part in (prompts[: run.prompts_per_step], prompts[run.prompts_per_step :])
            for prompt in shard(part, self.dist.rank, self.dist.world_size)
        ]

    def sample(self, prompts: Sequence[Prompt]) -> list[Group]:
        """G completions of each prompt."""
        with self.phase("sample"):
            groups = self.sampler.sample(prompts, self.rollout, step=self.step_index)
        for group in groups:
            if len(group.completions) != self.rollout.group_size:
                raise ValueError(
                    f"the sampler gave {len(group.completions)} completions of prompt {group.id!r}, not "
                    f"rollout.group_size {self.rollout.group_size}"
                )
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
        rewards = self.rewards_of(groups)
        self.metrics.mean("reward", rewards[~np.isnan(rewards)])
        self.metrics.mean("reward_std", _group_std(rewards))

    def choose(self, groups: list[Group]) -> list[Group]:
        """The groups to train on: all, or with dynamic sampling those that can teach something, before the others.

        Every rank chooses among its own groups and keeps as many as it would have sampled without a reserve.
        """
        signal = has_signal(self.rewards_of(groups))
        if self.algorithm.multi_objective_aggregation == "normalize_then_sum" and groups:
            signal = np.any([has_signal(table) for table in self.reward_tables(groups)], axis=0)
        self.metrics.mean("frac_reward_zero_std", (~signal).astype(np.float64))
        if self.algorithm.dynamic_sampling:
            own = shard(range(self.run.prompts_per_step), self.dist.rank, self.dist.world_size)
            kept = choose_groups(signal, len(own))
            groups, signal = [groups[i] for i in kept], signal[kept]
        self.metrics.sum("effective_groups", signal.astype(np.float64))
        return groups

    def pack(self, groups: list[Group]) -> Rollout:
        """Pack groups into micro-batches by the token budget, for each optimiser step of a pass; weigh every token by
        the counts of its whole optimiser step."""
        parts = [
            shard(groups, i, self.algorithm.steps_per_generation) for i in range(self.algorithm.steps_per_generation)
        ]
        counts = torch.tensor(
            [
                [
                    sum(len(group.completions) for group in part),
                    sum(len(c.token_ids) for group in part for c in group.completions if self.counts(c)),
                ]
                for part in parts
            ],
            device=self.policy.device,
        )
        totals = all_reduce_sum(counts, self.dist).tolist()
        return [
            [self.micro_batch(packed, *total) for packed in self.micro_batches(part)]
            for part, total in zip(parts, totals, strict=True)
        ]

    def micro_batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Consecutive groups of together at most `optim.max_tokens_per_micro_batch` tokens."""
        sizes = [len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups]
        return by_token_budget(groups, sizes, self.optim.max_tokens_per_micro_batch)

    def micro_batch(self, groups: list[Group], total_completions: int, total_tokens: int) -> MicroBatch:
        """Groups on one token axis; the totals are of the optimiser step."""
        device = self.policy.device
        layout = GroupLayout.from_groups(groups, device)
        members = [completion for group in groups for completion in group.completions]
        weights = token_weights(
            torch.tensor([len(c.token_ids) for c in members], device=device),
            layout.completion_index,
            self.algorithm.loss_type,
            total_completions=total_completions,
            total_tokens=total_tokens,
            max_length=self.rollout.max_new_tokens,
            completion_weights=torch.tensor([float(self.counts(c)) for c in members], device=device),
        )
        sampler_logprob = torch.from_numpy(np.concatenate([c.logprobs for c in members])).to(device)
        return MicroBatch(groups, layout, weights, total_tokens, sampler_logprob)

    def counts(self, completion: Completion) -> bool:
        """Whether a completion takes part in the loss: a truncated one may be masked."""
        return not (self.algorithm.mask_truncated_completions and completion.finish_reason == "length")

    @torch.no_grad()
    def old(self, rollout: Rollout) -> None:
        """Log-probabilities of the policy that sampled, where the first pass of `update` comes too late for them."""
        if not self.algorithm.needs_old_pass:
            return
        batches, entropies = [batch for part in rollout for batch in part], []
        with self.phase("old"):
            for batch in batches:
                batch.old_logprob, entropy, _ = self.policy.logprobs(
                    batch.layout, batch.prompts, temperature=self.rollout.temperature, entropy=True
                )
                entropies.append(entropy)
            if self.algorithm.top_entropy_quantile < 1:
                empty = entropy_histogram(torch.zeros(0, device=self.policy.device))
                histogram = sum(
                    (entropy_histogram(e, b.weights > 0) for e, b in zip(entropies, batches, strict=True)), empty
                )
                threshold = entropy_threshold(all_reduce_sum(histogram, self.dist), self.algorithm.top_entropy_quantile)
                for batch, entropy in zip(batches, entropies, strict=True):
                    batch.entropy_mask = entropy >= threshold

    def reference(self, rollout: Rollout) -> None:
        """What the KL to the reference needs of it, unless β = 0."""
        if self.algorithm.beta == 0:
            return
        with self.phase("reference"):
            for batch in (batch for part in rollout for batch in part):
                if self.algorithm.kl_estimator == "full":
                    batch.reference_hidden = self.policy.reference_hidden_states(batch.layout, batch.prompts)
                else:
                    batch.reference_logprob = self.policy.reference_logprobs(
                        batch.layout, batch.prompts, temperature=self.rollout.temperature
                    )

    def compare(self, groups: list[Group], rollout: Rollout) -> None:
        """Fill every group's advantages, and spread them over its tokens."""
        for group, row in zip(groups, self.advantages(groups, rollout), strict=True):
            group.advantages = row
        for batch in (batch for part in rollout for batch in part):
            batch.advantages = batch.layout.per_token(np.concatenate([group.advantages for group in batch.groups]))

    def advantages(self, groups: list[Group], rollout: Rollout) -> np.ndarray:
        """float64 `[N, G]`; one small collective where a standard deviation is the whole step's."""
        a = self.algorithm
        if a.multi_objective_aggregation == "normalize_then_sum":
            tables = self.reward_tables(groups)
            weights = [a.reward_weights.get(reward.name, 1.0) for reward in self.rewards]
            std = self.step_std(weighted_advantages(tables, weights, a.baseline))
            return combined_advantages(tables, weights, a.baseline, batch_std=std)
        rewards = self.rewards_of(groups)
        if a.beta > 0 and a.kl_in == "reward":
            rewards = rewards - self.coefficients.beta(self.step_index) * self.kl_of_completions(rollout).reshape(
                rewards.shape
            )
        std = self.step_std(rewards) if a.scale_rewards == "batch" else None
        return group_advantages(rewards, a.scale_rewards, a.baseline, batch_std=std)

    def kl_of_completions(self, rollout: Rollout) -> np.ndarray:
        """float64 `[N · G]`, the estimate summed over each completion, in the groups' order."""
        estimator, sums = self.algorithm.kl_estimator, [np.zeros(0)]
        for batch in (batch for part in rollout for batch in part):
            pair = batch.old_logprob, batch.reference_logprob
            self.metrics.mean("kl", kl_penalty(*pair, estimator))
            sums.append(completion_kl(*pair, *batch.completions, estimator).cpu().numpy())
        return np.concatenate(sums)

    def step_std(self, values: np.ndarray) -> float:
        """Standard deviation of values over all ranks."""
        row = torch.from_numpy(moments(values)).to(self.dist.device)
        return moments_std(combine_moments(gather_rows(row, self.dist).cpu().numpy()))

    def rewards_of(self, groups: Sequence[Group]) -> np.ndarray:
        """float64 `[N, G]`."""
        return np.array([group.rewards for group in groups]).reshape(len(groups), self.rollout.group_size)

    def reward_tables(self, groups: Sequence[Group]) -> np.ndarray:
        """float64 `[K, N, G]`, of each of the K rewards."""
        tables = [[group.rewards_by_name[reward.name] for group in groups] for reward in self.rewards]
        return np.array(tables, dtype=np.float64).reshape(len(self.rewards), len(groups), self.rollout.group_size)

    def update(self, batches: list[MicroBatch], iteration: int, part: int = 0) -> None:
        """Accumulate the gradient over micro-batches and ranks, and take one optimiser step."""
        parts = self.algorithm.steps_per_generation
        steps_per_rollout = self.algorithm.num_iterations * parts
        beta, entropy_coef = self.coefficients.beta(self.step_index), self.coefficients.entropy
        self.policy.module.train()  # gradient checkpointing asks for it; dropout is off
        for batch in batches:
            with self.phase("forward"):
                result = self.policy.logprobs(
                    batch.layout,
                    batch.prompts,
                    temperature=self.rollout.temperature,
                    entropy=True,
                    reference_hidden=batch.reference_hidden,
                )
                if batch.old_logprob is None:
                    batch.old_logprob = result.logprob.detach()
                loss = self.objective(batch, result, beta, entropy_coef)
            with self.phase("backward"):
                loss.backward()
            self.metrics.sum("loss", loss / steps_per_rollout)
            self.metrics.sum("num_trained_tokens", batch.layout.num_tokens)
            if iteration == 0:
                self.compare_with_sampler(batch.old_logprob, batch.sampler_logprob)
        self.policy.module.eval()
        with self.phase("optimizer"):
            made = self.step_index * steps_per_rollout + iteration * parts + part
            self.optimizer_step(made, self.run.max_steps * steps_per_rollout)

    def compare_with_sampler(self, logprob: Tensor, sampler_logprob: Tensor) -> None:
        """How far the trainer's log-probabilities are from the sampler's: both come from the same policy."""
        difference = logprob - sampler_logprob
        self.metrics.mean("sampling/sampling_logp_difference/mean", difference.abs())
        self.metrics.max("sampling/sampling_logp_difference/max", difference.abs())
        for kind in ("min", "mean", "max"):
            getattr(self.metrics, kind)(f"sampling/importance_sampling_ratio/{kind}", difference.exp())

    def report(self, start: float) -> dict[str, float]:
        """The step's metrics over all ranks: one collective, one host synchronisation.

        Args:
            start: `time.perf_counter()` at the step's start.
        """
        self.metrics.register("sum", "loss", "num_trained_tokens")
        self.metrics.register("mean", *self.objective.metric_names(), "sampling/sampling_logp_difference/mean")
        self.metrics.register("max", "sampling/sampling_logp_difference/max")
        for kind in ("min", "mean", "max"):
            self.metrics.register(kind, f"sampling/importance_sampling_ratio/{kind}")
        timings = self.sampler.timings
        for phase in ("prefill", "decode"):
            self.metrics.max(f"sampling/seconds/{phase}", timings[phase])
        self.metrics.sum("sampling/prompt_tokens", timings["prompt_tokens"])
        self.metrics.sum("sampling/completion_tokens", timings["completion_tokens"])
        self.report_phases()
        self.metrics.max("step_time", time.perf_counter() - start)
        return self.with_rates(self.metrics.reduce())

    def with_rates(self, values: dict[str, float]) -> dict[str, float]:
        """Add tokens a second of each kind of work, over all ranks, what no phase accounts for, and coefficients."""
        values["time/idle"] = max(0.0, values["step_time"] - sum(values[f"time/{name}"] for name in self.phases))
        training = values["time/forward"] + values["time/backward"]
        for name, tokens, seconds in (
            ("prefill", values["sampling/prompt_tokens"], values["sampling/seconds/prefill"]),
            ("decode", values["sampling/completion_tokens"], values["sampling/seconds/decode"]),
            ("train", values["num_trained_tokens"], training),
            ("step", values["num_tokens"], values["step_time"]),
        ):
            values[f"tokens_per_second/{name}"] = tokens / seconds if seconds else 0.0
        if self.algorithm.beta > 0:
            values["beta"] = self.coefficients.beta(self.step_index)
        if self.algorithm.entropy_coef or self.algorithm.entropy_target is not None:
            values["entropy_coef"] = self.coefficients.entropy
        return values

    def steer(self, values: dict[str, float]) -> None:
        """After a step: adapt the coefficients, and move the reference where it follows the policy."""
        a = self.algorithm
        self.coefficients.update(
            values.get("kl"), values["entropy"], self.run.prompts_per_step * self.rollout.group_size
        )
        if a.ref_model_sync_steps and self.step_index % a.ref_model_sync_steps == 0:
            self.policy.sync_reference(a.ref_model_mixup_alpha)

    def state(self) -> dict[str, Any]:
        return self.coefficients.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.coefficients.load_state_dict(state)

    def more_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {REFERENCE_FILE: self.policy.reference_tensors()} if self.algorithm.ref_model_sync_steps else {}

    def record(self, groups: list[Group]) -> None:
        """Write every completion that was trained on, all ranks', into `completions.jsonl`."""
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
        parts = send_to_main(f"completions/{self.run.name}/{self.step_index}", rows, self.dist)
        if parts is not None:
            self.completions_file.write(self.step_index + 1, [row for part in parts for row in part])


def _group_std(rewards: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation within each group that has two judged members, `[≤ N]`."""
    judged = [row[~np.isnan(row)] for row in rewards]
    return np.array([row.std(ddof=1) for row in judged if len(row) > 1])
