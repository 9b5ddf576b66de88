"""Compute group-relative advantages as pure functions in float64.

Rewards that are equal up to rounding give exactly 0 whatever their value (`has_signal`): a residue of rounding would
push a whole group one way, and Adam turns a gradient of any size into a step of full length. NaN means that a
completion could not be judged; a group with fewer members than others is a row padded with NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STD_EPSILON = 1e-4  # TRL's; it only softens nearly equal rewards, equal ones give exactly 0 below
# Of a group's largest |reward|: below it a spread is rounding. A mean of five float64 numbers, summed in two orders,
# differs by 1e-16 of itself; one computed in float32 by 1e-7.
SIGNAL_TOLERANCE = 1e-6


def group_advantages(
    rewards: np.ndarray,
    scale: str = "group",
    baseline: str = "mean",
    *,
    batch_std: float | None = None,
) -> np.ndarray:
    """Compare each completion with its group: `(r − mean) / (std + 1e-4)` (DeepSeekMath, arXiv 2402.03300, eq. 3).

    Args:
        rewards: float64 `[N, G]`. NaN is left out of its group's statistics and gets advantage 0.
        scale: divide by the standard deviation of the group, or of all rewards of the step (`batch`; arXiv 2508.08221),
            or only centre (`none`; Dr. GRPO). Standard deviations are unbiased, as TRL's.
        baseline: `mean` of the group; `leave_one_out`, the mean of the *other* members (RLOO, arXiv 2402.14740), which
            makes the advantage n / (n − 1) times as large.
        batch_std: for scale `batch`, the standard deviation over all ranks, `moments_std` of their moments; by default
            that of these rewards.

    Returns:
        float64 `[N, G]`. A group without signal (`has_signal`) gets 0.

    Raises:
        ValueError: rewards are not two-dimensional, one is infinite, or the scale or baseline is unknown.
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
    # argmax finds the first judged member; if there is none it gives member 0, whose NaN the masks drop
    first = np.take_along_axis(rewards, judged.argmax(axis=1)[:, None], axis=1) if rewards.size else rewards[:, :1]
    shifted = np.where(judged, rewards - first, 0.0)
    mean = shifted.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(judged & has_signal(rewards)[:, None], shifted - mean, 0.0)
    if scale == "group":
        std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    elif scale == "batch":
        std = moments_std(moments(rewards)) if batch_std is None else batch_std
    elif scale != "none":
        raise ValueError(f"unknown scale of rewards {scale!r}: choose group, batch or none")
    if baseline == "leave_one_out":
        centred = centred * (count / np.maximum(count - 1, 1))
    elif baseline != "mean":
        raise ValueError(f"unknown baseline {baseline!r}: choose mean or leave_one_out")
    return centred if scale == "none" else centred / (std + STD_EPSILON)


def combined_advantages(
    rewards: np.ndarray, weights: Sequence[float], baseline: str = "mean", *, batch_std: float | None = None
) -> np.ndarray:
    """GDPO (arXiv 2601.05242): scale each reward within its group, sum by weight, scale over the batch.

    Where rewards differ in spread, their plain sum lets the widest decide; here each counts by its weight. GDPO centres
    over the batch too, which changes nothing: each group's sum is 0 already.

    Args:
        rewards: float64 `[K, N, G]`, of K rewards; NaN where one could not judge adds nothing.
        weights: `[K]`.
        baseline: as for `group_advantages`.
        batch_std: standard deviation of `weighted_advantages` over all ranks; by default over these.

    Returns:
        float64 `[N, G]`; 0 where no reward could judge.
    """
    total = weighted_advantages(rewards, weights, baseline)
    std = moments_std(moments(total)) if batch_std is None else batch_std
    return np.nan_to_num(total, nan=0.0) / (std + STD_EPSILON)


