"""Softmax of rows of logits: log-prob of a target, entropy, KL, and their gradient written over the logits.

With raw logits x, z = softcap·tanh(x / softcap) / temperature (softcap optional), m = max z, s = Σ exp(z − m) and
p = exp(z − m) / s:

    log p_y = −log(1 + exp(log s_o + m − z_y))      s_o = Σ_{v≠y} exp(z_v − m)
    H       = log s + Σ p (m − z)
    KL      = Σ p (log p − log q)                    q: the same softmax of reference logits, a constant
    ∂/∂z_v  = g_logp ([v = y] − p_v) − g_H p_v (log p_v + H) + g_KL p_v (log p_v − log q_v − KL)

Summing the other tokens apart keeps log p_y and 1 − p_y = s_o / s exact for confident tokens, where `z_y − lse` is 0
from a margin of some 15 nats in float32. Both terms of H are ≥ 0 and free of the logits' offset, so nothing cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """What turns raw logits into those of the softmax."""

    temperature: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply in place."""
        if self.softcap is not None:
            return logits.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of rows, each `[T]` in accumulator precision; `row_max` and `log_sum` are what a gradient needs."""

    logprob: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    kl: Tensor | None

    @classmethod
    def empty(cls, rows: int, device: torch.device, dtype: torch.dtype, *, entropy: bool, kl: bool) -> RowStatistics:
        """Room for the statistics of `rows` rows."""
        wanted = (True, True, True, entropy, kl)
        return cls(*(torch.empty(rows, device=device, dtype=dtype) if want else None for want in wanted))

    def rows(self, rows: slice) -> RowStatistics:
        """A view of some rows."""
        fields = (self.logprob, self.row_max, self.log_sum, self.entropy, self.kl)
        return RowStatistics(*(None if field is None else field[rows] for field in fields))


class TorchRows:
    """A chunk of logits, worked on in place by plain torch operations: statistics first, then the gradient.

    Between the two, `logits` holds exp(z − m); z − m itself is kept beside it only where something needs it (entropy,
    KL, the softcap's derivative).
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        transform: Transform,
        *,
        entropy: bool = False,
        reference_logits: Tensor | None = None,
    ):
        self.transform = transform
        self.targets = targets.long()[:, None]
        z = transform(logits)
        row_max = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        z.sub_(row_max)
        target_z = z.gather(1, self.targets)
        self.z = None
        if entropy or reference_logits is not None or transform.softcap is not None:
            self.z = z.clone().clamp_(min=torch.finfo(z.dtype).min / 4)  # a logit of −inf has p = 0, and 0·z must be 0
        self.exp = z.exp_()
        target_exp = self.exp.gather(1, self.targets)
        self.exp.scatter_(1, self.targets, 0.0)
        self.others = self.exp.sum(1, keepdim=True)
        self.exp.scatter_(1, self.targets, target_exp)
        self.sum = self.others + target_exp
        log_sum = self.sum.log()
        gap = self.others.log() - target_z
        self.log_sum = log_sum
        self.entropy = self.kl = self.log_ratio = None
        if entropy:
            self.entropy = log_sum - _row_dot(self.exp, self.z) / self.sum
        if reference_logits is not None:
            log_q = transform(reference_logits)
            log_q.sub_(log_q.logsumexp(1, keepdim=True))
            self.log_ratio = torch.sub(self.z, log_q, out=log_q).sub_(log_sum).clamp_(min=torch.finfo(z.dtype).min / 4)
            self.kl = _row_dot(self.exp, self.log_ratio) / self.sum
        # −softplus(gap), exact on both sides
        self.logprob = -(gap.clamp(min=0.0) + torch.log1p(torch.exp(-gap.abs())))
        self.row_max = row_max

    def statistics(self, out: RowStatistics) -> None:
        """Write this chunk's statistics."""
        for name in ("logprob", "row_max", "log_sum", "entropy", "kl"):
            field = getattr(out, name)
            if field is not None:
                field.copy_(getattr(self, name)[:, 0])

    def gradient_(
        self, grad_logprob: Tensor, grad_entropy: Tensor | None = None, grad_kl: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(g, c)` with `c[:, None] * g` the gradient in the raw logits; g lies where the logits lay.

        The row factor c is left out of g because the GEMMs that follow take it for the price of `[r, H]`.
        """
        grad_logprob = grad_logprob[:, None]
        at_target = self.others / self.sum * grad_logprob
        if grad_entropy is None and grad_kl is None:
            self.exp.scatter_(1, self.targets, -self.others)
            factor = -grad_logprob / self.sum
        else:
            slope = torch.zeros_like(grad_logprob)
            base = torch.zeros_like(grad_logprob)
            if grad_entropy is not None:
                slope = -grad_entropy[:, None]
                base = slope * (self.entropy - self.log_sum)
            z = self.z.clone() if self.transform.softcap is not None else self.z
            bracket = z.mul_(slope).add_(base)
            if grad_kl is not None:
                bracket.addcmul_(self.log_ratio.sub_(self.kl), grad_kl[:, None])
            bracket.scatter_add_(1, self.targets, grad_logprob)  # the target's −g p is part of `at_target`
            self.exp.mul_(bracket.sub_(grad_logprob))
            self.exp.scatter_add_(1, self.targets, at_target * self.sum)
            factor = 1.0 / self.sum
        if self.transform.softcap is not None:
            scale = self.transform.temperature / self.transform.softcap
            tanh = self.z.add_(self.row_max).mul_(scale)
            self.exp.mul_(tanh.square_().neg_().add_(1.0))
        return self.exp, (factor / self.transform.temperature)[:, 0]


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]
