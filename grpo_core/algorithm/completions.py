"""Sums and means of a completion's tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def completion_sum(values: Tensor, completion_index: Tensor, num_completions: int) -> Tensor:
    """float64 `[M]`, differentiable; 0 for a completion without tokens.

    Args:
        values: `[R]`.
        completion_index: int64 `[R]`, in `[0, num_completions)`.
    """
    # in float64, so that the order in which a GPU adds does not show in a float32 result
    total = torch.zeros(num_completions, dtype=torch.float64, device=values.device)
    return total.index_add(0, completion_index, values.double())


def completion_mean(values: Tensor, completion_index: Tensor, num_completions: int) -> Tensor:
    """float64 `[M]`, differentiable; 0 for a completion without tokens. Arguments as `completion_sum`."""
    count = completion_sum(torch.ones_like(values), completion_index, num_completions)
    return completion_sum(values, completion_index, num_completions) / count.clamp(min=1.0)
