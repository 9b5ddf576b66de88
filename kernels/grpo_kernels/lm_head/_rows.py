"""Softmax of rows of logits on either backend: log-prob of a target, entropy, KL, and their gradient over the logits.

With raw logits x, z = softcap·tanh(x / softcap) / temperature (softcap optional), m = max z, s = Σ exp(z − m) and
p = exp(z − m) / s:

    log p_y = −log(1 + exp(log s_o + m − z_y))      s_o = Σ_{v≠y} exp(z_v − m)
    H       = log s + Σ p (m − z)
    KL      = Σ p (log p − log q)                    q: the same softmax of reference logits, a constant
            = log(1 + Σ p (exp(−d) − 1 + d))         δ = (z − z_ref) less that of a v with z_v = m,  d = δ − Σ p δ
    ∂/∂z_v  = g_logp ([v = y] − p_v) − g_H p_v (log p_v + H) + g_KL p_v d_v

Summing the other tokens apart keeps log p_y and 1 − p_y = s_o / s exact for confident tokens, where `z_y − lse` is 0
from a margin of some 15 nats in float32. Both terms of H are ≥ 0 and free of the logits' offset, so nothing cancels.
KL and its gradient know the reference by δ alone, which is given as a difference of raw logits: two models that are
close to each other would lose it between the roundings of two logits, and KL between two normalisers. Where one token
has nearly all of p, d there is a sum of what little the others have, and not the difference of two equal numbers.

A z of −1e30 or less counts as −∞ (masks are written with float32's lowest number too): p = 0, and a target there has
the log-prob −∞. A row of nothing else has no distribution, and all that is asked of it is NaN.

A gradient narrower than its logits is a GEMM's operand, and takes one of two forms, so that its product is as good as
its own rounding. A log-prob's has one or two entries that outweigh the rest of a row: `LargeEntries` stay in float32,
and are 0 in the matrix. Entropy's and KL's have none: they are float16, whose eleven bits suffice, with a power of two
a row, found from a bound on the row's entries: |g_logp| (1 − p_y) + |g_H| H + |g_KL| times a function of KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import FLOAT_DTYPES, Backend
from grpo_kernels.lm_head._rows_triton import LargeEntries, launch_rows, softmax_rows_kernel

if TYPE_CHECKING:  # for names of types alone: rows of given logits need neither the GEMM nor the loss
    from grpo_kernels.lm_head._gemm import Head
    from grpo_kernels.lm_head.token_loss import LossInputs

CPU_CHUNK_BYTES = 32 << 20
"""Logits that exist at a time on a CPU, by default: about a last-level cache, and still a good GEMM."""
CUDA_CHUNK_SHARE = 16
"""By default logits take at most 1/16 of a GPU's memory: one chunk up to T = 14,000 at V = 152,064 on an H200."""
BLOCK_BYTES = 1 << 20
"""Rows that plain torch works on at a time: half a core's second-level cache, the other half for a copy."""


NO_LOGIT = -1e30
"""Logits of the softmax that count as −∞: kernels compute with this finite number, whose exponential is 0."""


