"""Definitions in float64, written so that they stay exact where one token has nearly all of the probability."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_softmax(z: Tensor) -> Tensor:
    """Of rows `[T, V]`. `torch.log_softmax` gives such a token log-prob 0: here it and the others are apart."""
    highest, peak = z.max(1, keepdim=True)
    is_peak = torch.arange(z.shape[1]) == peak
    others = torch.where(is_peak, -torch.inf, z).logsumexp(1, keepdim=True)
    gap = others - highest
    share = -F.softplus(torch.cat((gap, -gap), 1), threshold=1000)
    return torch.where(is_peak, share[:, :1], z - others + share[:, 1:])


def entropy(logp: Tensor) -> Tensor:
    """Of rows `[T, V]`, nats."""
    return -(logp.exp() * logp).sum(1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p ‖ q) of rows `[T, V]`, nats."""
    return (logp.exp() * (logp - logq)).sum(1)
