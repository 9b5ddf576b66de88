"""Correct for samples of another policy: a sampler that rounds differently, or the policy of an earlier step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_core.algorithm.completions import completion_mean, completion_sum

if TYPE_CHECKING:
    from torch import Tensor

SAMPLER_CORRECTIONS = (
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
)


def sampler_correction(
    old_logprob: Tensor,
    sampler_logprob: Tensor,
    completion_index: Tensor,
    num_completions: int,
    correction: str = "token_truncate",
    *,
    low: float = 0.0,
    high: float = 3.0,
) -> Tensor:
    """Compute the importance weight `[R]` from the sampler's policy to the trainer's, a factor of the policy loss.

    With `d_t = logp_old_t − logp_sampler_t`, w is exp(d_t) (token), exp(Σ d) over the completion (sequence), which
    grows with length, or exp(mean d) (geometric). truncate clamps w into [low, high]; mask makes it 0 outside.

    token_truncate is TIS; sequence_mask is MIS (TRL's default); token_mask with both bounds is IcePop (0.5, 5).

    Args:
        old_logprob: `[R]` the trainer's log-probabilities under the weights that sampled.
        sampler_logprob: `[R]`; NaN where the sampler gave none, where the difference counts as 0.
        completion_index: int64 `[R]`, each token's completion, in `[0, num_completions)`.
        correction: one of `SAMPLER_CORRECTIONS`.
        low, high: bounds of the weight.

    Returns:
        The weight, without gradient.

    Raises:
        ValueError: an unknown correction, or bounds in the wrong order.
    """
    if correction not in SAMPLER_CORRECTIONS:
        known = ", ".join(SAMPLER_CORRECTIONS)
        raise ValueError(f"unknown sampler correction {correction!r}: choose one of {known}")
    if not 0 <= low < high:
        raise ValueError(f"sampler correction bounds are {low} and {high}: need 0 ≤ low < high")
    level, mode = correction.split("_")
    # detached, because it is a weight; the old log-probs may be those of the first pass, which carry a gradient
    log_weight = (old_logprob - sampler_logprob).detach().nan_to_num(nan=0.0)
    if level != "token":
        # in log space: a product of 2,000 ratios would leave float32's range on the way, a sum only at the end
        reduce = completion_sum if level == "sequence" else completion_mean
        log_weight = reduce(log_weight, completion_index, num_completions)[completion_index]
    weight = log_weight.exp().to(old_logprob.dtype)  # sums of completions are float64
    if mode == "truncate":
        return weight.clamp(low, high)
    return weight.masked_fill(~((weight >= low) & (weight <= high)), 0.0)


def off_policy_mask(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantages: Tensor,
    completion_index: Tensor,
    num_completions: int,
    threshold: float,
) -> Tensor:
    """Mask bad completions that have become unlikely, bool `[R]`, a factor of the policy loss.

    A completion is dropped where its advantage is negative and the mean of `logp_sampler − logp` over its tokens is
    above `threshold` (DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL's `off_policy_mask_threshold`).
    """
    drift = (sampler_logprob - logprob).detach().nan_to_num(nan=0.0)
    # a mean: a sum would drop long completions for being long
    near = completion_mean(drift, completion_index, num_completions) <= threshold
    return (advantages >= 0) | near[completion_index]
