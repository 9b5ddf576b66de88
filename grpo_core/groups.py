"""The shapes that travel through a training step: prompts, completions, groups, and their packing on one token axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grpo_kernels.spans import GroupSpans

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


@dataclass(frozen=True)
class GroupLayout:
    """Several groups packed on one token axis, `[prompt₀ | c₀₀ | c₀₁ | … | prompt₁ | c₁₀ | …]`.

    A completion token sees its own prompt and its own earlier tokens, nothing else. T tokens are packed, R of them
    (all completion tokens, in packed order) are predicted, by *predictor rows*: a completion's first token by its
    prompt's last row, every later one by the row before it. M completions are numbered through in packed order.

    Attributes:
        spans: prompt and completion lengths and starts, as Python integers.
        token_ids: int64 `[T]`.
        position_ids: int64 `[T]`; a completion's positions continue from its prompt's.
        predictor_rows: int64 `[R]`, into T.
        target_ids: int64 `[R]`.
        completion_index: int64 `[R]`, which of the M completions a predicted token belongs to.
    """

    spans: GroupSpans
    token_ids: Tensor
    position_ids: Tensor
    predictor_rows: Tensor
    target_ids: Tensor
    completion_index: Tensor

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        device: torch.device | str = "cpu",
    ) -> GroupLayout:
        """Pack prompts `[N][P_n]` and completions `[N][G_n][L]`, given as token ids."""
        spans = GroupSpans([len(prompt) for prompt in prompts], [[len(c) for c in group] for group in completions])
        token_ids: list[int] = []
        positions: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        targets: list[int] = []
        owners: list[np.ndarray] = []
        member = 0
        for prompt, group, start in zip(prompts, completions, spans.prompt_starts, strict=True):
            token_ids.extend(prompt)
            positions.append(np.arange(len(prompt)))
            last_prompt_row = start + len(prompt) - 1
            for completion in group:
                length = len(completion)
                if length:
                    first_row = len(token_ids)
                    rows.append(np.r_[last_prompt_row, first_row : first_row + length - 1])
                    positions.append(len(prompt) + np.arange(length))
                    owners.append(np.full(length, member))
                    targets.extend(completion)
                    token_ids.extend(completion)
                member += 1

        def tensor(values: list[int] | list[np.ndarray]) -> Tensor:
            flat = np.concatenate(values) if values and isinstance(values[0], np.ndarray) else np.array(values)
            return torch.from_numpy(flat.astype(np.int64)).to(device)

        return cls(spans, tensor(token_ids), tensor(positions), tensor(rows), tensor(targets), tensor(owners))

    @classmethod
    def from_groups(cls, groups: Sequence[Group], device: torch.device | str = "cpu") -> GroupLayout:
        """Pack groups as sampled."""
        return cls.pack(
            [group.prompt.token_ids for group in groups],
            [[completion.token_ids for completion in group.completions] for group in groups],
            device,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.spans.total

    @property
    def num_predicted(self) -> int:
        """R."""
        return self.target_ids.shape[0]

    @property
    def num_completions(self) -> int:
        """M."""
        return sum(len(group) for group in self.spans.completion_lengths)

    def per_token(self, per_completion: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """Spread one value per completion `[M]` over its tokens: `[R]` on the layout's device."""
        values = torch.as_tensor(np.asarray(per_completion, dtype=np.float64), dtype=dtype)
        return values.to(self.completion_index.device)[self.completion_index]
