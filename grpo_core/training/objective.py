"""The loss of one micro-batch: from log-probabilities to a number, as a run's options say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.algorithm.completions import completion_sum
from grpo_core.algorithm.entropy import entropy_bonus
from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import importance_ratio, policy_loss
from grpo_core.algorithm.off_policy import off_policy_mask, sampler_correction
from grpo_core.config.options import AlgorithmConfig
from grpo_core.layout import GroupLayout
from grpo_core.policy import LogProbs
from grpo_core.training.accumulator import StepMetrics
from grpo_core.types import Group, Prompt


@dataclass
class MicroBatch:
    """Some groups of a step, packed for one forward and backward; R predicted tokens."""

    groups: list[Group]
    layout: GroupLayout
    weights: Tensor
    """float32 `[R]`, of each token's loss in the optimiser step."""
    total_tokens: int
    """Tokens that count in the optimiser step, over micro-batches and ranks."""
    sampler_logprob: Tensor
    """float32 `[R]`."""
    advantages: Tensor | None = None
    """float32 `[R]`."""
    old_logprob: Tensor | None = None
    """float32 `[R]`, of the policy that sampled: by a pass of its own, or the first pass over the batch."""
    entropy_mask: Tensor | None = None
    """bool `[R]`, tokens uncertain enough to be trained on; None for all."""
    reference_logprob: Tensor | None = None
    """float32 `[R]`; None when β = 0, or the KL is over the whole vocabulary."""
    reference_hidden: Tensor | None = None
    """`[R, H]`; None unless the KL is over the whole vocabulary."""

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.groups]

    @property
    def completions(self) -> tuple[Tensor, int]:
        """Which of the M completions each token belongs to, `[R]`, and M."""
        return self.layout.completion_index, self.layout.num_completions


class Objective:
    """`Σ weight · (policy loss + β · KL) − entropy_coef · mean entropy` of a micro-batch; its metrics go to `metrics`.

    Masks and corrections are factors of the policy loss alone, never of the KL.
    """

    def __init__(self, algorithm: AlgorithmConfig, metrics: StepMetrics):
        self.algorithm, self.metrics = algorithm, metrics

    def __call__(self, batch: MicroBatch, result: LogProbs, beta: float, entropy_coef: float) -> Tensor:
        """The loss, a scalar with its gradient.

        Args:
            batch: with advantages and old log-probs.
            result: of the policy as it is.
            beta, entropy_coef: of this step.
        """
        token_loss = self.policy_loss(batch, result.logprob)
        kl = self.kl(batch, result)
        if kl is not None:
            token_loss = token_loss + beta * kl
            self.metrics.mean("kl", kl)
        loss = (batch.weights * token_loss).sum()
        if entropy_coef:
            counted = (batch.weights > 0).to(loss.dtype)
            loss = loss - entropy_coef * entropy_bonus(result.entropy, max(batch.total_tokens, 1), counted)
        self.metrics.mean("entropy", result.entropy)
        return loss

    def policy_loss(self, batch: MicroBatch, logprob: Tensor) -> Tensor:
        """`[R]`, the loss type's surrogate times what masks and corrections leave of it."""
        a = self.algorithm
        surrogate = policy_loss(
            a.loss, logprob, batch.old_logprob, batch.advantages, *batch.completions, ratio_level=a.ratio_level
        )
        # a sequence's ratio is one number, however long the sequence: it counts once
        share = None if a.ratio_level == "token" else _one_per_completion(*batch.completions)
        self.metrics.mean("clip_ratio/low_mean", surrogate.clipped_low, share)
        self.metrics.mean("clip_ratio/high_mean", surrogate.clipped_high, share)
        self.metrics.mean("clip_ratio/region_mean", surrogate.clipped_low | surrogate.clipped_high, share)
        loss = surrogate.loss
        if batch.entropy_mask is not None:
            loss = loss * batch.entropy_mask
        if a.sampler_correction != "none":
            loss = loss * sampler_correction(
                batch.old_logprob,
                batch.sampler_logprob,
                *batch.completions,
                a.sampler_correction,
                low=a.sampler_low,
                high=a.sampler_high,
            )
        if a.off_policy_mask_threshold is not None:
            near = off_policy_mask(
                logprob, batch.sampler_logprob, batch.advantages, *batch.completions, a.off_policy_mask_threshold
            )
            self.metrics.mean("off_policy_masked", ~near)
            loss = loss * near
        return loss

    def kl(self, batch: MicroBatch, result: LogProbs) -> Tensor | None:
        """`[R]`, what β multiplies; None without a penalty in the loss."""
        a = self.algorithm
        if a.beta == 0 or a.kl_in == "reward":
            return None
        if a.kl_estimator == "full":
            return result.kl
        ratio = None
        if a.unbiased_kl:
            ratio = importance_ratio(result.logprob, batch.old_logprob, *batch.completions, a.ratio_level)
        return kl_penalty(result.logprob, batch.reference_logprob, a.kl_estimator, ratio)

    def metric_names(self) -> list[str]:
        """Means that a rank without data has to announce."""
        a = self.algorithm
        names = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
        names += ["kl"] * (a.beta > 0)
        return names + ["off_policy_masked"] * (a.off_policy_mask_threshold is not None)


def _one_per_completion(completion_index: Tensor, num_completions: int) -> Tensor:
    """float64 `[R]`, 1 / length of each token's completion."""
    ones = torch.ones_like(completion_index, dtype=torch.float64)
    return 1.0 / completion_sum(ones, completion_index, num_completions)[completion_index]
