"""What must hold in a run's first step. A run in which it does not would train on noise, and is stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from grpo_core.config.options import AlgorithmConfig
from grpo_core.policy import Policy
from grpo_core.training.objective import MicroBatch

_MISMATCH = {torch.float64: 1e-4, torch.float32: 1e-3}
_MISMATCH_HALF = 0.2
"""Nats a token, in the mean, by which sampler and trainer may differ: rounding alone stays well below."""


class FirstStepError(RuntimeError):
    """The first step shows that a run cannot learn what it is meant to; the message says what is wrong."""


def check_first_step(values: Mapping[str, float], algorithm: AlgorithmConfig, dtype: torch.dtype) -> None:
    """Check the reduced metrics of a run's first step.

    Raises:
        FirstStepError: the gradient is not finite; the sampler's log-probs are not the trainer's; the policy has a
            KL to a reference that is its own copy; a ratio was clipped although the policy had not moved.
    """
    norm = values["grad_norm"]
    if not math.isfinite(norm):
        raise FirstStepError(
            f"the first gradient is not finite (norm {norm}): look for NaN in the weights or the features, and train "
            "in bfloat16 or float32"
        )
    limit = _MISMATCH.get(dtype, _MISMATCH_HALF)
    difference = values["sampling/sampling_logp_difference/mean"]
    if difference > limit:
        raise FirstStepError(
            f"the sampler's log-probs differ from the trainer's by {difference:.3g} nats a token in the first step, "
            f"more than rounding does ({limit:g}): they are not of the same policy (adapters, dropout, temperature)"
        )
    if algorithm.num_iterations * algorithm.steps_per_generation > 1:
        return  # the metrics below are also of later passes
    if values["clip_ratio/region_mean"] > 0 and algorithm.ratio_level == "token":
        raise FirstStepError(
            "a token's ratio was clipped in the first step, although the policy had not moved: two passes over the "
            "same tokens differ (a layer that acts otherwise in training mode?)"
        )
    if algorithm.beta > 0 and algorithm.reference == "frozen" and abs(values["kl"]) > limit:
        raise FirstStepError(
            f"the KL to the reference is {values['kl']:.3g} in the first step, although the reference is a copy of the "
            "policy: the forward pass is not deterministic (dropout?)"
        )


@torch.no_grad()
def check_features(policy: Policy, batch: MicroBatch, temperature: float) -> None:
    """Check that every kind of feature that prompts carry has an effect: log-probs must change when it is zeroed.

    Costs a forward over one group for each kind.

    Raises:
        FirstStepError: naming the feature.
    """
    prompt, group = batch.groups[0].prompt, batch.groups[0]
    if not prompt.features:
        return
    layout = type(batch.layout).from_groups([group], batch.layout.token_ids.device)

    def logprob(features):
        return policy.logprobs(layout, [replace(prompt, features=features)], temperature=temperature).logprob

    own = logprob(prompt.features)
    for name, feature in prompt.features.items():
        if not feature.any():
            continue
        without = logprob(prompt.features | {name: torch.zeros_like(feature)})
        if torch.equal(own, without):
            raise FirstStepError(
                f"the policy's answers to prompt {prompt.id!r} do not depend on its {name!r} features: they do not "
                "reach the language model (look at the prompt's placeholders and the fusion)"
            )
