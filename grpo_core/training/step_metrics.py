"""What a GRPO step logs, computed from the values that its stages returned; names are TRL's where it has one.

Nothing here waits for the device: values stay there until `MetricAccumulator.reduce`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from grpo_core.algorithm.completions import completion_sum
from grpo_core.algorithm.kl import kl_penalty
from grpo_core.config.options import AlgorithmConfig
from grpo_core.storage.jsonl import jsonable
from grpo_core.training.accumulator import MetricAccumulator
from grpo_core.training.batch import Experience, Update
from grpo_core.types import Group


def log_completions(metrics: MetricAccumulator, groups: Sequence[Group]) -> None:
    """Log how long the completions are, and how they ended."""
    completions = [completion for group in groups for completion in group.completions]
    # host values: they cost nothing, and go to the device in the one packed row of `reduce`
    lengths = np.array([len(c.token_ids) for c in completions], dtype=np.float64)
    stopped = np.array([c.finish_reason == "stop" for c in completions], dtype=bool)
    metrics.mean("completions/mean_length", lengths)
    metrics.min("completions/min_length", lengths)
    metrics.max("completions/max_length", lengths)
    metrics.mean("completions/mean_terminated_length", lengths[stopped])  # NaN in a step where none stopped
    metrics.mean("completions/clipped_ratio", (~stopped).astype(np.float64))
    metrics.sum("num_tokens", lengths.sum() + sum(len(group.prompt.token_ids) for group in groups))


def log_rewards(metrics: MetricAccumulator, experience: Experience) -> None:
    """Log each reward, their sum, and how many groups teach something."""
    scores = experience.sampled_scores
    for name, values in [*zip(scores.names, scores.by_reward, strict=True), ("", scores.total)]:
        mean, std = (f"rewards/{name}/mean", f"rewards/{name}/std") if name else ("reward", "reward_std")
        metrics.mean(mean, values[~np.isnan(values)])
        # within each group that has two judged members
        judged = [row[~np.isnan(row)] for row in values]
        metrics.mean(std, np.array([row.std(ddof=1) for row in judged if len(row) > 1]))
    for name in scores.names:
        metrics.max(f"rewards/{name}/seconds", scores.seconds[name])
        failed = np.zeros(scores.total.shape)
        for failure in scores.failures[name]:
            failed[failure.group, failure.member] = 1.0
        metrics.mean(f"rewards/{name}/failed", failed)
    # of all that was sampled, then of what was trained on: dynamic sampling is between the two
    metrics.mean("frac_reward_zero_std", (~scores.signal).astype(np.float64))
    metrics.sum("effective_groups", experience.scores.signal.astype(np.float64))


def log_updates(
    metrics: MetricAccumulator, experience: Experience, updates: Sequence[Update], algorithm: AlgorithmConfig
) -> None:
    """Log what the passes over the minibatches gave.

    A rank without groups registers the same metrics with no data, since all ranks reduce the same names at once.
    """
    metrics.register("sum", "loss", "num_trained_tokens")
    metrics.register("mean", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    metrics.register("mean", "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
    metrics.register("max", "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max")
    metrics.register("min", "sampling/importance_sampling_ratio/min")
    metrics.register("mean", *["kl"] * (algorithm.beta > 0))
    metrics.register("mean", *["off_policy_masked"] * (algorithm.off_policy_mask_threshold is not None))

    for i, update in enumerate(updates):
        # sampler and trainer are compared once a step: in later epochs the policy has moved
        first_epoch = i < len(experience.minibatches)
        for batch, made in zip(experience.minibatches[i % len(experience.minibatches)], update.passes, strict=True):
            if first_epoch:
                old_logprob = made.logprob if experience.old is None else experience.old[batch].logprob
                # Both are of the policy as it was when it sampled: what differs is how they were computed.
                difference = old_logprob - batch.sampler_logprob
                ratio = difference.exp()
                metrics.mean("sampling/sampling_logp_difference/mean", difference.abs())
                metrics.max("sampling/sampling_logp_difference/max", difference.abs())
                metrics.min("sampling/importance_sampling_ratio/min", ratio)
                metrics.mean("sampling/importance_sampling_ratio/mean", ratio)
                metrics.max("sampling/importance_sampling_ratio/max", ratio)
                if experience.reference is not None and algorithm.kl_in == "reward":
                    kl = kl_penalty(old_logprob, experience.reference[batch], algorithm.kl_estimator)
                    metrics.mean("kl", kl)
            # A sequence's ratio is one number, however long the sequence: it counts once.
            share = None
            if algorithm.ratio_level != "token":
                index = batch.layout.completion_index
                ones = torch.ones_like(index, dtype=torch.float64)
                share = 1.0 / completion_sum(ones, index, batch.layout.num_completions)[index]
            metrics.mean("clip_ratio/low_mean", made.clipped_low, share)
            metrics.mean("clip_ratio/high_mean", made.clipped_high, share)
            metrics.mean("clip_ratio/region_mean", made.clipped_low | made.clipped_high, share)
            if made.off_policy is not None:
                metrics.mean("off_policy_masked", made.off_policy)
            if made.kl is not None:
                metrics.mean("kl", made.kl)
            metrics.mean("entropy", made.entropy)
            # a sum over micro-batches and ranks, and the mean over optimiser steps
            metrics.sum("loss", made.loss / len(updates))
            metrics.sum("num_trained_tokens", batch.layout.num_tokens)
        metrics.mean("grad_norm", update.grad_norm)
        metrics.mean("learning_rate", update.learning_rate)


def with_rates(values: dict[str, float], phases: Sequence[str]) -> dict[str, float]:
    """Add tokens a second of each kind of work, over all ranks, and the seconds that no phase accounts for."""
    values["time/idle"] = max(0.0, values["step_time"] - sum(values[f"time/{name}"] for name in phases))
    for name, tokens, seconds in (
        ("prefill", values["sampling/prompt_tokens"], values["sampling/seconds/prefill"]),
        ("decode", values["sampling/completion_tokens"], values["sampling/seconds/decode"]),
        ("train", values["num_trained_tokens"], values["time/forward"] + values["time/backward"]),
        ("step", values["num_tokens"], values["step_time"]),
    ):
        values[f"tokens_per_second/{name}"] = tokens / seconds if seconds else 0.0
    return values


def completion_rows(
    experience: Experience, describe: Callable[[Group, int], dict[str, Any]] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """A row of `completions.jsonl` for each completion that was trained on, behind its group's position in the step.

    Args:
        describe: adds columns to a row.
    """
    scores, size = experience.scores, experience.scores.total.shape[1]
    return [
        (
            experience.positions[n],
            {
                "prompt_id": group.prompt.id,
                "member": member,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "length": len(completion.token_ids),
                "rewards": {name: float(scores.by_reward[k, n, member]) for k, name in enumerate(scores.names)},
                "reward": float(scores.total[n, member]),
                "advantage": float(experience.advantages[n, member]),
                # a reward may log NumPy's numbers; rows travel between ranks as JSON
                **{name: jsonable(values[n * size + member]) for name, values in scores.columns.items()},
                **(describe(group, member) if describe else {}),
            },
        )
        for n, group in enumerate(experience.groups)
        for member, completion in enumerate(group.completions)
    ]
