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
from grpo_core.distributed import Distributed, all_reduce_sum, gather_objects
from grpo_core.errors import TrainingStopped
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.backends.transformers import TransformersDecoder
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.types import Group

log = logging.getLogger(__name__)

# Nats a token, in the mean, by which sampler and trainer may differ: rounding alone stays well below.
_MISMATCH = {torch.float64: 1e-4, torch.float32: 1e-3}

HALF_PRECISION_FACTOR = 3.0
"""In half precision the limit is this many times the mean difference of the model's own forward to itself, with and
without a cache, or the dtype's step at 1 (2⁻⁷ in bfloat16, 2⁻¹⁰ in float16) if that is more: what rounding alone
leaves there, which grows with depth and vocabulary."""

_MEMBERS, _TOKENS = 4, 128  # of the first group, that difference is measured on: some seconds for a model of 7B


class FirstStepError(TrainingStopped):
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
    """Check what a run's first step gave. On every rank, as it makes collectives; all ranks raise, or none.

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
    # looked up here: most runs need no measurement
    limit = _MISMATCH.get(policy.dtype) or mismatch_limit(policy, groups, temperature, dist or Distributed())
    difference = values["sampling/sampling_logp_difference/mean"]
    if math.isnan(difference):  # of which every comparison below is false
        raise FirstStepError(
            "log-probs are not finite in the first step: the policy has diverged (a cold start with too high a "
            f"learning rate?), or rollout.temperature {temperature:g} takes logits out of range"
        )
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
def mismatch_limit(policy: Policy, groups: Sequence[Group], temperature: float, dist: Distributed) -> float:
    """Measure by how many nats a token, in the mean, sampler and trainer may differ in half precision.

    The same number on every rank. Measured, because a fixed number that a deep model of a large vocabulary needs would
    let pass what is wrong in another.

    Args:
        groups: this rank's; the first is measured.
    """
    difference, tokens = 0.0, 0
    if groups:
        deltas = cache_differences(policy, groups[0], temperature)
        difference, tokens = float(deltas.sum()), len(deltas)
    # float64: NCCL and gloo both sum it, and ranks must get one number
    total = all_reduce_sum(torch.tensor([difference, tokens], dtype=torch.float64, device=dist.device), dist)
    mean = float(total[0]) / max(float(total[1]), 1.0)
    # A tiny model may round to the same logits in both ways, while sampler and trainer do not round theirs at all: of
    # a mean below the dtype's own step at 1, nothing follows.
    return HALF_PRECISION_FACTOR * max(mean, torch.finfo(policy.dtype).eps)


@torch.no_grad()
def cache_differences(policy: Policy, group: Group, temperature: float) -> Tensor:
    """Compare `model(...)` with itself, without and with its own cache, on a group's completions.

    Nothing of ours is in it but the embeddings: prompt and completion in one forward, against the prompt in one and the
    completion token by token. At most `_MEMBERS` completions, and of each the first `_TOKENS`.

    Returns:
        Absolute differences of the tokens' log-probs, in nats, float64 `[tokens]`.
    """
    completions = [
        completion.token_ids[:_TOKENS] for completion in group.completions[:_MEMBERS] if completion.token_ids
    ]
    if not completions:
        return torch.zeros(0, dtype=torch.float64)
    model = policy.causal_lm
    (prompt,) = policy.embed([group.prompt])
    prompt = prompt.to(policy.device, policy.dtype)
    longest = max(map(len, completions))
    # shorter completions are filled up: what follows a token does not change it, and only their own are compared
    padded = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in completions], device=policy.device)

    def chosen(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.double() / max(temperature, 1e-6)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    embedded = model.get_input_embeddings()(padded)
    whole = torch.stack(
        [
            # one at a time: logits of all would be [members, tokens, V]
            chosen(
                model(inputs_embeds=torch.cat((prompt, row))[None], use_cache=False, logits_to_keep=longest + 1).logits[
                    0, :-1
                ],
                ids,
            )
            for row, ids in zip(embedded, padded, strict=True)
        ]
    )
    decoder = TransformersDecoder(model)
    decoder.group_size = len(completions)
    first = decoder.prefill([prompt]).expand(len(completions), -1)
    stepwise = [chosen(first, padded[:, 0])]
    for column in range(longest - 1):
        stepwise.append(chosen(decoder.step(padded[:, column]), padded[:, column + 1]))
    own = torch.tensor([[column < len(ids) for column in range(longest)] for ids in completions])
    return (whole - torch.stack(stepwise, dim=1)).abs().cpu()[own]


@torch.no_grad()
def check_features(policy: Policy, group: Group, temperature: float) -> None:
    """Check that every kind of feature that a prompt carries has an effect: log-probs must change when it is zeroed.

    Costs a forward over one group for each kind, and where log-probs do not change two more, to tell a feature that
    does not arrive from a policy that says the same whatever it is given.

    Raises:
        FirstStepError: naming the feature, or what is wrong with the policy.
    """
    prompt = group.prompt
    if not prompt.features:
        return
    layout = GroupLayout.from_groups([group], policy.device)

    def logprob(features: dict[str, Tensor], temperature: float = temperature) -> Tensor:
        return policy.logprobs(layout, [replace(prompt, features=features)], temperature=temperature).logprob

    with_all = logprob(prompt.features)
    if not with_all.isfinite().all():
        raise FirstStepError(
            f"log-probs of prompt {prompt.id!r} are not finite: the policy has diverged (a cold start with too high a "
            f"learning rate?), or rollout.temperature {temperature:g} takes logits out of range"
        )
    for name, feature in prompt.features.items():
        if not feature.any():
            continue  # zeros already
        others = prompt.features | {name: torch.zeros_like(feature)}
        if torch.equal(with_all, logprob(others)):
            if not torch.equal(logprob(prompt.features, 1.0), logprob(others, 1.0)):
                raise FirstStepError(
                    f"rollout.temperature {temperature:g} leaves no difference between logits: log-probs of prompt "
                    f"{prompt.id!r} do not depend on its features, and at temperature 1 they do. Set it near 1"
                )
            if with_all.abs().max() < 1e-6:
                raise FirstStepError(
                    f"the policy gives every token of its answers to prompt {prompt.id!r} probability 1, whatever it "
                    "is given: it has diverged or collapsed. Look at the loss and learning rate of the cold start, or "
                    "at the model that the run starts from"
                )
            raise FirstStepError(
                f"the policy's answers to prompt {prompt.id!r} do not depend on its {name!r} features: they do not "
                "reach the language model (look at the prompt's placeholders and the fusion)"
            )
