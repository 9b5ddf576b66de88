"""Estimate the KL divergence of the policy from its reference, from sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.algorithm.completions import completion_sum
from grpo_kernels import kl_estimate


def kl_penalty(
    logprob: Tensor,
    reference_logprob: Tensor,
    kl_estimator: str = "k3",
    ratio: Tensor | None = None,
) -> Tensor:
    """Estimate the KL to the reference per token, `[R]`, differentiable: `kl_estimate`, times `ratio` if there is one.

    k3 is unbiased on samples of the policy itself and never negative. As a penalty, though, its *gradient* there is
    that of the forward KL, k1's is zero in the mean, and only k2's is that of the reverse KL. Multiplied by the ratio,
    k3 is unbiased in value and gradient, on and off policy (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    `use_bias_correction_kl`).

    Args:
        logprob, reference_logprob: `[R]`; no gradient flows into the reference.
        kl_estimator: k1, k2 or k3.
        ratio: `[R]`, factor of the estimate: `importance_ratio` with its gradient.

    Raises:
        ValueError: an unknown estimator.
    """
    estimate = kl_estimate(logprob, reference_logprob, kl_estimator)  # type: ignore[arg-type]  # checked there
    return estimate if ratio is None else estimate * ratio


@torch.no_grad()
def completion_kl(
    logprob: Tensor,
    reference_logprob: Tensor,
    completion_index: Tensor,
    num_completions: int,
    kl_estimator: str = "k1",
) -> Tensor:
    """Sum the estimate over each completion, float64 `[M]`, for a penalty in the reward, `R − β · KL`.

    In the reward the estimate is a number, so its value has to be unbiased and its gradient does not matter: k1 and k3
    are. Log-probabilities are those of the policy that sampled.
    """
    return completion_sum(kl_penalty(logprob, reference_logprob, kl_estimator), completion_index, num_completions)
