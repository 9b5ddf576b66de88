"""Coefficients that change in the course of a run: β by a schedule or towards a KL, a bonus towards an entropy.

A controller reads a metric of the whole step (the same on every rank) after the step and sets the coefficient of the
next; its `state_dict` is JSON-able and belongs into the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grpo_core.config.options import AlgorithmConfig


def beta_schedule(
    step: int, total_steps: int, start: float, end: float, shape: Literal["constant", "linear", "cosine"] = "linear"
) -> float:
    """β of step 0…total_steps − 1: `start` on the first, `end` on the last; constant keeps `start`.

    Raises:
        ValueError: an unknown shape.
    """
    progress = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif shape != "linear":
        raise ValueError(f"unknown shape of the beta schedule {shape!r}: choose constant, linear or cosine")
    return start + (end - start) * progress


@dataclass
class AdaptiveKL:
    """β that holds the KL to the reference near a target (Ziegler et al., arXiv 1909.08593, section 2.2).

    After n completions at a KL: `β ← β · (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon)`.

    Attributes:
        beta: the coefficient now.
        target: KL to hold, in the unit of the `kl` that `update` is given.
        horizon: completions in which β can grow or fall by a fifth.
    """

    beta: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        if min(self.beta, self.target, self.horizon) <= 0:
            raise ValueError(
                f"adaptive KL: beta {self.beta}, target {self.target} and horizon {self.horizon} must be above 0"
            )

    def update(self, kl: float, completions: int) -> float:
        """The next step's β; a KL that is not finite leaves it."""
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.beta *= 1.0 + error * min(completions / self.horizon, 1.0)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """What changes."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self.beta = float(state["beta"])


@dataclass
class AdaptiveEntropy:
    """A bonus that is paid only while entropy is at or below a target (Skywork-OR1, arXiv 2505.22312).

    After each step the coefficient grows by `delta` where the entropy is at or below the target, and falls by it
    elsewhere, within `[minimum, maximum]`.

    Attributes:
        coefficient: now.
        target: nats per token.
        entropy: of the last step; None before the first, in which no bonus is paid.
    """

    coefficient: float
    target: float
    delta: float = 0.005
    minimum: float = 0.0
    maximum: float = 1.0
    entropy: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.coefficient <= self.maximum or self.delta <= 0:
            raise ValueError(
                f"adaptive entropy: need 0 ≤ minimum ≤ coefficient ≤ maximum and delta above 0, got {asdict(self)}"
            )

    @property
    def applied(self) -> float:
        """The coefficient of the step to come."""
        return self.coefficient if self.entropy is not None and self.entropy <= self.target else 0.0

    def update(self, entropy: float) -> float:
        """Take in a step's mean entropy; gives the coefficient of the next. One that is not finite changes nothing."""
        if math.isfinite(entropy):
            self.entropy = entropy
            change = self.delta if entropy <= self.target else -self.delta
            self.coefficient = min(max(self.coefficient + change, self.minimum), self.maximum)
        return self.applied

    def state_dict(self) -> dict[str, float | None]:
        """What changes."""
        return {"coefficient": self.coefficient, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Continue from `state_dict`."""
        self.coefficient, self.entropy = float(state["coefficient"]), state["entropy"]


class Coefficients:
    """β and the weight of the entropy bonus, as they stand at each step of a run.

    Args:
        algorithm: constants, a schedule, or targets.
        max_steps: of the run.
    """

    def __init__(self, algorithm: AlgorithmConfig, max_steps: int):
        self.algorithm, self.max_steps = algorithm, max_steps
        self._kl = self._entropy = None
        if algorithm.kl_target is not None:
            self._kl = AdaptiveKL(algorithm.beta, algorithm.kl_target, algorithm.kl_horizon)
        if algorithm.entropy_target is not None:
            self._entropy = AdaptiveEntropy(
                algorithm.entropy_coef,
                algorithm.entropy_target,
                algorithm.entropy_coef_delta,
                algorithm.entropy_coef_min,
                algorithm.entropy_coef_max,
            )

    def beta(self, step: int) -> float:
        """β of a step, counted from 0."""
        a = self.algorithm
        if self._kl is not None:
            return self._kl.beta
        return (
            a.beta if a.beta_end is None else beta_schedule(step, self.max_steps, a.beta, a.beta_end, a.beta_schedule)
        )

    @property
    def entropy(self) -> float:
        """Weight of the entropy bonus in the step to come."""
        return self.algorithm.entropy_coef if self._entropy is None else self._entropy.applied

    def update(self, kl: float | None, entropy: float, completions: int) -> None:
        """Take in a step's mean KL and entropy, over all ranks."""
        if self._kl is not None and kl is not None:
            self._kl.update(kl, completions)
        if self._entropy is not None:
            self._entropy.update(entropy)

    def state_dict(self) -> dict[str, Any]:
        """What changes, in JSON's types."""
        parts = {"kl": self._kl, "entropy": self._entropy}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, part in (("kl", self._kl), ("entropy", self._entropy)):
            if part is not None:
                part.load_state_dict(state[name])
