"""What a step trains on: which prompts it takes, and its groups packed into minibatches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from grpo_core.algorithm.losses import token_weights
from grpo_core.config.options import GRPOConfig
from grpo_core.distributed import Distributed, all_reduce_sum, shard
from grpo_core.errors import InputError
from grpo_core.layout import GroupLayout
from grpo_core.rewards import Scores
from grpo_core.rng import permutation
from grpo_core.types import Group, Prompt

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: values of a batch are kept in dicts by batch
class MicroBatch:
    """Consecutive groups of a step, packed for one forward and backward; R predicted tokens.

    Attributes:
        groups: as sampled.
        prompts: of the groups.
        first_group: index of the first of them among the step's N groups.
        layout: the groups on one token axis.
        loss_weight: float32 `[R]`, of each token's loss in the optimiser step.
        sampler_logprob: float32 `[R]`.
        minibatch_tokens: tokens that count in the optimiser step, over micro-batches and ranks.
    """

    groups: Sequence[Group]
    prompts: Sequence[Prompt]
    first_group: int
    layout: GroupLayout
    loss_weight: Tensor
    sampler_logprob: Tensor
    minibatch_tokens: int

    def per_token(self, per_completion: np.ndarray) -> Tensor:
        """Spread this batch's part of the step's float64 `[N, G]` over its tokens: float32 `[R]` on the device."""
        return self.layout.per_token(per_completion[self.first_group : self.first_group + len(self.groups)].ravel())


Minibatch: TypeAlias = Sequence[MicroBatch]
"""The micro-batches of one optimiser step. Empty on a rank without groups, which steps with the others' gradient."""


class OldPass(NamedTuple):
    """What the policy that sampled says of a micro-batch, before the step changed it."""

    logprob: Tensor
    """float32 `[R]`."""
    entropy_mask: Tensor | None = None
    """bool `[R]`, tokens uncertain enough to be trained on; None for all."""


class Experience(NamedTuple):
    """What a step learns from: the values that the stages before the updates returned."""

    sampled: Sequence[Group]
    sampled_scores: Scores
    groups: Sequence[Group]
    """The N groups that are trained on."""
    scores: Scores
    positions: Sequence[int]
    """Of these groups among all that the step trains on, over the ranks."""
    minibatches: Sequence[Minibatch]
    old: Mapping[MicroBatch, OldPass] | None
    """None where the first training pass gives the old log-probs."""
    reference: Mapping[MicroBatch, Tensor] | None
    """The reference's log-probs `[R]`, or for the full KL its hidden states `[R, H]`; None without a KL penalty."""
    advantages: np.ndarray
    """float64 `[N, G]`."""


class BatchPass(NamedTuple):
    """One forward over a micro-batch: its loss, and the values that metrics are made from."""

    loss: Tensor
    """Scalar; it adds up over micro-batches and ranks."""
    logprob: Tensor
    """float32 `[R]`, detached, as all that follow."""
    entropy: Tensor
    """float32 `[R]`, in nats."""
    kl: Tensor | None
    """float32 `[R]`, what β multiplies; None without a penalty in the loss."""
    clipped_low: Tensor
    """bool `[R]`, the lower clip took the gradient away."""
    clipped_high: Tensor
    """bool `[R]`, the upper clip did."""
    off_policy: Tensor | None
    """bool `[R]`, tokens of completions dropped by `algorithm.off_policy_mask_threshold`; None where it is unset."""


class Update(NamedTuple):
    """One optimiser step: a pass over each micro-batch of a minibatch, and the step itself."""

    passes: Sequence[BatchPass]
    grad_norm: Tensor
    """Global norm of the gradient before clipping, on its device."""
    learning_rate: float


def check_enough_items(available: int, count: int) -> None:
    """Refuse a training set that cannot fill a step of `count` items.

    Raises:
        InputError: naming the option to lower.
    """
    if available < count:
        raise InputError(f"run.prompts_per_step is {count}, but the training set has {available}: set it lower")


