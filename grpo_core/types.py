"""The data that travels through a training step: prompts, completions and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from grpo_core.errors import InputError

if TYPE_CHECKING:
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
        opened: the end of the prompt's text, where a chat template has begun the answer itself (`<think>\\n`); it is
            put in front of a completion's text.

    Raises:
        InputError: no tokens.
    """

    id: str
    token_ids: tuple[int, ...]
    features: dict[str, Tensor] = field(default_factory=dict)
    sample: Any = None
    opened: str = ""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InputError(f"prompt {self.id!r} has no tokens")


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: `[L]`, the stop token(s) included: they were sampled, so they are trained on.
        logprobs: float32 `[L]`, the sampler's log-probability of each token at the rollout's temperature, over the
            full vocabulary (before top-k / top-p / min-p).
        finish_reason: `stop` (an end token or a stop string came) or `length`.
        text: decoded, without special tokens but for tags such as `<think>`, cut before the stop string, and behind
            what the prompt has opened (`Prompt.opened`).
    """

    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True)
class Group:
    """A prompt and its G completions."""

    prompt: Prompt
    completions: Sequence[Completion]

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.prompt.id
