"""Score completions: the protocol of a reward, and the scores of several rewards for a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from grpo_core.algorithm.advantages import has_signal
from grpo_core.types import Group


class Reward(Protocol):
    """Judges whole batches of groups at once.

    `name` labels it in metrics, logs and `algorithm.reward_weights`. Called with N groups of G completions each, it
    returns float64 `[N, G]` (or a `RewardOutput`), NaN where it cannot judge: a completion that no reward judges gets
    advantage 0. It must be a pure function of the groups: the same groups give the same numbers on every rank and after
    a resume. A method `begin_step(step, max_steps)`, if there is one, is called before each step.
    """

    name: str

    def __call__(self, groups: Sequence[Group]) -> np.ndarray | RewardOutput: ...


class RewardOutput(NamedTuple):
    """Result of a reward that also logs something."""

    values: np.ndarray
    """float64 `[N, G]`, NaN where it cannot judge."""
    metrics: Mapping[str, Sequence[float]] = MappingProxyType({})
    """Numbers by name; their mean over the step is written to `metrics.jsonl`."""
    columns: Mapping[str, Sequence[Any]] = MappingProxyType({})
    """`N · G` values by name, in the groups' order; written to `completions.jsonl`."""


@dataclass(frozen=True)
class Scores:
    """Scores that K rewards give N groups of G completions.

    Attributes:
        names: names of the rewards.
        by_reward: float64 `[K, N, G]`, NaN where a reward could not judge.
        total: float64 `[N, G]`, the weighted sum over the rewards that could judge; NaN where none could.
        seconds: time that each reward took, by name.
        metrics, columns: values that rewards logged, see `RewardOutput`; columns hold all N · G completions.
    """

    names: tuple[str, ...]
    by_reward: np.ndarray
    total: np.ndarray
    seconds: Mapping[str, float]
    metrics: Mapping[str, Sequence[float]]
    columns: Mapping[str, Sequence[Any]]

    def signal(self, each_reward: bool) -> np.ndarray:
        """Find the groups with a learning signal, bool `[N]`: their totals (or one reward's values) are not all equal.

        Args:
            each_reward: a reward that differs within the group is enough, as for GDPO.
        """
        if not each_reward:
            return has_signal(self.total)
        # the totals too: they differ where one member alone lacks a reward's judgement
        return np.any([has_signal(self.total), *(has_signal(values) for values in self.by_reward)], axis=0)

    def select(self, groups: np.ndarray) -> Scores:
        """Return the scores of some groups, int64 `[n]` indices into N; metrics and seconds stay those of all."""
        size = self.total.shape[1]
        members = (groups[:, None] * size + np.arange(size)).ravel()
        columns = {name: [values[i] for i in members] for name, values in self.columns.items()}
        return replace(self, by_reward=self.by_reward[:, groups], total=self.total[groups], columns=columns)


def check_reward_weights(rewards: Sequence[Reward], weights: Mapping[str, float]) -> None:
    """Refuse weights of unknown rewards, and rewards that share a name.

    Raises:
        ValueError: naming the key and the run's rewards, or the names.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"two rewards share a name: {names}")
    for key in weights:
        if key not in names:
            raise ValueError(f"algorithm.reward_weights.{key}: no such reward, this run has {', '.join(names)}")


def score(
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    weights: Mapping[str, float],
    *,
    group_size: int,
    step: int = 0,
    max_steps: int = 0,
) -> Scores:
    """Score N groups of `group_size` completions by every reward.

    Args:
        weights: weight by reward name; a reward that is not named weighs 1.
        step, max_steps: progress of the run, see `Reward`.

    Raises:
        ValueError: a reward returns another shape than `[N, G]`, or an infinite number.
    """
    shape = (len(groups), group_size)
    by_reward = np.zeros((len(rewards), *shape))
    total, judged = np.zeros(shape), np.zeros(shape, dtype=bool)
    # filled for every reward, so that a rank without prompts has the same metrics and makes the same collectives
    seconds = {reward.name: 0.0 for reward in rewards}
    metrics: dict[str, list[float]] = {}
    columns: dict[str, Sequence[Any]] = {}
    for index, reward in enumerate(rewards if groups else ()):  # a rank without prompts has nothing to judge
        start = time.perf_counter()
        if hasattr(reward, "begin_step"):
            reward.begin_step(step, max_steps)
        output = reward(groups)
        seconds[reward.name] = time.perf_counter() - start
        if isinstance(output, RewardOutput):
            for name, logged in output.metrics.items():
                metrics.setdefault(name, []).extend(map(float, logged))
            columns |= output.columns
            output = output.values
        values = np.asarray(output, dtype=np.float64)
        if values.shape != shape:
            raise ValueError(f"reward {reward.name!r} returned shape {values.shape} for groups of shape {shape}")
        if np.isinf(values).any():
            row, member = np.argwhere(np.isinf(values))[0]
            raise ValueError(
                f"reward {reward.name!r} is infinite for prompt {groups[row].id!r}, completion {member}: "
                "return a finite number, or NaN if it cannot judge"
            )
        # summed in the order of the rewards, so that the total rounds alike wherever it is computed
        known = ~np.isnan(values)
        total += np.where(known, values, 0.0) * weights.get(reward.name, 1.0)
        judged |= known
        by_reward[index] = values
    total[~judged] = np.nan  # not 0, which would count as a score in the group's mean
    return Scores(tuple(seconds), by_reward, total, seconds, metrics, columns)
