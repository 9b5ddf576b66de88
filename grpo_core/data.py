"""Which items a step sees, and how they are split into micro-batches: functions of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from grpo_core.rng import permutation

Item = TypeVar("Item")


def step_items(items: Sequence[Item], step: int, count: int, seed: int) -> list[Item]:
    """The `count` items of step `step`: each epoch is a new order, and its remainder that fills no step is left out.

    So no step holds an item twice: a prompt's random numbers are keyed by step and prompt, two copies would be one.

    Raises:
        ValueError: there are fewer items than a step needs.
    """
    steps_per_epoch = len(items) // count
    if not steps_per_epoch:
        raise ValueError(f"run.prompts_per_step is {count}, but the training set has {len(items)}: set it lower")
    epoch, index = divmod(step, steps_per_epoch)
    return [items[i] for i in permutation(seed, epoch, len(items))[index * count : (index + 1) * count]]


def by_token_budget(items: Sequence[Item], sizes: Sequence[int], budget: int) -> Iterator[list[Item]]:
    """Consecutive items whose sizes add up to at most `budget`; a larger item goes alone."""
    part: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if part and total + size > budget:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part
