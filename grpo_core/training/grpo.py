"""The GRPO step: sample groups, score them, compare members, and move the policy towards the better ones.

Read `step`, `collect`, `learn` and `update`: a line a stage, and each stage returns what it makes. `batch.py` has what
a step trains on, `objective.py` the loss, `step_metrics.py` what is logged, `loop.py` what surrounds a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
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
    moments,
    moments_std,
    weighted_advantages,
)
from grpo_core.algorithm.controllers import Coefficients
from grpo_core.algorithm.entropy import entropy_histogram, entropy_threshold
from grpo_core.algorithm.kl import completion_kl
from grpo_core.config.options import GRPOConfig
from grpo_core.data import refuse_too_long
from grpo_core.distributed import Distributed, all_reduce_sum, gather_rows, send_to_main
from grpo_core.distributed.stopping import stoppable, until_stopped
from grpo_core.errors import InputError
from grpo_core.policy import Policy, disable_dropout
from grpo_core.reward_adapters import check_columns
from grpo_core.rewards import Reward, Scores, check_reward_weights, score
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.storage.jsonl import JsonLines
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.training.batch import (
    Experience,
    MicroBatch,
    Minibatch,
    OldPass,
    Update,
    check_enough_items,
    make_minibatches,
    step_items,
    step_positions,
)
from grpo_core.training.guards import dump_batch
from grpo_core.training.loop import TrainingLoop, describe_items
from grpo_core.training.objective import compute_loss
from grpo_core.training.optim import optimizer_step
from grpo_core.training.sanity import check_first_step
from grpo_core.training.step_metrics import completion_rows, log_completions, log_rewards, log_updates, with_rates
from grpo_core.types import Group, Prompt

REFERENCE_FILE = "reference.safetensors"


def check_inputs(prompts: Sequence[Prompt], rewards: Sequence[Reward], config: GRPOConfig) -> None:
    """Refuse prompts and rewards that do not fit each other or the options. The trainer does it too; a program that
    does it first refuses them before its model is loaded.

    Raises:
        InputError: a weight names no reward, a reward reads a column that a sample lacks, or there are too few prompts
            for a step.
    """
    check_reward_weights(rewards, config.algorithm.reward_weights)
    for reward in rewards:
        for prompt in prompts:
            check_columns(reward, prompt)
    check_enough_items(len(prompts), config.run.prompts_per_step + config.algorithm.reserve_prompts)


class GRPOTrainer(TrainingLoop):
    """Trains a policy on prompts with rewards.

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
        InputError: a weight names no reward, β > 0 without a reference, too few prompts for a step, one that with its
            completion is longer than the model's positions, or a token id that the model does not have.
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
        check_inputs(prompts, rewards, config)
        sizes = ((prompt.id, len(prompt.token_ids), config.rollout.max_new_tokens) for prompt in prompts)
        refuse_too_long(sizes, policy.causal_lm.config, "rollout.max_new_tokens")
        if config.algorithm.beta > 0 and policy.reference is None:
            raise InputError("algorithm.beta is above 0, but the policy keeps no reference: make it with one")
        policy.check_token_ids(prompts)
        super().__init__(policy, config.optim, config.run, dist=dist, save_model=save_model, evaluate=evaluate)
        self.config, self.sampler, self.prompts, self.rewards = config, sampler, prompts, rewards
        self.coefficients = Coefficients(config.algorithm, config.run.max_steps)
        self.describe = describe
        self.guards.masks_truncated = config.algorithm.mask_truncated_completions
        algorithm, count = config.algorithm, config.run.prompts_per_step
        self.positions = step_positions(count, algorithm.reserve_prompts, algorithm.steps_per_generation, self.dist)
        disable_dropout(policy.module)
        policy.module.eval()

    def step(self) -> dict[str, float]:
        """Make one step: collect experience, learn from it. Returns the step's metrics over all ranks."""
        started = time.perf_counter()
        experience = self.collect()
        updates = self.learn(experience)
        # Reported before it is checked: a run that is stopped leaves its completions to look at.
        values = self.report(experience, updates, started)
        if self.step_index == 0 and self.config.run.check_first_step:
            temperature = self.config.rollout.temperature
            algorithm = self.config.algorithm
            check_first_step(values, algorithm, self.policy, experience.groups, temperature, self.dist, self.sampler)

        self.step_index += 1
        completions = self.config.run.prompts_per_step * self.config.rollout.group_size
        # From values over all ranks, so that every rank sets the same coefficients without another collective.
        self.coefficients.update(values.get("kl"), values["entropy"], completions)
        sync_steps = self.config.algorithm.ref_model_sync_steps
        if sync_steps and self.step_index % sync_steps == 0:
            self.policy.sync_reference(self.config.algorithm.ref_model_mixup_alpha)
        return values

    def collect(self) -> Experience:
        """Sample and score groups, and compute all that the updates need besides the policy itself."""
        algorithm = self.config.algorithm
        prompts = self.next_prompts()
        sampled = self.sample(prompts)
        sampled_scores = self.score(sampled)
        groups, scores, positions = self.select(sampled, sampled_scores)
        # Packed once: old pass, reference pass and every epoch run over the same layouts.
        minibatches = make_minibatches(groups, positions, self.config, self.dist, self.policy.device)
        # The first training pass gives the old log-probs for nothing (see `learn`), unless that is too late: a second
        # minibatch is trained on weights that have moved, an entropy quantile is a threshold over the whole step, and a
        # KL in the reward is wanted before there are advantages to train with.
        needs_old_pass = algorithm.steps_per_generation > 1 or algorithm.top_entropy_quantile < 1
        needs_old_pass = needs_old_pass or (algorithm.beta > 0 and algorithm.kl_in == "reward")
        old = self.old_passes(minibatches) if needs_old_pass else None
        # Before the updates and all at once: a frozen reference is exchanged with the trained parameters in place.
        reference = self.reference_values(minibatches) if algorithm.beta > 0 else None
        advantages = self.advantages(scores, minibatches, old, reference)
        return Experience(sampled, sampled_scores, groups, scores, positions, minibatches, old, reference, advantages)

    def learn(self, experience: Experience) -> list[Update]:
        """Make `algorithm.num_iterations` epochs over the minibatches, an optimiser step each."""
        algorithm = self.config.algorithm
        old, updates = experience.old, []
        for epoch in range(algorithm.num_iterations):
            for index, minibatch in enumerate(experience.minibatches):
                # counted over the whole run, not over this process: a resumed run goes on in the same schedule
                steps_before = self.step_index * algorithm.num_iterations + epoch
                schedule_step = steps_before * algorithm.steps_per_generation + index
                update = self.update(minibatch, experience, old, schedule_step)
                updates.append(update)
                if old is None:
                    # The policy has not moved since it sampled, so this first pass has just computed the old log-probs:
                    # a pass of their own would give the same numbers again. There is only one minibatch then; where
                    # the first pass comes too late, `old_passes` has made them before.
                    old = {batch: OldPass(made.logprob) for batch, made in zip(minibatch, update.passes, strict=True)}
        return updates

    def next_prompts(self) -> list[Prompt]:
        """This rank's share of the step's prompts, and behind it its share of the reserve for dynamic sampling."""
        count, reserve = self.config.run.prompts_per_step, self.config.algorithm.reserve_prompts
        prompts = step_items(self.prompts, self.step_index, count + reserve, self.config.run.seed)
        return [prompts[position] for position in self.positions]

    def sample(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Draw G completions of each prompt from the policy as it is.

        Raises:
            ValueError: the sampler gave another number of completions.
        """
        size = self.config.rollout.group_size
        with stoppable(self.dist), self.clock.phase("sample"):
            groups = self.sampler.sample(prompts, self.config.rollout, step=self.step_index)
        # A sampler of another make may give what it likes; rewards [N, G] below rely on the size.
        for group in groups:
            if len(group.completions) != size:
                raise ValueError(
                    f"the sampler gave {len(group.completions)} completions of prompt {group.id!r}, not "
                    f"rollout.group_size {size}"
                )
        return groups

    def score(self, groups: Sequence[Group]) -> Scores:
        """Ask every reward about every completion."""
        algorithm, run = self.config.algorithm, self.config.run
        with self.clock.phase("reward"):
            return score(
                groups,
                self.rewards,
                algorithm.reward_weights,
                group_size=self.config.rollout.group_size,
                step=self.step_index,
                max_steps=run.max_steps,
                timeout=run.reward_timeout,
                each_reward=algorithm.multi_objective_aggregation == "normalize_then_sum",
            )

    def select(self, groups: Sequence[Group], scores: Scores) -> tuple[list[Group], Scores, Sequence[int]]:
        """Choose the groups to train on: all, or with dynamic sampling those with a signal before the others.

        The choice is made of the whole step's groups, in one small collective, so it does not depend on the number of
        ranks. A group is trained on by the rank that sampled it, so ranks may have unequal numbers of them.

        Returns:
            This rank's groups, their scores, and their positions among all groups that the step trains on.
        """
        if not self.config.algorithm.dynamic_sampling:
            return list(groups), scores, self.positions
        count = self.config.run.prompts_per_step
        own = torch.zeros(count + self.config.algorithm.reserve_prompts, dtype=torch.int64, device=self.dist.device)
        own[self.positions] = torch.from_numpy(scores.signal).to(own)
        chosen = choose_groups(all_reduce_sum(own, self.dist).cpu().numpy() > 0, count).tolist()
        kept = [n for n, position in enumerate(self.positions) if position in chosen]
        positions = [chosen.index(self.positions[n]) for n in kept]
        return [groups[n] for n in kept], scores.select(np.array(kept, dtype=np.int64)), positions

    @torch.no_grad()
    def old_passes(self, minibatches: Sequence[Minibatch]) -> Mapping[MicroBatch, OldPass]:
        """Compute log-probs of the policy that sampled in a pass of its own, and which tokens are uncertain enough."""
        batches = [batch for minibatch in minibatches for batch in minibatch]
        quantile = self.config.algorithm.top_entropy_quantile
        with self.clock.phase("old"):
            results = [
                self.policy.logprobs(
                    batch.layout, batch.prompts, temperature=self.config.rollout.temperature, entropy=True
                )
                for batch in until_stopped(batches, self.dist)
            ]
            if quantile == 1:
                return {batch: OldPass(result.logprob) for batch, result in zip(batches, results, strict=True)}
            entropies = [result.entropy for result in results if result.entropy is not None]
            # A threshold over micro-batches and ranks needs no sort of all entropies: counts of fixed bins add up.
            histogram = entropy_histogram(torch.zeros(0, device=self.policy.device))  # of a rank without groups
            for batch, entropy in zip(batches, entropies, strict=True):
                histogram = histogram + entropy_histogram(entropy, batch.loss_weight > 0)
            threshold = entropy_threshold(all_reduce_sum(histogram, self.dist), quantile)
            return {
                batch: OldPass(result.logprob, entropy >= threshold)
                for batch, result, entropy in zip(batches, results, entropies, strict=True)
            }

    def reference_values(self, minibatches: Sequence[Minibatch]) -> Mapping[MicroBatch, Tensor]:
        """Compute what the KL needs of the reference: log-probs `[R]`, or for the full KL hidden states `[R, H]`."""
        batches = [batch for minibatch in minibatches for batch in minibatch]
        with self.clock.phase("reference"):
            if self.config.algorithm.kl_estimator == "full":
                return {
                    batch: self.policy.reference_hidden_states(batch.layout, batch.prompts)
                    for batch in until_stopped(batches, self.dist)
                }
            return {
                batch: self.policy.reference_logprobs(
                    batch.layout, batch.prompts, temperature=self.config.rollout.temperature
                )
                for batch in until_stopped(batches, self.dist)
            }

    def advantages(
        self,
        scores: Scores,
        minibatches: Sequence[Minibatch],
        old: Mapping[MicroBatch, OldPass] | None,
        reference: Mapping[MicroBatch, Tensor] | None,
    ) -> np.ndarray:
        """Compare the members of each group: float64 `[N, G]`.

        One small collective where a standard deviation is the whole step's.
        """
        algorithm = self.config.algorithm
        if algorithm.multi_objective_aggregation == "normalize_then_sum":
            std = self.step_std(weighted_advantages(scores.by_reward, scores.weights, algorithm.baseline))
            return combined_advantages(scores.by_reward, scores.weights, algorithm.baseline, batch_std=std)
        rewards = scores.total
        if old is not None and reference is not None and algorithm.kl_in == "reward":
            kl = [
                completion_kl(
                    old[batch].logprob,
                    reference[batch],
                    batch.layout.completion_index,
                    batch.layout.num_completions,
                    algorithm.kl_estimator,
                )
                for minibatch in minibatches
                for batch in minibatch
            ]
            beta = self.coefficients.beta(self.step_index)
            # Off the rewards that advantages are made of, not off those that are logged. The copy to the host waits
            # for the two passes before; advantages are NumPy in float64, a few numbers a group.
            rewards = rewards - beta * np.concatenate([np.zeros(0), *(sums.cpu().numpy() for sums in kl)]).reshape(
                rewards.shape
            )
        # None where each group has a standard deviation of its own: no collective then
        batch_std = self.step_std(rewards) if algorithm.scale_rewards == "batch" else None
        return group_advantages(rewards, algorithm.scale_rewards, algorithm.baseline, batch_std=batch_std)

    def step_std(self, values: np.ndarray) -> float:
        """Standard deviation of values over all ranks."""
        row = torch.from_numpy(moments(values)).to(self.dist.device)
        return moments_std(combine_moments(gather_rows(row, self.dist).cpu().numpy()))

    def update(
        self,
        minibatch: Minibatch,
        experience: Experience,
        old: Mapping[MicroBatch, OldPass] | None,
        schedule_step: int,
    ) -> Update:
        """Accumulate the gradient over micro-batches and ranks, and take one optimiser step.

        Args:
            old: None where this pass gives the old log-probs: it is the first of a policy that has not moved.
            schedule_step: optimiser steps made before, over the whole run.
        """
        algorithm = self.config.algorithm
        full_kl = algorithm.kl_estimator == "full"
        # the same in every epoch of the step: controllers move after it
        beta, entropy_coef = self.coefficients.beta(self.step_index), self.coefficients.entropy
        self.policy.module.train()  # gradient checkpointing works in training mode alone; dropout is off
        passes = []
        # until the step's first update nothing has moved, so a signal may drop the step; after it the step is finished
        moved = schedule_step % (algorithm.num_iterations * algorithm.steps_per_generation) > 0
        for batch in minibatch if moved else until_stopped(minibatch, self.dist):
            reference = None if experience.reference is None else experience.reference[batch]
            with self.clock.phase("forward"):
                current = self.policy.logprobs(
                    batch.layout,
                    batch.prompts,
                    temperature=self.config.rollout.temperature,
                    entropy=True,
                    reference_hidden=reference if full_kl else None,
                )
                made = compute_loss(
                    algorithm,
                    batch,
                    current,
                    # ratio 1, but with the gradient of the log-prob in it
                    OldPass(current.logprob.detach()) if old is None else old[batch],
                    batch.per_token(experience.advantages),
                    None if full_kl else reference,
                    beta=beta,
                    entropy_coef=entropy_coef,
                )
            with self.clock.phase("backward"):
                made.loss.backward()
            # gradients add up in the parameters; the loss's weights already count the whole minibatch
            passes.append(made._replace(loss=made.loss.detach()))  # lets the graph go
        self.policy.module.eval()  # as the sampler, the reference pass and an evaluation want it
        schedule_length = self.config.run.max_steps * algorithm.num_iterations * algorithm.steps_per_generation
        with self.clock.phase("optimizer"):
            grad_norm, lr = optimizer_step(
                self.optimizer, self.parameters.values(), self.config.optim, self.dist, schedule_step, schedule_length
            )
        return Update(passes, grad_norm, lr)

    def report(self, experience: Experience, updates: Sequence[Update], started: float) -> dict[str, float]:
        """Write the step's completions, and reduce its metrics over all ranks: one collective, one host copy.

        Where the gradient is not finite the batch is written, too, once in a run.

        Args:
            started: `time.perf_counter()` at the step's start.
        """
        algorithm, timings = self.config.algorithm, self.sampler.timings
        # through the key-value store, without a collective: rewards may log other names on another rank
        sampled = experience.sampled_scores
        logged = {
            "rows": completion_rows(experience, self.describe),
            "metrics": dict(sampled.metrics),
            # a few are enough to look at; how many there are is a metric
            "failures": {
                name: [(experience.sampled[n].id, member, problem) for n, member, problem in failures[:3]]
                for name, failures in sampled.failures.items()
            },
        }
        sent = send_to_main(f"completions/{self.config.run.name}/{self.step_index}", logged, self.dist)

        log_completions(self.metrics, experience.sampled)
        log_rewards(self.metrics, experience)
        log_updates(self.metrics, experience, updates, algorithm)
        self.metrics.max("sampling/seconds/prefill", timings["prefill"])
        self.metrics.max("sampling/seconds/decode", timings["decode"])
        self.metrics.sum("sampling/prompt_tokens", timings["prompt_tokens"])
        self.metrics.sum("sampling/completion_tokens", timings["completion_tokens"])
        # on a GPU this waits for the step's last kernel: from here on host times are the device's
        for name, seconds in self.clock.read().items():
            self.metrics.max(f"time/{name}", seconds)
        self.metrics.max("step_time", time.perf_counter() - started)
        values = with_rates(self.metrics.reduce(), self.phases)
        if algorithm.beta > 0:
            values["beta"] = self.coefficients.beta(self.step_index)
        if algorithm.entropy_coef or algorithm.entropy_target is not None:
            values["entropy_coef"] = self.coefficients.entropy
        if not math.isfinite(values["grad_norm"]):  # of the whole step, so every rank writes what it trained on
            dump_batch(self.config.run.folder, self.step_index + 1, self.dist.rank, experience, updates)

        if sent is not None:  # on the main process, which alone writes
            step = self.step_index + 1
            # in the order of the step's groups, whichever rank trained on them; stable, so members keep theirs
            rows = sorted((row for rank_log in sent for row in rank_log["rows"]), key=itemgetter(0))
            self.completions_file.append({"step": step, **row} for _, row in rows)
            self.guards.failures = [rank_log["failures"] for rank_log in sent]
            for name in dict.fromkeys(name for rank_log in sent for name in rank_log["metrics"]):
                numbers = [number for rank_log in sent for number in rank_log["metrics"].get(name, ())]
                values.setdefault(name, float(np.mean(numbers)) if numbers else float("nan"))
        return values

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        self.completions_file = JsonLines(self.config.run.folder / "completions.jsonl", resume_step)
        return super().open_writer(resume_step)

    def close_writer(self, writer: MetricsWriter) -> None:
        self.completions_file.close()
        super().close_writer(writer)

    @cached_property
    def data(self) -> dict[str, Any]:
        return describe_items((prompt.id, prompt.token_ids) for prompt in self.prompts)

    def extra_state(self) -> dict[str, Any]:
        return self.coefficients.state_dict()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.coefficients.load_state_dict(state)

    def extra_tensors(self) -> dict[str, Mapping[str, Tensor]]:
        # a reference that never moves is the policy at the start: a resumed run makes it anew
        moves = self.config.algorithm.ref_model_sync_steps > 0
        return {REFERENCE_FILE: self.policy.reference_tensors()} if moves else {}
