"""Combines policy loss, KL penalty and entropy bonus into the scalar loss of one micro-batch."""

from __future__ import annotations

from torch import Tensor

from grpo_core.algorithm.entropy import entropy_bonus
from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import importance_ratio, policy_loss
from grpo_core.algorithm.off_policy import off_policy_mask, sampler_correction
from grpo_core.config.options import AlgorithmConfig
from grpo_core.policy import LogProbs
from grpo_core.training.batch import BatchPass, MicroBatch, OldPass


def compute_loss(
    algorithm: AlgorithmConfig,
    batch: MicroBatch,
    current: LogProbs,
    old: OldPass,
    advantages: Tensor,
    reference_logprob: Tensor | None,
    *,
    beta: float,
    entropy_coef: float,
) -> BatchPass:
    """`Σ loss_weight · (policy loss + β · KL) − entropy_coef · mean entropy`.

    Args:
        current: of the policy as it is, with entropies, and with the KL for `kl_estimator: full`.
        old: of the policy that sampled.
        advantages: float32 `[R]`.
        reference_logprob: float32 `[R]`; needed by the estimators k1, k2 and k3 in the loss.
        beta, entropy_coef: of this step.

    Raises:
        ValueError: `current` lacks entropies, or nothing says what the KL is measured against.
    """
    if current.entropy is None:
        raise ValueError("compute_loss reads entropies: ask Policy.logprobs for them with entropy=True")
    index, count = batch.layout.completion_index, batch.layout.num_completions
    # before averaging: weights are applied once, below, to everything that a token contributes
    surrogate = policy_loss(
        algorithm.loss, current.logprob, old.logprob, advantages, index, count, ratio_level=algorithm.ratio_level
    )

    # Masks and corrections are factors of the policy loss alone: the KL must hold a token that they drop, too.
    token_loss, off_policy = surrogate.loss, None
    if old.entropy_mask is not None:
        token_loss = token_loss * old.entropy_mask
    if algorithm.sampler_correction != "none":
        token_loss = token_loss * sampler_correction(
            old.logprob,
            batch.sampler_logprob,
            index,
            count,
            algorithm.sampler_correction,
            low=algorithm.sampler_low,
            high=algorithm.sampler_high,
        )
    if algorithm.off_policy_mask_threshold is not None:
        kept = off_policy_mask(
            current.logprob, batch.sampler_logprob, advantages, index, count, algorithm.off_policy_mask_threshold
        )
        token_loss, off_policy = token_loss * kept, ~kept

    kl = None
    if algorithm.beta > 0 and algorithm.kl_in == "loss":
        if current.kl is not None:
            kl = current.kl  # over the whole vocabulary, from the head itself
        elif reference_logprob is None:
            raise ValueError("algorithm.beta is above 0: give reference_logprob, or log-probs with the full KL")
        else:
            # Multiplied by the ratio, k3's gradient is that of the reverse KL on samples of an older policy too.
            ratio = None
            if algorithm.unbiased_kl:
                # By the token's own where the loss takes the product of a whole completion, which has no bound.
                level = "token" if algorithm.ratio_level == "sequence_product" else algorithm.ratio_level
                ratio = importance_ratio(current.logprob, old.logprob, index, count, level)
            kl = kl_penalty(current.logprob, reference_logprob, algorithm.kl_estimator, ratio)
        token_loss = token_loss + beta * kl

    loss = (batch.loss_weight * token_loss).sum()
    if entropy_coef:
        # A mean over counted tokens whatever the loss type's average is; a masked completion earns no bonus.
        counted = (batch.loss_weight > 0).to(loss.dtype)
        loss = loss - entropy_coef * entropy_bonus(current.entropy, max(batch.minibatch_tokens, 1), counted)
    return BatchPass(
        loss,
        current.logprob.detach(),
        current.entropy.detach(),
        None if kl is None else kl.detach(),
        surrogate.clipped_low,
        surrogate.clipped_high,
        off_policy,
    )
