"""Group-relative advantages, pure functions in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np

STD_EPSILON = 1e-4  # TRL's; it only softens nearly equal rewards, equal ones give exactly 0 below


def group_advantages(rewards: np.ndarray, scale: Literal["group", "none"] = "group") -> np.ndarray:
    """How much better each completion is than its group: `(r − mean) / (std + 1e-4)` (DeepSeekMath, eq. 3).

    The group's first reward is subtracted before anything else, so equal rewards give exactly 0 whatever their value: a
    residue of rounding would have the same sign for all members and push the whole group.

    Args:
        rewards: float64 `[N, G]`. NaN means that a completion could not be judged: it is left out of its group's
            statistics and gets 0.
        scale: `group` divides by the group's standard deviation (unbiased, as TRL's), `none` only centres (Dr. GRPO).

    Returns:
        float64 `[N, G]`. A group with fewer than two judged members gets 0.

    Raises:
        ValueError: rewards are not two-dimensional, or one is infinite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [N, G], got shape {rewards.shape}")
    if np.isinf(rewards).any():
        raise ValueError(
            "a reward is infinite: a reward function must return finite numbers, or NaN if it cannot judge"
        )
    judged = ~np.isnan(rewards)
    count = judged.sum(axis=1, keepdims=True)
    first = np.take_along_axis(rewards, judged.argmax(axis=1)[:, None], axis=1) if rewards.size else rewards[:, :1]
    shifted = np.where(judged, rewards - first, 0.0)
    mean = shifted.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(judged & (count > 1), shifted - mean, 0.0)
    if scale == "none":
        return centred
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return centred / (std + STD_EPSILON)


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """bool `[N]`: the group's judged rewards `[N, G]` are not all equal, so it moves the policy."""
    rewards = np.asarray(rewards, dtype=np.float64)
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return high > low
