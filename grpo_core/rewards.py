"""Rewards as numbers: the protocol a reward function keeps, and how several are weighed into one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from grpo_core.types import Group


class Reward(Protocol):
    """Judges whole batches of groups at once.

    `name` labels it in metrics, logs and `algorithm.reward_weights`. Called with N groups of G completions each, it
    returns float64 `[N, G]`, NaN where it cannot judge (a completion that no reward judges gets advantage 0). It must
    be a pure function of the groups: the same groups give the same numbers on every rank and after a resume.
    """

    name: str

    def __call__(self, groups: Sequence[Group]) -> np.ndarray: ...


def check_reward_weights(rewards: Sequence[Reward], weights: Mapping[str, float]) -> None:
    """Refuse a weight that names no reward.

    Raises:
        ValueError: naming the key and the rewards there are.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"two rewards share a name: {names}")
    for key in weights:
        if key not in names:
            raise ValueError(f"algorithm.reward_weights.{key}: no such reward, this run has {', '.join(names)}")


def score_groups(groups: Sequence[Group], rewards: Sequence[Reward], weights: Mapping[str, float]) -> dict[str, float]:
    """Fill `rewards_by_name` and `rewards` of every group; return each reward's seconds, by name.

    A completion's reward is the weighted sum of what the rewards could judge; NaN only if none could.

    Raises:
        ValueError: a reward returns another shape than `[N, G]`, or an infinite number.
    """
    seconds: dict[str, float] = {}
    if not groups:
        return {reward.name: 0.0 for reward in rewards}
    shape = (len(groups), len(groups[0].completions))
    total, judged = np.zeros(shape), np.zeros(shape, dtype=bool)
    for reward in rewards:
        start = time.perf_counter()
        values = np.asarray(reward(groups), dtype=np.float64)
        seconds[reward.name] = time.perf_counter() - start
        if values.shape != shape:
            raise ValueError(f"reward {reward.name!r} returned shape {values.shape} for groups of shape {shape}")
        if np.isinf(values).any():
            row, member = np.argwhere(np.isinf(values))[0]
            raise ValueError(
                f"reward {reward.name!r} is infinite for prompt {groups[row].id!r}, completion {member}: "
                "return a finite number, or NaN if it cannot judge"
            )
        known = ~np.isnan(values)
        total += np.where(known, values, 0.0) * weights.get(reward.name, 1.0)
        judged |= known
        for group, row in zip(groups, values, strict=True):
            group.rewards_by_name[reward.name] = row
    total[~judged] = np.nan
    for group, row in zip(groups, total, strict=True):
        group.rewards = row
    return seconds
