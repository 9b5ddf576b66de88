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
        num_tokens, num_predicted, num_completions: T, R and M.
    """

    spans: GroupSpans
    token_ids: Tensor
    position_ids: Tensor
    predictor_rows: Tensor
    target_ids: Tensor
    completion_index: Tensor
    num_tokens: int
    num_predicted: int
    num_completions: int

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
        positions: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        member = 0
        for prompt, group in zip(prompts, completions, strict=True):
            token_ids.extend(prompt)
            positions.extend(range(len(prompt)))
            last_prompt_row = len(token_ids) - 1
            for completion in group:
                length, first_row = len(completion), len(token_ids)
                # all completions continue from the same row: the prompt's last one predicts each one's first token
                if length:  # an empty one has no token to predict, but is numbered all the same
                    rows += [last_prompt_row, *range(first_row, first_row + length - 1)]
                    positions.extend(range(len(prompt), len(prompt) + length))
                    owners += [member] * length
                    targets.extend(completion)
                    token_ids.extend(completion)
                member += 1
        # lists on the host, then one copy each to the device
        packed_ids, position_ids, predictor_rows, target_ids, completion_index = (
            torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
            for values in (token_ids, positions, rows, targets, owners)
        )
        return cls(
            spans=spans,
            token_ids=packed_ids,
            position_ids=position_ids,
            predictor_rows=predictor_rows,
            target_ids=target_ids,
            completion_index=completion_index,
            num_tokens=len(token_ids),
            num_predicted=len(targets),
            num_completions=member,
        )

    @classmethod
    def from_groups(cls, groups: Sequence[Group], device: torch.device | str = "cpu") -> GroupLayout:
        """Pack groups as sampled."""
        return cls.pack(
            [group.prompt.token_ids for group in groups],
            [[completion.token_ids for completion in group.completions] for group in groups],
            device,
        )

    def per_token(self, per_completion: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """Spread one value per completion `[M]` over its tokens: `[R]` on the layout's device."""
        # advantages are computed in float64 and rounded once, here
        values = torch.as_tensor(np.asarray(per_completion, dtype=np.float64), dtype=dtype)
        return values.to(self.completion_index.device)[self.completion_index]
