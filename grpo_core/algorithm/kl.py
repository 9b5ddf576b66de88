"""Estimates of how far the policy has gone from its reference, from sampled tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grpo_core.algorithm.completions import completion_sum


def kl_penalty(
    logprob: Tensor,
    reference_logprob: Tensor,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    ratio: Tensor | None = None,
) -> Tensor:
    """Per-token estimate `[R]` of KL(policy ‖ reference) on sampled tokens (Schulman's k1, k2, k3), differentiable.

    With `d = logp − logp_ref`: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d. k3 is unbiased on the policy's own samples and
    never negative. As a penalty, though, its *gradient* there is that of the forward KL, k1's is zero in the mean, and
    only k2's is that of the reverse KL. Multiplied by the ratio, k3 is unbiased in value and gradient, on and off
    policy (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`).

    Args:
        logprob, reference_logprob: `[R]`; no gradient flows into the reference.
        ratio: `[R]`, `importance_ratio` with its gradient, to multiply by.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = logprob - reference_logprob.detach()
    if estimator == "k1":
        penalty = difference
    elif estimator == "k2":
        penalty = 0.5 * difference.square()
    elif estimator == "k3":
        penalty = torch.expm1(-difference) + difference
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")
    return penalty if ratio is None else penalty * ratio


@torch.no_grad()
def completion_kl(
    logprob: Tensor,
    reference_logprob: Tensor,
    completion_index: Tensor,
    num_completions: int,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:
    """float64 `[M]`: the estimate summed over each completion, for a penalty in the reward, `R − β · KL`.

    In the reward the estimate is a number, so its value has to be unbiased and its gradient does not matter: k1 and k3
    are. Log-probabilities are those of the policy that sampled.
    """
    return completion_sum(kl_penalty(logprob, reference_logprob, estimator), completion_index, num_completions)
