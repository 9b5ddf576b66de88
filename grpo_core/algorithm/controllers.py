"""Control coefficients during a run: β by a schedule or towards a target KL, the entropy bonus towards an entropy.

A controller reads a metric of the whole step (the same on every rank) after the step and sets the next step's
coefficient; its `state_dict` is JSON-serialisable and must be saved in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from grpo_core.config.options import AlgorithmConfig


def beta_schedule(step: int, total_steps: int, start: float, end: float, shape: str = "linear") -> float:
    """Compute β of step 0…total_steps − 1, from `start` on the first to `end` on the last, on a line or half a cosine.

    Raises:
        ValueError: the shape is unknown.
    """
    # clamped: a run may be resumed with fewer total steps than it has made
    progress = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif shape != "linear":
        raise ValueError(f"unknown shape of the beta schedule {shape!r}: choose linear or cosine")
    return start + (end - start) * progress


@dataclass
class AdaptiveKL:
    """Adapt β so that the KL to the reference stays near a target (Ziegler et al., arXiv 1909.08593, section 2.2).

    After n completions at a KL: `β ← β · (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon)`.

    Attributes:
        beta: current coefficient.
        target: KL to keep, in the unit of `update`'s argument (nats per token in a run).
        horizon: completions after which β can have grown or fallen by a fifth.
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
        """Set and return the next step's β; a KL that is not finite leaves it unchanged."""
        if math.isfinite(kl):  # a step in which every completion was masked has no KL
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            # a step larger than the horizon would otherwise change β by more than the fifth that the clip allows
            self.beta *= 1.0 + error * min(completions / self.horizon, 1.0)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return the state that changes from step to step; target and horizon come from the config."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self.beta = float(state["beta"])


@dataclass
class AdaptiveEntropy:
    """Adapt the entropy bonus, paid only while entropy is at or below a target (Skywork-OR1, arXiv 2505.22312).

    After each step the coefficient grows by `delta` if the entropy is at or below the target, and falls by it
    otherwise, within `[minimum, maximum]`.

    Attributes:
        coefficient: current value, also while it is not applied.
        target: nats per token.
        delta: change per step.
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
        """The coefficient of the next step."""
        # 0 before the first step, as no entropy is known yet
        return self.coefficient if self.entropy is not None and self.entropy <= self.target else 0.0

    def update(self, entropy: float) -> float:
        """Adapt to a step's mean entropy and return the next step's coefficient; ignore one that is not finite."""
        if math.isfinite(entropy):
            self.entropy = entropy  # for `applied`: above the target the bonus stops at once, not when it has decayed
            change = self.delta if entropy <= self.target else -self.delta
            self.coefficient = min(max(self.coefficient + change, self.minimum), self.maximum)
        return self.applied

    def state_dict(self) -> dict[str, float | None]:
        """Return the state that changes from step to step."""
        return {"coefficient": self.coefficient, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Continue from `state_dict`."""
        coefficient = state["coefficient"]
        assert coefficient is not None  # only the entropy is None, before the first step
        self.coefficient, self.entropy = float(coefficient), state["entropy"]


class Coefficients:
    """β and the weight of the entropy bonus at each step of a run: constant, scheduled or adaptive.

    Args:
        algorithm: options that choose among these.
        max_steps: steps of the run; a schedule ends there.
    """

    def __init__(self, algorithm: AlgorithmConfig, max_steps: int):
        self.algorithm, self.max_steps = algorithm, max_steps
        self._adaptive_kl: AdaptiveKL | None = None
        self._adaptive_entropy: AdaptiveEntropy | None = None
        if algorithm.kl_target is not None:
            self._adaptive_kl = AdaptiveKL(algorithm.beta, algorithm.kl_target, algorithm.kl_horizon)
        if algorithm.entropy_target is not None:
            self._adaptive_entropy = AdaptiveEntropy(
                algorithm.entropy_coef,
                algorithm.entropy_target,
                algorithm.entropy_coef_delta,
                algorithm.entropy_coef_min,
                algorithm.entropy_coef_max,
            )

    def beta(self, step: int) -> float:
        """Return β of a step, counted from 0."""
        algorithm = self.algorithm
        if self._adaptive_kl is not None:  # AlgorithmConfig refuses a target and a schedule together
            return self._adaptive_kl.beta
        if algorithm.beta_end is None:
            return algorithm.beta
        return beta_schedule(step, self.max_steps, algorithm.beta, algorithm.beta_end, algorithm.beta_schedule)

    @property
    def entropy(self) -> float:
        """Weight of the entropy bonus in the next step."""
        return self.algorithm.entropy_coef if self._adaptive_entropy is None else self._adaptive_entropy.applied

    def update(self, kl: float | None, entropy: float, completions: int) -> None:
        """Adapt to a step's mean KL and entropy over all ranks; with local means the ranks would drift apart."""
        if self._adaptive_kl is not None and kl is not None:
            self._adaptive_kl.update(kl, completions)
        if self._adaptive_entropy is not None:
            self._adaptive_entropy.update(entropy)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that changes from step to step, JSON-serialisable."""
        controllers = {"kl": self._adaptive_kl, "entropy": self._adaptive_entropy}
        return {name: controller.state_dict() for name, controller in controllers.items() if controller is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; a controller that it lacks starts as in a new run."""
        if self._adaptive_kl is not None and "kl" in state:
            self._adaptive_kl.load_state_dict(state["kl"])
        if self._adaptive_entropy is not None and "entropy" in state:
            self._adaptive_entropy.load_state_dict(state["entropy"])
