"""Use of entropy in the loss: a bonus for it, and training on the most uncertain tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

ENTROPY_BINS = 1 << 15  # non-negative float32 numbers by their upper 16 bits, of which the sign's is always 0


def entropy_bonus(entropy: Tensor, total_tokens: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum this micro-batch's share of the step's mean token entropy, in nats; the loss subtracts a multiple of it.

    It is a mean over tokens whatever the loss type's average is (as TRL's).

    Args:
        entropy: `[R]`, nats, differentiable.
        total_tokens: tokens that count, in the whole step: shares of micro-batches and ranks add up to the mean.
        mask: `[R]`, which of these tokens count.

    Returns:
        A scalar, differentiable.
    """
    return (entropy if mask is None else entropy * mask).sum() / total_tokens


@torch.no_grad()
def entropy_histogram(entropy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count tokens by entropy, int64 `[32768]`; histograms of micro-batches and ranks add up to the step's.

    A bin holds the float32 numbers that agree in their upper 16 bits (sign, exponent, 7 bits of fraction), which are in
    order as numbers are; a bin is at most 0.8 % wide, so no range has to be known.

    Args:
        entropy: `[R]`, nats.
        mask: bool `[R]`, which tokens count.
    """
    entropy = entropy.float().clamp(min=0.0).abs()  # rounding gives −1e-9 and −0, whose bit patterns sort last
    bins = entropy.view(torch.int32).bitwise_right_shift(16).long()
    count = torch.ones_like(bins) if mask is None else mask.long()
    return torch.zeros(ENTROPY_BINS, dtype=torch.int64, device=entropy.device).index_add(0, bins, count)


@torch.no_grad()
def entropy_threshold(histogram: Tensor, fraction: float) -> Tensor:
    """Find the entropy that the `fraction` of tokens with the highest entropy reach, a float32 scalar.

    Train where `entropy >= threshold` (arXiv 2506.01939). Bins are kept whole: as many of the highest as hold the
    fraction, so a few more tokens may be kept. A scalar on the histogram's device, never read back.

    Args:
        histogram: int64 `[32768]`, of the whole step.
        fraction: in 0…1.

    Raises:
        ValueError: fraction is outside 0…1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of high-entropy tokens is {fraction}: set it above 0 and at most 1 (1 is off)")
    # on the device throughout: reading the threshold back would make the host wait for the old pass
    at_least = histogram.flip(0).cumsum(0).flip(0)  # tokens in this bin or a higher one
    # the highest bin that still has the fraction at or above it
    enough = at_least.double() >= fraction * histogram.sum().double()
    lowest = enough.sum() - 1  # `enough` is true up to that bin, and false above it
    return lowest.to(torch.int32).bitwise_left_shift(16).view(torch.float32)
