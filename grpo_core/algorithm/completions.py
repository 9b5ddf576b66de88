"""Sum and average values over the tokens of each completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # not at run time: options import this module, and --help must not wait for torch


def completion_sum(values: Tensor, completion_index: Tensor, num_completions: int) -> Tensor:
    """Sum each completion's tokens, float64 `[M]`, differentiable; 0 for a completion without tokens.

    Args:
        values: `[R]`.
        completion_index: int64 `[R]`, in `[0, num_completions)`.
    """
    # in float64, so that the order in which a GPU adds does not show in a float32 result
    values = values.double()
    return values.new_zeros(num_completions).index_add(0, completion_index, values)


def completion_mean(values: Tensor, completion_index: Tensor, num_completions: int) -> Tensor:
    """Average each completion's tokens, float64 `[M]`, differentiable; arguments as in `completion_sum`."""
    count = completion_sum(values.new_ones(values.shape), completion_index, num_completions)
    return completion_sum(values, completion_index, num_completions) / count.clamp(min=1.0)  # 0 / 1 without tokens