class Transform(NamedTuple):
    """Turns raw logits into those of the softmax: softcap (optional), then temperature."""

    temperature: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply in place."""
        if self.softcap is not None:
            return logits.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def softcap_slope(self, logits: Tensor) -> Tensor:
        """∂ softcap·tanh(x / softcap) / ∂x = 1 − tanh² of raw logits.

        As 4 e / (1 + e)² with e = exp(−2 |x| / softcap): next to the cap 1 − tanh² would cancel.
        """
        assert self.softcap is not None
        decay = torch.exp(logits.abs().mul_(-2.0 / self.softcap))
        return decay.mul(4.0).div_(decay.add_(1.0).square_())

    def difference(self, logits: Tensor, drift: Tensor) -> Tensor:
        """Overwrite `drift` with `self(logits) − self(logits − drift)`, without forming it by subtraction."""
        if self.softcap is None:
            return drift if self.temperature == 1.0 else drift.div_(self.temperature)
        # tanh a − tanh b = tanh(a − b) (1 − tanh a · tanh b)
        product = torch.sub(logits, drift).div_(self.softcap).tanh_().mul_(torch.tanh(logits / self.softcap))
        return drift.div_(self.softcap).tanh_().mul_(product.neg_().add_(1.0)).mul_(self.softcap / self.temperature)


class RowStatistics(NamedTuple):
    """Statistics of rows, each `[T]` in accumulator precision; a gradient needs `row_max` and `log_sum` again."""

    logprob: Tensor
    row_max: Tensor
    """m."""
    log_sum: Tensor
    """log s."""
    entropy: Tensor | None
    kl: Tensor | None
    peak_drift: Tensor | None
    """z − z_ref of a most probable token."""
    mean_drift: Tensor | None
    """Σ p δ."""

    @classmethod
    def empty(cls, rows: int, device: torch.device, dtype: torch.dtype, *, entropy: bool, kl: bool) -> RowStatistics:
        """Allocate the statistics of `rows` rows; None for those that are not wanted."""
        # tensors of their own, not rows of one: some are results, whose memory and version would be those of all
        allocate = partial(torch.empty, rows, device=device, dtype=dtype)
        return cls(
            logprob=allocate(),
            row_max=allocate(),
            log_sum=allocate(),
            entropy=allocate() if entropy else None,
            kl=allocate() if kl else None,
            peak_drift=allocate() if kl else None,
            mean_drift=allocate() if kl else None,
        )

    def rows(self, rows: slice) -> RowStatistics:
        """View of some rows: a chunk writes its statistics into the whole."""
        return RowStatistics(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


class RowGradient(NamedTuple):
    """A gradient in raw logits, `row_factor[:, None] · matrix + large_entries`."""

    matrix: Tensor
    """`[r, V]`."""
    row_factor: Tensor | None = None
    """float32 `[r]`; None: 1."""
    large_entries: LargeEntries | None = None
    """None: 0."""


class TritonRows:
    """A chunk of float32 logits (or given ones of any precision), worked on in place by `softmax_rows_kernel`.

    Args:
        logits: `[r, V]`, last stride 1.
        targets: `[r]`.
        transform: raw logits to the softmax's.
        stats: where the statistics go; the statistics themselves if `saved`.
        saved: `stats` are known, from an earlier pass over the same logits.
        drift: `[r, V]`, raw logits minus the reference's, for KL. Plain torch works on it in place.
        out: `[r, V]`, where the gradient goes: over the logits by default. It may be a view of their memory in half
            precision, if each of its rows starts where the logits' row does: the gradient is a GEMM's operand then.
        weight: `[r]`. A row of weight 0 is not read: whatever it holds, its gradient is 0.
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
        weight: Tensor | None = None,
    ):
        self.logits, self.targets, self.transform, self.stats = logits, targets, transform, stats
        self.saved, self.drift, self.weight = saved, drift, weight
        self.out = logits if out is None else out

    def statistics_(self) -> None:
        """Fill `stats`."""
        self._launch()
        self.saved = True

    def gradient_(
        self, grad_logprob: Tensor | None, grad_entropy: Tensor | None = None, grad_kl: Tensor | None = None
    ) -> RowGradient:
        """Write the gradient, from upstream gradients `[r]` (`grad_logprob` None: ones). Fills `stats` if not saved."""
        gradient = self._allocate(logprob_only=grad_entropy is None and grad_kl is None)
        self._launch(gradient, grad_logprob=grad_logprob, grad_entropy=grad_entropy, grad_kl=grad_kl)
        return gradient

    def loss_gradient_(self, inputs: LossInputs) -> RowGradient:
        """Statistics and the gradient of `Σ weight · token_loss`, in one launch."""
        gradient = self._allocate(logprob_only=inputs.config.entropy_coef == 0)
        self._launch(gradient, loss=inputs)
        return gradient

    def _allocate(self, *, logprob_only: bool) -> RowGradient:
        """Where the gradient goes, in the form that suits it.

        A log-prob's alone has one or two entries a row that outweigh the rest; with entropy or KL in it there are none.
        """
        rows, device = self.logits.shape[0], self.logits.device
        if self.out.dtype == self.logits.dtype:
            return RowGradient(self.out)
        if logprob_only:
            return RowGradient(self.out, large_entries=LargeEntries.none(rows, device))
        return RowGradient(self.out.view(torch.float16), row_factor=torch.empty(rows, device=device))

    def _launch(
        self,
        gradient: RowGradient | None = None,
        *,
        grad_logprob: Tensor | None = None,
        grad_entropy: Tensor | None = None,
        grad_kl: Tensor | None = None,
        loss: LossInputs | None = None,
    ) -> None:
        """One program a row. A gradient takes its upstream from the three `grad_…`, or from `loss`."""
        rows, vocabulary = self.logits.shape
        stats, logits, drift = self.stats, self.logits, self.drift
        out, row_factor, large = gradient or RowGradient(logits)
        config = loss.config if loss else None
        kl_estimator = 0
        if loss and loss.config.beta and loss.reference_logprob is not None:  # beta = 0: its KL is a metric alone
            kl_estimator = int(loss.config.kl_estimator[1])  # of "k1", "k2", "k3"
        launch = launch_rows()
        softmax_rows_kernel[(rows,)](
            logits=logits,
            grad=out,
            large_token_ptr=large.token if large else None,
            large_value_ptr=large.value if large else None,
            factor_ptr=row_factor,
            targets=self.targets,
            drift=drift,
            logprob_ptr=stats.logprob,
            row_max_ptr=stats.row_max,
            log_sum_ptr=stats.log_sum,
            entropy_ptr=stats.entropy,
            kl_ptr=stats.kl,
            peak_drift_ptr=stats.peak_drift,
            mean_drift_ptr=stats.mean_drift,
            grad_logprob_ptr=grad_logprob,
            grad_entropy_ptr=grad_entropy,
            grad_kl_ptr=grad_kl,
            loss_weight_ptr=loss.weight if loss else self.weight,
            advantage_ptr=loss.advantages if loss else None,
            old_logprob_ptr=loss.old_logprob if loss else None,
            reference_logprob_ptr=loss.reference_logprob if loss else None,
            V=vocabulary,
            logits_stride=logits.stride(0),
            grad_stride=out.stride(0),
            drift_stride=0 if drift is None else drift.stride(0),
            inverse_temperature=1.0 / self.transform.temperature,
            softcap=self.transform.softcap or 1.0,
            clip_low=config.lower_range if config else 0.0,
            clip_high=config.clip_high if config else 0.0,
            dual_clip=float("inf") if config is None or config.dual_clip is None else config.dual_clip,
            cispo_cap=config.cispo_cap if config else 0.0,
            beta=config.beta if config else 0.0,
            entropy_coef=config.entropy_coef if config else 0.0,
            SOFTCAP=self.transform.softcap is not None,
            ENTROPY=stats.entropy is not None,
            KL=drift is not None,
            SAVED=self.saved,
            GRAD=gradient is not None,
            LARGE=large is not None,
            SCALED=row_factor is not None,
            UPSTREAM_LOGPROB=grad_logprob is not None,
            UPSTREAM_ENTROPY=grad_entropy is not None,
            UPSTREAM_KL=grad_kl is not None,
            WEIGHT=self.weight is not None,
            LOSS=loss is not None,
            CISPO=config is not None and config.loss_type == "cispo",
            OLD=loss is not None and loss.old_logprob is not None,
            KL_ESTIMATOR=kl_estimator,
            KL_TIMES_RATIO=config is not None and config.kl_times_ratio,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )


