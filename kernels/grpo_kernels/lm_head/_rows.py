"""What is computed of rows of logits: the softmax they stand for, its statistics, and their gradient's form."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.lm_head._large_entries import LargeEntries


class Transform(NamedTuple):
    """What turns raw logits into those of the softmax."""

    temperature: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply in place."""
        if self.softcap is not None:
            return logits.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def difference(self, logits: Tensor, drift: Tensor) -> Tensor:
        """`self(logits) − self(logits − drift)` over `drift`, without forming it by subtraction."""
        if self.softcap is None:
            return drift if self.temperature == 1.0 else drift.div_(self.temperature)
        # tanh a − tanh b = tanh(a − b) (1 − tanh a · tanh b)
        product = torch.sub(logits, drift).div_(self.softcap).tanh_().mul_(torch.tanh(logits / self.softcap))
        return drift.div_(self.softcap).tanh_().mul_(product.neg_().add_(1.0)).mul_(self.softcap / self.temperature)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of rows, each `[T]` in accumulator precision; `row_max` and `log_sum` are what a gradient needs."""

    logprob: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    peak_drift: Tensor | None
    """z − z_ref of a most probable token."""
    mean_drift: Tensor | None
    """Σ p δ."""

    @classmethod
    def empty(cls, rows: int, device: torch.device, dtype: torch.dtype, *, entropy: bool, kl: bool) -> RowStatistics:
        """Room for the statistics of `rows` rows."""
        wanted = (True, True, True, entropy, kl, kl, kl)
        return cls(*(torch.empty(rows, device=device, dtype=dtype) if want else None for want in wanted))

    def rows(self, rows: slice) -> RowStatistics:
        """A view of some rows."""
        return RowStatistics(*(None if tensor is None else tensor[rows] for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields, in order."""
        return tuple(getattr(self, field.name) for field in fields(self))


class RowGradient(NamedTuple):
    """A gradient in raw logits, `factor[:, None] · dense + large`."""

    dense: Tensor
    """`[r, V]`."""
    factor: Tensor | None = None
    """float32 `[r]`; None: 1."""
    large: LargeEntries | None = None
    """None: 0."""
