"""Sanity checks on the first step: stop the run if sampler and trainer disagree, the gradient is not finite, or a
feature has no effect. A run that fails one of them would train on noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.config.options import AlgorithmConfig
from grpo_core.distributed import Distributed, gather_objects
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.types import Group

log = logging.getLogger(__name__)

# Nats a token, in the mean, by which sampler and trainer may differ: rounding alone stays well below.
_MISMATCH = {torch.float64: 1e-4, torch.float32: 1e-3}
_MISMATCH_HALF = 0.2


class FirstStepError(RuntimeError):
    """The first step shows that a run cannot learn what it is meant to; the message says what is wrong."""


def check_first_step(
    values: Mapping[str, float],
    algorithm: AlgorithmConfig,
    policy: Policy,
    groups: Sequence[Group],
    temperature: float,
    dist: Distributed | None = None,
    sampler: GroupSampler | None = None,
) -> None:
    """Check what a run's first step gave.

    Args:
        values: the step's metrics, over all ranks.
        groups: this rank's, that the step trained on.
        dist: this process's place among the ranks, all of which must call this.
        sampler: made the groups; it names the end tokens if no completion had one.

    Raises:
        FirstStepError: the gradient is not finite; the sampler's log-probs are not the trainer's; the policy has a
            KL to a reference that is its own copy; a ratio was clipped although the policy had not moved; a kind of
            feature has no effect.
    """
    norm = values["grad_norm"]
    if not math.isfinite(norm):
        raise FirstStepError(
            f"the first gradient is not finite (norm {norm}): look for NaN in the weights or the features, and train "
            "in bfloat16 or float32"
        )
    limit = _MISMATCH.get(policy.dtype, _MISMATCH_HALF)
    difference = values["sampling/sampling_logp_difference/mean"]
    if difference > limit:
        raise FirstStepError(
            f"the sampler's log-probs differ from the trainer's by {difference:.3g} nats a token in the first step, "
            f"more than rounding does ({limit:g}): they are not of the same policy (adapters, dropout, temperature)"
        )
    if algorithm.num_iterations * algorithm.steps_per_generation == 1:  # else metrics are of later passes, too
        if values["clip_ratio/region_mean"] > 0 and algorithm.ratio_level == "token":
            raise FirstStepError(
                "a token's ratio was clipped in the first step, although the policy had not moved: two passes over the "
                "same tokens differ (a layer that acts otherwise in training mode?)"
            )
        if algorithm.beta > 0 and algorithm.reference == "frozen" and abs(values["kl"]) > limit:
            raise FirstStepError(
                f"the KL to the reference is {values['kl']:.3g} in the first step, although the reference is a copy of "
                "the policy: the forward pass is not deterministic (dropout?)"
            )
    if values.get("completions/clipped_ratio") == 1 and isinstance(sampler, GroupSampler):
        log.warning(
            "every completion of the first step was cut off at rollout.max_new_tokens: %s",
            sampler.why_none_ends(),
        )
    check_features_on_all_ranks(policy, groups[0] if groups else None, temperature, dist or Distributed())


def check_features_on_all_ranks(policy: Policy, group: Group | None, temperature: float, dist: Distributed) -> None:
    """`check_features` of each rank's group, which all ranks then raise together: one alone would leave the others
    waiting in their next collective.

    Raises:
        FirstStepError: what the first rank found that found anything.
    """
    found = None
    try:
        if group is not None:
            check_features(policy, group, temperature)
    except FirstStepError as error:
        found = str(error)
    if messages := [message for message in gather_objects(found, dist) if message is not None]:
        raise FirstStepError(messages[0])


@torch.no_grad()
def check_features(policy: Policy, group: Group, temperature: float) -> None:
    """Check that every kind of feature that a prompt carries has an effect: log-probs must change when it is zeroed.

    Costs a forward over one group for each kind.

    Raises:
        FirstStepError: naming the feature.
    """
    prompt = group.prompt
    if not prompt.features:
        return
    layout = GroupLayout.from_groups([group], policy.device)

    def logprob(features: dict[str, Tensor]) -> Tensor:
        return policy.logprobs(layout, [replace(prompt, features=features)], temperature=temperature).logprob

    with_all = logprob(prompt.features)
    for name, feature in prompt.features.items():
        if not feature.any():
            continue  # zeros already
        without = logprob(prompt.features | {name: torch.zeros_like(feature)})
        if torch.equal(with_all, without):
            raise FirstStepError(
                f"the policy's answers to prompt {prompt.id!r} do not depend on its {name!r} features: they do not "
                "reach the language model (look at the prompt's placeholders and the fusion)"
            )