def step_items(items: Sequence[Item], step: int, count: int, seed: int) -> list[Item]:
    """The `count` items of step `step`: each epoch is a new order, and a remainder that fills no step is left out.

    So no step holds an item twice: a prompt's random numbers are keyed by step and prompt, two copies would be one.
    """
    # by the step's number alone: a resumed run takes up the order where it was, with nothing saved
    epoch, index = divmod(step, len(items) // count)
    return [items[i] for i in permutation(seed, epoch, len(items))[index * count : (index + 1) * count]]


def step_positions(count: int, reserve: int, parts: int, dist: Distributed) -> list[int]:
    """List the prompts of a step that this rank samples, by their index among the `count + reserve`, ascending.

    Each of the `parts` (`algorithm.steps_per_generation`) is divided among the ranks, and the reserve behind them: so
    every optimiser step has work for every rank, and trains on the same groups whatever the number of ranks.
    """
    whole = [*(shard(range(count), part, parts) for part in range(parts)), range(count, count + reserve)]
    return [position for part in whole for position in shard(part, dist.rank, dist.world_size)]


def split_by_tokens(items: Sequence[Item], sizes: Sequence[int], budget: int) -> Iterator[list[Item]]:
    """Split items, in order, into runs whose sizes add up to at most `budget`; a larger item goes alone."""
    run: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        # a run of one may exceed the budget: a group is never split, its completions share their prompt
        if run and total + size > budget:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run


def make_minibatches(
    groups: Sequence[Group], positions: Sequence[int], config: GRPOConfig, dist: Distributed, device: torch.device
) -> list[Minibatch]:
    """Pack a step's groups: `algorithm.steps_per_generation` minibatches, each within the token budget a micro-batch.

    A token's weight depends on the counts of its whole minibatch, over all ranks; they are summed here, in the one
    collective that the loss needs. So gradients of micro-batches and ranks only have to be added.

    Args:
        groups: this rank's N groups, of equal size.
        positions: their indices among all groups that the step trains on, over the ranks; ascending.
        device: where the tensors go.
    """
    algorithm = config.algorithm
    # whether a completion takes part in the loss: one that was cut off may be masked
    counted = [
        [not (algorithm.mask_truncated_completions and c.finish_reason == "length") for c in group.completions]
        for group in groups
    ]
    # in Python's integers: the layout below is built on the host as well, and copied once
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    count = algorithm.steps_per_generation
    # consecutive groups of the whole step, whatever the ranks: some minibatches of this rank may be empty, but every
    # rank has as many
    wholes = [shard(range(config.run.prompts_per_step), part, count) for part in range(count)]
    bounds = [[n for n, position in enumerate(positions) if position in whole] for whole in wholes]
    local = [
        [
            sum(len(lengths[n]) for n in bound),
            sum(length for n in bound for length, counts in zip(lengths[n], counted[n], strict=True) if counts),
        ]
        for bound in bounds
    ]
    # One host read a step: the weights below are made from these numbers on the device.
    totals = all_reduce_sum(torch.tensor(local, device=device), dist).tolist()
    minibatches: list[Minibatch] = []
    for bound, (total_completions, total_tokens) in zip(bounds, totals, strict=True):
        sizes = [len(groups[n].prompt.token_ids) + sum(lengths[n]) for n in bound]
        micro_batches = []
        for indices in split_by_tokens(bound, sizes, config.optim.max_tokens_per_micro_batch):
            packed = [groups[n] for n in indices]
            layout = GroupLayout.from_groups(packed, device)
            loss_weight = token_weights(
                torch.tensor([length for n in indices for length in lengths[n]], device=device),
                layout.completion_index,
                algorithm.loss.average,
                total_completions=total_completions,
                total_tokens=total_tokens,
                max_length=config.rollout.max_new_tokens,
                completion_weights=torch.tensor(
                    [float(counts) for n in indices for counts in counted[n]], device=device
                ),
            )
            sampler_logprob = np.concatenate([c.logprobs for group in packed for c in group.completions])
            micro_batches.append(
                MicroBatch(
                    groups=packed,
                    prompts=[group.prompt for group in packed],
                    first_group=indices[0],
                    layout=layout,
                    loss_weight=loss_weight,
                    sampler_logprob=torch.from_numpy(sampler_logprob).to(device),
                    minibatch_tokens=total_tokens,
                )
            )
        minibatches.append(micro_batches)
    return minibatches
