"""Softmax rows in plain torch, in blocks that stay in a core's cache: see `softmax_rows` for the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.lm_head._rows import RowGradient, RowStatistics, Transform
from grpo_kernels.lm_head.token_loss import LossInputs

BLOCK_BYTES = 1 << 20
"""Rows that plain torch works on at a time: half a core's second-level cache, the other half for a copy."""


class TorchRows:
    """`TritonRows` in plain torch: the same arguments and methods.

    Without `out` the logits are overwritten by exp(z − m), and that by the gradient; with `out` a copy is. All
    element-wise work goes block by block of rows that stay in a core's cache.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        transform: Transform,
        stats: RowStatistics,
        *,
        saved: bool = False,
        drift: Tensor | None = None,
        out: Tensor | None = None,
    ):
        self.targets = targets.long()[:, None]
        self.transform, self.stats, self.out = transform, stats, out
        self.exp = logits.to(stats.logprob.dtype, copy=out is not None)  # becomes exp(z − m)
        self.drift = drift  # becomes δ
        self.others = self.exp.new_empty(self.exp.shape[0], 1)
        self.saved, self.ready = saved, False

    def statistics_(self) -> None:
        """Fill `stats`."""
        shifted = None
        if self.stats.entropy is not None or self.stats.kl is not None:
            # one buffer for all blocks: fresh memory costs more than what is done in it
            shifted = self.exp.new_empty(self._block_rows(), self.exp.shape[1])
        for rows in self._blocks():
            stats, targets, x = self.stats.rows(rows), self.targets[rows], self.exp[rows]
            if stats.kl is not None:
                delta = self.transform.difference(x, self.drift[rows])
            self.transform(x)
            row_max = x.amax(1, keepdim=True)
            x.sub_(row_max)
            target_z = x.gather(1, targets)
            # a logit of −∞ has p = 0, and 0·z must be 0
            z = None if shifted is None else torch.clamp(x, min=-1e30, out=shifted[: x.shape[0]])
            x.exp_()
            target_exp = x.gather(1, targets)
            others = torch.sum(x.scatter_(1, targets, 0.0), 1, keepdim=True, out=self.others[rows])
            x.scatter_(1, targets, target_exp)
            total = others + target_exp
            log_sum = total.log()
            gap = others.log() - target_z
            stats.row_max.copy_(row_max[:, 0])
            stats.log_sum.copy_(log_sum[:, 0])
            stats.logprob.copy_((-(gap.clamp(min=0.0) + torch.log1p(torch.exp(-gap.abs()))))[:, 0])
            if stats.kl is not None:
                peak_drift = delta.gather(1, z.argmax(1, keepdim=True))
                stats.peak_drift.copy_(peak_drift[:, 0])
                delta.sub_(peak_drift)
                mean = (x * delta).sum(1, keepdim=True) / total
                stats.mean_drift.copy_(mean[:, 0])
                stats.kl.copy_(torch_kl(x / total, z - log_sum, delta, mean)[:, 0])
            if stats.entropy is not None:
                stats.entropy.copy_(stats.log_sum - z.mul_(x).sum(1) / total[:, 0])
        self.ready = True

    def gradient_(
        self, grad_logprob: Tensor | None, grad_entropy: Tensor | None = None, grad_kl: Tensor | None = None
    ) -> RowGradient:
        """The gradient. Fills `stats` if they are not known.

        Over the logits it has a factor a row: the GEMMs that follow take it for the price of `[r, H]`.
        """
        if self.saved:
            self._restore(grad_kl is not None)
        elif not self.ready:
            self.statistics_()
        inverse_sum = torch.exp(-self.stats.log_sum)[:, None] / self.transform.temperature
        upstream = torch.ones_like(inverse_sum) if grad_logprob is None else grad_logprob[:, None]
        plain = grad_entropy is None and grad_kl is None
        if plain and self.transform.softcap is None:
            self.exp.scatter_(1, self.targets, -self.others)
            factor = -upstream * inverse_sum
        else:
            for rows in self._blocks():
                self._gradient_block(rows, upstream[rows], grad_entropy, grad_kl)
            factor = inverse_sum
        if self.out is None:
            return RowGradient(self.exp, factor[:, 0])
        return RowGradient(self.out.copy_(self.exp.mul_(factor)))

    def loss_gradient_(self, inputs: LossInputs) -> RowGradient:
        """Statistics and the gradient of `Σ weight · token_loss`."""
        self.statistics_()
        return self.gradient_(*inputs.slopes(self.stats.logprob, self.stats.entropy))

    def _gradient_block(
        self, rows: slice, grad_logprob: Tensor, grad_entropy: Tensor | None, grad_kl: Tensor | None
    ) -> None:
        """Turn exp(z − m) into s times the gradient in z (in the raw logits, softcap included, but for temperature)."""
        stats, targets, x = self.stats.rows(rows), self.targets[rows], self.exp[rows]
        z = x.log().clamp_(min=-1e30)  # where exp(z − m) has underflowed, p is 0 and z does not matter
        bend = None
        if self.transform.softcap is not None:
            tanh = (z + stats.row_max[:, None]).mul_(self.transform.temperature / self.transform.softcap)
            bend = tanh.square_().neg_().add_(1.0)
        if grad_entropy is None:
            bracket = z.zero_()
        else:
            slope = -grad_entropy[rows, None]
            bracket = z.add_((stats.entropy - stats.log_sum)[:, None]).mul_(slope)
        if grad_kl is not None:
            bracket.addcmul_(self.drift[rows] - stats.mean_drift[:, None], grad_kl[rows, None])
        # at the target, −g p and +g join to g (1 − p), which is not formed by subtraction
        at_target = bracket.gather(1, targets)
        bracket.sub_(grad_logprob).scatter_(1, targets, at_target)
        x.mul_(bracket).scatter_add_(1, targets, grad_logprob * self.others[rows])
        if bend is not None:
            x.mul_(bend)

    def _restore(self, kl: bool) -> None:
        """exp(z − m), and δ, from saved statistics."""
        for rows in self._blocks():
            if kl:
                delta = self.transform.difference(self.exp[rows], self.drift[rows])
                delta.sub_(self.stats.peak_drift[rows, None])
            self.transform(self.exp[rows]).sub_(self.stats.row_max[rows, None]).exp_()
        torch.mul(torch.expm1(self.stats.logprob).neg_(), self.stats.log_sum.exp(), out=self.others[:, 0])

    def _block_rows(self) -> int:
        count, vocabulary = self.exp.shape
        size = max(1, BLOCK_BYTES // max(1, vocabulary * self.exp.element_size()))
        return count if self.exp.is_cuda else min(size, count)

    def _blocks(self) -> Iterator[slice]:
        count, size = self.exp.shape[0], self._block_rows()
        return (slice(start, min(start + size, count)) for start in range(0, count, max(1, size)))


def torch_kl(p: Tensor, logp: Tensor, delta: Tensor, mean: Tensor) -> Tensor:
    """KL `[r, 1]` of rows, as `_kl` has it; delta and its mean under p are of log-probs up to a constant."""
    rough = mean + (logp - delta).logsumexp(1, keepdim=True)
    d = delta - mean
    terms = torch.where(d.abs() < 1.0, p * (torch.expm1(-d) + d), torch.exp(logp - d) - p + p * d)
    return torch.where(rough < 1.0, torch.log1p(terms.sum(1, keepdim=True)), rough)
