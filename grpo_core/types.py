"""The data that travels through a training step: prompts, completions and groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked: token ids, and features that stand where the ids hold placeholders.

    Attributes:
        id: stable and unique in a dataset. It names the group, keys the random numbers, and is written to logs.
        token_ids: `[P]`, P ≥ 1. Rows of placeholder tokens are overwritten by the policy's `embed`.
        features: named tensors, e.g. `{"audio": [8, 1024], "frame": [8, 768]}`; empty for text-only prompts.
        sample: what the prompt was made from; rewards read their ground truth here.
    """

    id: str
    token_ids: tuple[int, ...]
    features: dict[str, Tensor] = field(default_factory=dict)
    sample: Any = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no tokens")


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: `[L]`, the stop token(s) included: they were sampled, so they are trained on.
        logprobs: float32 `[L]`, the sampler's log-probability of each token at the rollout's temperature, over the
            full vocabulary (before top-k / top-p / min-p).
        finish_reason: `stop` (an end token or a stop string came) or `length`.
        text: decoded, without special tokens, cut before the stop string.
    """

    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    finish_reason: FinishReason
    text: str


@dataclass
class Group:
    """A prompt and its G completions, and what the step learns about them.

    Attributes:
        rewards: float64 `[G]`, the weighted sum that advantages are made of; NaN where no reward could judge.
        rewards_by_name: each reward's own float64 `[G]`.
        advantages: float64 `[G]`.
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: np.ndarray | None = None
    rewards_by_name: dict[str, np.ndarray] = field(default_factory=dict)
    advantages: np.ndarray | None = None

    @property
    def id(self) -> str:
        return self.prompt.id