class TorchRows:
    """`TritonRows` in plain torch: the same arguments and methods.

    Without `out` the logits are overwritten by exp(z − m), and that by the gradient; with `out` a copy is. Under a
    softcap the raw logits stay until the gradient, which needs its slope there: exp(z − m) may have underflowed. All
    element-wise work goes block by block of rows that stay in a core's cache: a dozen passes over memory would take
    longer than the GEMM.
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
        weight: Tensor | None = None,
    ):
        self.targets = targets.long()[:, None]  # gather and scatter_ take int64 alone
        self.transform, self.stats, self.out = transform, stats, out
        self.exp = logits.to(stats.logprob.dtype, copy=out is not None)  # becomes exp(z − m)
        if weight is not None:  # 0 · NaN is NaN: a row that does not count becomes one of zeros
            dead = weight == 0
            if self.exp.is_cuda:  # without a synchronisation, for a pass over all rows
                self.exp.masked_fill_(dead[:, None], 0.0)
            else:
                self.exp.index_fill_(0, dead.nonzero()[:, 0], 0.0)
        self.drift = drift  # becomes δ
        self.others = self.exp.new_empty(self.exp.shape[0], 1)  # Σ_{v≠y} exp(z − m)
        self.saved, self.ready = saved, False
        count, vocabulary = self.exp.shape
        block_rows = max(1, BLOCK_BYTES // max(1, vocabulary * self.exp.element_size()))
        if self.exp.is_cuda:  # all at once: a GPU has no such cache, and launches each operation apart
            block_rows = max(1, count)
        self.blocks = [slice(start, min(start + block_rows, count)) for start in range(0, count, block_rows)]

    def statistics_(self) -> None:
        """Fill `stats`."""
        shifted = None
        if self.stats.entropy is not None or self.stats.kl is not None:
            # one buffer for all blocks (the first is the largest): fresh memory costs more than what is done in it
            shifted = self.exp.new_empty(self.blocks[0].stop if self.blocks else 0, self.exp.shape[1])
        for rows in self.blocks:
            stats, targets, x = self.stats.rows(rows), self.targets[rows], self.exp[rows]
            if self.drift is not None:
                delta = self.transform.difference(x, self.drift[rows])  # before x is overwritten
            if self.transform.softcap is not None:
                x = x.clone()
            self.transform(x)
            row_max = x.amax(1, keepdim=True)
            row_max.masked_fill_(row_max <= NO_LOGIT, torch.nan)
            x.sub_(row_max)
            target_z = x.gather(1, targets)
            target_z.masked_fill_(target_z <= NO_LOGIT, -torch.inf)
            # a logit of −∞ has p = 0, and 0·z must be 0
            z = None if shifted is None else torch.clamp(x, min=NO_LOGIT, out=shifted[: x.shape[0]])
            x.exp_()
            target_exp = x.gather(1, targets)
            # the target is left out of the sum, not subtracted from it: that is what keeps 1 − p_y exact
            others = torch.sum(x.scatter_(1, targets, 0.0), 1, keepdim=True, out=self.others[rows])
            x.scatter_(1, targets, target_exp)
            total = others + target_exp
            log_sum = total.log()
            gap = others.log() - target_z  # log p_y = −log(1 + exp(gap)), in a form that overflows for no gap
            stats.row_max.copy_(row_max[:, 0])
            stats.log_sum.copy_(log_sum[:, 0])
            stats.logprob.copy_((-(gap.clamp(min=0.0) + torch.log1p(torch.exp(-gap.abs()))))[:, 0])
            if stats.kl is not None:
                assert stats.peak_drift is not None  # as the other two of KL
                assert stats.mean_drift is not None
                assert z is not None
                peak_drift = delta.gather(1, z.argmax(1, keepdim=True))
                stats.peak_drift.copy_(peak_drift[:, 0])
                delta.sub_(peak_drift)
                mean = (x * delta).sum(1, keepdim=True) / total
                stats.mean_drift.copy_(mean[:, 0])
                stats.kl.copy_(torch_kl(x / total, z - log_sum, delta, mean)[:, 0])
            if stats.entropy is not None:  # last: it overwrites z
                assert z is not None
                stats.entropy.copy_(stats.log_sum - z.mul_(x).sum(1) / total[:, 0])
        self.ready = True

    def gradient_(
        self, grad_logprob: Tensor | None, grad_entropy: Tensor | None = None, grad_kl: Tensor | None = None
    ) -> RowGradient:
        """Write the gradient, from upstream gradients `[r]` (`grad_logprob` None: ones). Fills `stats` if not saved."""
        if self.saved:
            self._restore(grad_kl is not None)
        elif not self.ready:
            self.statistics_()
        inverse_sum = torch.exp(-self.stats.log_sum)[:, None] / self.transform.temperature
        upstream = torch.ones_like(inverse_sum) if grad_logprob is None else grad_logprob[:, None]
        logprob_only = grad_entropy is None and grad_kl is None
        if logprob_only and self.transform.softcap is None:
            # −g (p_v − [v = y]) = −g / s · exp(z_v − m) beside the target, −g / s · (−others) at it: one factor a row
            self.exp.scatter_(1, self.targets, -self.others)
            factor = -upstream * inverse_sum
        else:
            for rows in self.blocks:
                self._gradient_block(rows, upstream[rows], grad_entropy, grad_kl)
            factor = inverse_sum
        if self.out is None:  # the GEMMs that follow multiply by the factor: no pass over [r, V] for it
            return RowGradient(self.exp, factor[:, 0])
        return RowGradient(self.out.copy_(self.exp.mul_(factor)))

    def loss_gradient_(self, inputs: LossInputs) -> RowGradient:
        """Statistics and the gradient of `Σ weight · token_loss`."""
        self.statistics_()
        assert self.stats.entropy is not None  # losses ask for it, be it for metrics alone
        return self.gradient_(*inputs.slopes(self.stats.logprob, self.stats.entropy))

    def _gradient_block(
        self, rows: slice, grad_logprob: Tensor, grad_entropy: Tensor | None, grad_kl: Tensor | None
    ) -> None:
        """Turn exp(z − m) into s times the gradient in z (in the raw logits, softcap included, but for temperature)."""
        stats, targets, x = self.stats.rows(rows), self.targets[rows], self.exp[rows]
        softcap_slope = None
        if self.transform.softcap is None:
            z = x.log().clamp_(min=NO_LOGIT)  # where exp(z − m) has underflowed, p is 0 and z does not matter
        else:
            softcap_slope = self.transform.softcap_slope(x)
            z = self.transform(x).sub_(stats.row_max[:, None]).clamp(min=NO_LOGIT)
            x.exp_()
        # ∂/∂z_v = p_v · bracket_v, but at the target: the module's docstring has the terms
        if grad_entropy is None:
            bracket = z.zero_()
        else:
            assert stats.entropy is not None
            bracket = z.add_((stats.entropy - stats.log_sum)[:, None]).mul_(-grad_entropy[rows, None])
        if grad_kl is not None:
            assert self.drift is not None
            assert stats.mean_drift is not None
            bracket.addcmul_(self.drift[rows] - stats.mean_drift[:, None], grad_kl[rows, None])
        # at the target, −g p and +g join to g (1 − p), which is not formed by subtraction
        at_target = bracket.gather(1, targets)
        bracket.sub_(grad_logprob).scatter_(1, targets, at_target)
        x.mul_(bracket).scatter_add_(1, targets, grad_logprob * self.others[rows])
        if softcap_slope is not None:
            x.mul_(softcap_slope)

    def _restore(self, kl: bool) -> None:
        """exp(z − m) (without a softcap), and δ, from saved statistics."""
        for rows in self.blocks:
            if kl:
                assert self.drift is not None
                assert self.stats.peak_drift is not None
                delta = self.transform.difference(self.exp[rows], self.drift[rows])
                delta.sub_(self.stats.peak_drift[rows, None])
            if self.transform.softcap is None:
                self.transform(self.exp[rows]).sub_(self.stats.row_max[rows, None]).exp_()
        # others = (1 − p_y) · s
        torch.mul(torch.expm1(self.stats.logprob).neg_(), self.stats.log_sum.exp(), out=self.others[:, 0])


def torch_kl(p: Tensor, logp: Tensor, delta: Tensor, mean: Tensor) -> Tensor:
    """KL `[r, 1]` of rows, by the kernel's two formulas (`_rows_triton._kl`).

    Args:
        p, logp: `[r, V]`. delta: `[r, V]`, log p − log q up to a constant a row. mean: `[r, 1]`, its mean under p.
    """
    rough = mean + (logp - delta).logsumexp(1, keepdim=True)
    d = delta - mean
    terms = torch.where(d.abs() < 1.0, p * (torch.expm1(-d) + d), torch.exp(logp - d) - p + p * d)
    return torch.where(rough < 1.0, torch.log1p(terms.sum(1, keepdim=True)), rough)


Rows = TritonRows | TorchRows
"""A chunk of rows, on either backend."""
ROWS: dict[Backend, type[TritonRows] | type[TorchRows]] = {"triton": TritonRows, "torch": TorchRows}


def default_chunk_bytes(device: torch.device) -> int:
    """How many bytes of logits may exist at a time on `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_CHUNK_SHARE
    return CPU_CHUNK_BYTES


def row_chunks(rows: int, row_bytes: int, device: torch.device, chunk_bytes: int | None) -> list[slice]:
    """Split `rows` into the fewest near-equal slices of at most `chunk_bytes` (at least one row each)."""
    most = max(1, (chunk_bytes or default_chunk_bytes(device)) // max(1, row_bytes))
    count = -(-rows // most)
    size = max(1, -(-rows // max(1, count)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@dataclass(frozen=True)
class HeadOptions:
    """What a pass over an LM head's rows needs to know besides tensors."""

    transform: Transform
    entropy: bool
    chunk_bytes: int | None
    backend: Backend
    grad: bool = True
    """Whether autograd was recording when the operation was called."""


def head_rows(
    head: Head,
    hidden: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: RowStatistics,
    options: HeadOptions,
    *,
    saved: bool = False,
    reference_hidden: Tensor | None = None,
    weight: Tensor | None = None,
) -> Iterator[tuple[slice, Rows]]:
    """Yield `(rows, chunk)` over the logits of an LM head; `chunk_bytes` bounds all that is `[r, V]`.

    Args:
        hidden: `[T, H]`.
        bias: `[V]` or None.
        stats: where the statistics of all T rows go; the statistics themselves if `saved`.
        reference_hidden: `[T, H]`, for KL.
        weight: `[T]`; rows of weight 0 are not read.

    All chunks share one buffer: a chunk is done with before the next one is asked for.
    """
    vocabulary = head.weight.shape[0]
    streams = 1 if reference_hidden is None else 2  # with a reference the drift is as large as the logits
    row_bytes = vocabulary * head.accumulator.itemsize * streams
    buffer = None
    for rows in row_chunks(hidden.shape[0], row_bytes, hidden.device, options.chunk_bytes):
        count = rows.stop - rows.start
        if buffer is None:
            buffer = hidden.new_empty(streams * count, vocabulary, dtype=head.accumulator)
        logits, drift = buffer[:count], None
        if reference_hidden is None:
            head.logits(hidden[rows], logits)
        else:
            drift = head.logits_and_drift(hidden[rows], reference_hidden[rows], buffer[: 2 * count])
        if bias is not None:
            logits.add_(bias)  # the drift needs none: it cancels in a difference
        yield (
            rows,
            ROWS[options.backend](
                logits,
                targets[rows],
                options.transform,
                stats.rows(rows),
                saved=saved,
                drift=drift,
                out=head.grad_place(logits) if options.backend == "triton" else None,
                weight=None if weight is None else weight[rows],
            ),
        )


def row_views(logits: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two `[..., V]` as 2-D views `[r, V]` that cover both in order: one if strides allow, else one an index."""
    if logits.dim() == 2:
        return [(logits, out)]
    try:
        return [(logits.view(-1, logits.shape[-1]), out.view(-1, out.shape[-1]))]
    except RuntimeError:  # e.g. logits[:, :-1]
        return [views for parts in zip(logits, out, strict=True) for views in row_views(*parts)]


def logit_rows(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    transform: Transform,
    stats: RowStatistics,
    backend: Backend,
    saved: bool = False,
    weight: Tensor | None = None,
) -> Iterator[tuple[slice, Rows]]:
    """Yield `(rows, chunk)` over logits `[..., V]`; a chunk's gradient goes to the same place of `out`.

    Rows whose `weight` (`[T]`, over all leading indices) is 0 are not read.
    """
    start = 0
    for view, out_view in row_views(logits, out):
        size, vocabulary = view.shape
        pieces = [slice(0, size)] if size else []
        if backend == "torch":  # it copies to accumulator precision: exp(z − m), and z − m for the entropy
            pieces = row_chunks(size, 2 * vocabulary * stats.logprob.dtype.itemsize, logits.device, None)
        for piece in pieces:
            rows = slice(start + piece.start, start + piece.stop)  # of all leading indices, flattened
            yield (
                rows,
                ROWS[backend](
                    view[piece],
                    targets[rows],
                    transform,
                    stats.rows(rows),
                    saved=saved,
                    out=out_view[piece],
                    weight=None if weight is None else weight[rows],
                ),
            )
        start += size


def check_logits(logits: Tensor, targets: Tensor, *, inplace: bool) -> Tensor:
    """Logits `[..., V]` with a last stride of 1, for targets `[...]`.

    Raises:
        ValueError: shapes do not fit, or a gradient is to be written over rows that share memory. TypeError: logits
            that are not floating point.
    """
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"need logits [..., V] and targets [...], got {list(logits.shape)} and {list(targets.shape)}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if inplace and shares_memory(logits):
        raise ValueError(
            f"inplace=True would write several rows' gradients to one place: logits of shape {list(logits.shape)} and "
            f"strides {list(logits.stride())} share memory; pass inplace=False, or logits.contiguous()"
        )
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def shares_memory(tensor: Tensor) -> bool:
    """Whether two indices of a tensor may have one address, as after `expand` or `unfold`."""
    reach = 0  # how far the dimensions looked at lead from the first element
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_softmax(
    transform: Transform,
    targets: Tensor,
    rows: int,
    vocabulary: int,
    device: torch.device,
    *,
    chunk_bytes: int | None = None,
    validate: bool,
) -> None:
    """Refuse arguments of a softmax over `rows` rows of logits that have no meaning, or do not fit each other.

    The range of targets is checked where it costs no device synchronisation, or with `validate`.

    Raises:
        ValueError: a temperature, softcap or chunk size that is 0, negative, infinite or NaN; targets of a wrong shape
            or device.
        TypeError: targets that are not int32 or int64. IndexError: a target outside `[0, V)`, or any target where
            V = 0.
    """
    if not 0 < transform.temperature < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, got {transform.temperature}; greedy decoding has no distribution"
        )
    if transform.softcap is not None and not 0 < transform.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {transform.softcap}")
    if chunk_bytes is not None and not chunk_bytes > 0:
        raise ValueError(f"chunk_bytes must be positive or None, got {chunk_bytes}")
    if targets.shape != (rows,):
        raise ValueError(f"targets must have shape [{rows}], one id per row, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the other tensors on {device}")
    if rows and not vocabulary:
        raise IndexError(
            f"a vocabulary of 0 (V = 0) holds no target, but there are {rows} rows; only T = 0 goes with it"
        )
    if rows and (validate or device.type == "cpu"):  # on a GPU int() would wait for all that is queued
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"targets must lie in [0, {vocabulary}), got {low}..{high}; "
                "drop ignored rows, or give any valid id a weight of 0"
            )