def weighted_advantages(rewards: np.ndarray, weights: Sequence[float], baseline: str = "mean") -> np.ndarray:
    """Sum the group advantages of each reward by weight, float64 `[N, G]`, NaN where no reward could judge.

    Arguments as in `combined_advantages`, which scales the sum over the batch: ranks exchange its `moments`.

    Raises:
        ValueError: rewards are not `[K, N, G]` with K weights, or `group_advantages` refuses one of them.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 3 or len(rewards) != len(weights):
        raise ValueError(f"rewards must be [K, N, G] with K weights, got {rewards.shape} and {len(weights)} weights")
    total = sum(
        (weight * group_advantages(one, "group", baseline) for one, weight in zip(rewards, weights, strict=True)),
        np.zeros(rewards.shape[1:]),
    )
    # a reward that could not judge added 0; NaN only where none could, so that the batch's spread leaves it out
    return np.where(np.isnan(rewards).all(axis=0), np.nan, total)


def moments(values: np.ndarray) -> np.ndarray:
    """Compute the moments of all values that are not NaN, float64 `[3]`: count, mean, sum of squared deviations.

    Ranks exchange them for a standard deviation over all ranks (`gather_rows`, then `combine_moments`). Plain sums of
    squares could simply be added, but lose the digits of a small spread at a large mean.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:  # a rank whose rewards are all NaN still takes part in the exchange
        return np.zeros(3)
    shifted = values - values[0]  # equal values have exactly no spread
    mean = shifted.mean()
    return np.array([values.size, values[0] + mean, ((shifted - mean) ** 2).sum()])


def combine_moments(rows: np.ndarray) -> np.ndarray:
    """Combine the moments `[W, 3]` of disjoint sets into those of their union, `[3]` (Chan, Golub and LeVeque)."""
    count, mean, squares = 0.0, 0.0, 0.0
    # in the order of the ranks, so that every rank gets the same bits
    for row_count, row_mean, row_squares in np.asarray(rows, dtype=np.float64).reshape(-1, 3).tolist():
        if not row_count:  # its mean is a placeholder
            continue
        total = count + row_count
        # the first mean is taken as it is: mean · n / n may round, and one rank's moments must come back unchanged
        difference = row_mean - mean if count else 0.0
        mean = mean + difference * row_count / total if count else row_mean
        squares += row_squares + difference**2 * count * row_count / total
        count = total
    return np.array([count, mean, squares])


def moments_std(row: np.ndarray) -> float:
    """Unbiased standard deviation from moments `[3]`; 0 for fewer than two values."""
    count, _, squares = np.asarray(row, dtype=np.float64).tolist()
    return float(np.sqrt(squares / (count - 1))) if count > 1 else 0.0


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """Find the groups whose judged rewards `[N, G]` differ by more than rounding, bool `[N]`: these move the policy."""
    rewards = np.asarray(rewards, dtype=np.float64)
    # a group without a judged member has low = inf, high = −inf: no signal; a lone member has a spread of 0
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return high - low > SIGNAL_TOLERANCE * np.maximum(np.abs(low), np.abs(high))


def fill_unjudged(rewards: np.ndarray) -> np.ndarray:
    """Put the mean of a group's judged members where one reward could not judge, float64 `[N, G]`.

    In a sum over rewards, 0 would punish a member for not being judged, and NaN would discard what other rewards say of
    it. With the mean it is compared on what was judged. A group without a judged member gets 0, the same for all.
    """
    known = ~np.isnan(rewards)
    # the mean of deviations from the first judged member: where all judged ones are equal, it is exactly their value
    first = np.take_along_axis(rewards, known.argmax(axis=1)[:, None], axis=1)
    deviations = np.where(known, rewards - first, 0.0)
    mean = first + deviations.sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    return np.where(known, rewards, np.nan_to_num(mean, nan=0.0))


def choose_groups(signal: np.ndarray, count: int) -> np.ndarray:
    """Choose the `count` groups that a step trains on (dynamic sampling from a fixed reserve).

    Groups with signal first, in their order; only where these are too few, groups without, in theirs. The choice is a
    function of the rewards alone, and its size never varies, so ranks keep in step.

    Args:
        signal: bool `[N]` with N ≥ count, `has_signal` of all groups that were sampled.

    Returns:
        int64 `[count]`, ascending.

    Raises:
        ValueError: there are fewer groups than `count`.
    """
    signal = np.asarray(signal, dtype=bool)
    if count > len(signal):
        raise ValueError(f"{count} groups are wanted of {len(signal)} sampled ones: sample a reserve")
    # stable, so that every rank keeps the same groups; sorted, so that packing sees them in the sampled order
    return np.sort(np.argsort(~signal, kind="stable")[:count])
