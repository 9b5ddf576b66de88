"""Use entropy in the loss: as a bonus, and to train on the most uncertain tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

# non-negative float32 numbers by their upper 16 bits, of which the sign bit is always 0: 2^15 bins
ENTROPY_BINS = 1 << 15


def entropy_bonus(entropy: Tensor, total_tokens: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum this micro-batch's share of the step's mean token entropy, in nats; the loss subtracts a multiple of it.

    As in TRL, it is a mean over tokens whatever average the loss type takes.

    Args:
        entropy: `[R]`, nats, differentiable.
        total_tokens: tokens that count, in the whole step: shares of micro-batches and ranks add up to the mean.
        mask: `[R]`, 1 for tokens that count.

    Returns:
        A scalar, differentiable.
    """
    return (entropy if mask is None else entropy * mask).sum() / total_tokens


@torch.no_grad()
def entropy_histogram(entropy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count tokens by entropy, int64 `[32768]`; histograms of micro-batches and ranks add up to the step's.

    A bin holds the float32 numbers with the same upper 16 bits (sign, exponent, 7 bits of fraction). Bit patterns of
    non-negative floats are ordered as their values are, and a bin is at most 0.8 % wide, so no range has to be known.

    Args:
        entropy: `[R]`, nats.
        mask: bool `[R]`, true for tokens that count.
    """
    entropy = entropy.float().clamp(min=0.0).abs()  # rounding gives −1e-9 and −0, whose bit patterns sort last
    bins = entropy.view(torch.int32).bitwise_right_shift(16).long()
    # integers: the sum over micro-batches and ranks is exact, in whatever order a GPU adds
    count = torch.ones_like(bins) if mask is None else mask.long()
    return torch.zeros(ENTROPY_BINS, dtype=torch.int64, device=entropy.device).index_add(0, bins, count)


@torch.no_grad()
def entropy_threshold(histogram: Tensor, fraction: float) -> Tensor:
    """Find the lowest entropy among the `fraction` of tokens with the highest entropy, a float32 scalar.

    Train where `entropy >= threshold` (arXiv 2506.01939). Bins are kept whole, so a few more tokens than the fraction
    may be kept. The threshold stays on the histogram's device.

    Args:
        histogram: int64 `[32768]`, of the whole step.
        fraction: in 0…1.

    Raises:
        ValueError: fraction is outside 0…1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of high-entropy tokens is {fraction}: set it above 0 and at most 1 (1 is off)")
    # on the device throughout: reading the threshold back would make the host wait for the old pass
    at_least = histogram.flip(0).cumsum(0).flip(0)  # number of tokens in this bin or a higher one
    # the highest bin that still has the fraction at or above it
    enough = at_least.double() >= fraction * histogram.sum().double()
    lowest = enough.sum() - 1  # `enough` is true up to that bin, and false above it
    # back from the bin's number to the smallest float32 in it
    return lowest.to(torch.int32).bitwise_left_shift(16).view(torch.float32)
