"""Packing of groups on one token axis: every prompt once, its completions behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_core.types import Group
from grpo_kernels import GroupSpans


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
