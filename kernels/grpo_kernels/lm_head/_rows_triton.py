"""Softmax rows by one Triton kernel, a row a program: see `softmax_rows` for the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.lm_head._large_entries import LargeEntries
from grpo_kernels.lm_head._rows import RowGradient, RowStatistics, Transform
from grpo_kernels.lm_head.token_loss import LossConfig, LossInputs
from grpo_kernels.testing.interpreter import interpreted


@triton.jit
def softmax_rows_kernel(
    logits,
    grad,  # where the gradient goes: over the logits, each row's from the row's start on
    large_token_ptr,  # [T, 2]: the target's entry, and that of a token with most of the others' probability
    large_value_ptr,
    factor_ptr,  # what a scaled gradient has to be multiplied by
    targets,
    drift,  # raw logits minus the reference's
    # statistics: read if SAVED, else written
    logprob_ptr,
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    kl_ptr,
    peak_drift_ptr,
    mean_drift_ptr,
    # upstream gradient of logprob, entropy and KL (UPSTREAM), or what a GRPO loss is made of (LOSS)
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_kl_ptr,
    loss_weight_ptr,
    advantage_ptr,
    old_logprob_ptr,
    reference_logprob_ptr,
    # shapes and strides
    V,
    logits_stride,
    grad_stride,
    drift_stride,
    # numbers
    inverse_temperature,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    cispo_cap,
    beta,
    entropy_coef,
    # what to do
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    SAVED: tl.constexpr,
    GRAD: tl.constexpr,
    LARGE: tl.constexpr,
    SCALED: tl.constexpr,
    UPSTREAM_LOGPROB: tl.constexpr,
    UPSTREAM_ENTROPY: tl.constexpr,
    UPSTREAM_KL: tl.constexpr,
    LOSS: tl.constexpr,
    CISPO: tl.constexpr,
    OLD: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. Pass 1 reads the row for its statistics, pass 2 (from L2) writes the gradient over it."""
    t = tl.program_id(0).to(tl.int64)  # T·V passes 2³¹ at T = 14,123 for V = 152,064
    z_row = logits + t * logits_stride
    g_row = grad + t * grad_stride
    d_row = z_row
    if KL:
        d_row = drift + t * drift_stride
    lanes = tl.arange(0, BLOCK)
    y = tl.load(targets + t)

    if LOSS:
        weight = tl.load(loss_weight_ptr + t)
        if weight == 0.0:  # a row that does not count: defined values, no gradient, no work
            tl.store(logprob_ptr + t, 0.0)
            tl.store(row_max_ptr + t, 0.0)
            tl.store(log_sum_ptr + t, 0.0)
            if ENTROPY:
                tl.store(entropy_ptr + t, 0.0)
            if SCALED:
                tl.store(factor_ptr + t, 0.0)
            if GRAD:
                for v0 in range(0, V, BLOCK):
                    zero = tl.zeros((BLOCK,), tl.float32).to(grad.dtype.element_ty)
                    tl.store(g_row + v0 + lanes, zero, v0 + lanes < V)
            return

    # a target out of range is not read: it makes the row NaN
    valid = (y >= 0) & (y < V)
    x_y = tl.load(z_row + y, valid, other=float("nan")).to(tl.float32)
    z_y = transform_logits(x_y, inverse_temperature, softcap, SOFTCAP)

    if SAVED:
        row_max = tl.load(row_max_ptr + t)
        log_sum = tl.load(log_sum_ptr + t)
        logprob = tl.load(logprob_ptr + t)
        entropy = 0.0
        if UPSTREAM_ENTROPY:
            entropy = tl.load(entropy_ptr + t)
    else:
        row_max, others, moment, peak_token = _online(
            z_row, y, V, lanes, inverse_temperature, softcap, SOFTCAP, ENTROPY, KL, BLOCK
        )
        highest = tl.maximum(row_max, z_y)
        shrink = tl.exp(row_max - highest)
        moment = (moment + others * (row_max - highest)) * shrink
        others = others * shrink
        row_max = highest
        e_y = tl.exp(z_y - row_max)
        log_sum = tl.log(others + e_y)
        gap = tl.log(others) + row_max - z_y
        logprob = -(tl.maximum(gap, 0.0) + log1p(tl.exp(-tl.abs(gap))))
        entropy = log_sum - (moment + e_y * (z_y - row_max)) / (others + e_y)
        tl.store(logprob_ptr + t, logprob)
        tl.store(row_max_ptr + t, row_max)
        tl.store(log_sum_ptr + t, log_sum)
        if ENTROPY:
            tl.store(entropy_ptr + t, entropy)

    peak = 0.0
    mean = 0.0
    if KL:
        if SAVED:
            peak = tl.load(peak_drift_ptr + t)
            mean = tl.load(mean_drift_ptr + t)
            kl = tl.load(kl_ptr + t)
        else:
            x = tl.load(z_row + peak_token).to(tl.float32)
            peak = _difference(x, d_row + peak_token, True, 0.0, inverse_temperature, softcap, SOFTCAP)
            row = (row_max, log_sum, peak)
            mean, kl = _kl(z_row, d_row, row, V, lanes, inverse_temperature, softcap, SOFTCAP, BLOCK)
            tl.store(peak_drift_ptr + t, peak)
            tl.store(mean_drift_ptr + t, mean)
            tl.store(kl_ptr + t, kl)

    if GRAD:
        g_logprob = 1.0
        g_entropy = 0.0
        g_kl = 0.0
        if LOSS:
            old = 0.0
            reference = 0.0
            if OLD:
                old = tl.load(old_logprob_ptr + t)
            if KL_ESTIMATOR > 0:
                reference = tl.load(reference_logprob_ptr + t)
            slope = token_loss_slope(
                logprob,
                tl.load(advantage_ptr + t),
                old,
                reference,
                clip_low,
                clip_high,
                dual_clip,
                cispo_cap,
                beta,
                CISPO,
                OLD,
                KL_ESTIMATOR,
                KL_TIMES_RATIO,
            )
            g_logprob = weight * slope
            g_entropy = -weight * entropy_coef
        if UPSTREAM_LOGPROB:
            g_logprob = tl.load(grad_logprob_ptr + t)
        if UPSTREAM_ENTROPY:
            g_entropy = tl.load(grad_entropy_ptr + t)
        if UPSTREAM_KL:
            g_kl = tl.load(grad_kl_ptr + t)
        one_minus_p = -expm1(logprob)
        row = (row_max, log_sum, entropy, peak, mean, one_minus_p)
        upstream = (g_logprob, g_entropy, g_kl)
        if SCALED:
            bound = tl.abs(g_logprob) * one_minus_p
            if LOSS or UPSTREAM_ENTROPY:
                bound += tl.abs(g_entropy) * entropy
            if UPSTREAM_KL:
                bound += tl.abs(g_kl) * _kl_slope_bound(kl)
            scale, factor = _half_scale(bound * inverse_temperature)
            tl.store(factor_ptr + t, factor)
        if LARGE:
            dz_y, _ = _slope(
                x_y, d_row + y, valid, valid, row, upstream, inverse_temperature, softcap, SOFTCAP, UPSTREAM_KL
            )
            tl.store(large_token_ptr + 2 * t, tl.where(valid, y, -1))
            tl.store(large_value_ptr + 2 * t, dz_y)
            other_token = tl.full((BLOCK,), -1, tl.int32)
            other_dz = tl.zeros((BLOCK,), tl.float32)
        tl.debug_barrier()  # every lane has read x_y before the row is overwritten
        for v0 in range(0, V, BLOCK):
            v = v0 + lanes
            live = v < V
            raw = tl.load(z_row + v, live, other=-1e30).to(tl.float32)
            dz, p = _slope(
                raw, d_row + v, live, v == y, row, upstream, inverse_temperature, softcap, SOFTCAP, UPSTREAM_KL
            )
            if LARGE:
                # no two tokens can have most of what the target leaves, rounded as they may be
                other = (v != y) & (p > 0.51 * one_minus_p)
                other_token = tl.where(other, v, other_token)
                other_dz = tl.where(other, dz, other_dz)
                dz = tl.where(other | (v == y), 0.0, dz)
            if SCALED:
                dz *= scale
            # a narrow gradient's block i lies inside the logits' blocks ≤ i: all lanes must have read theirs
            tl.debug_barrier()
            tl.store(g_row + v, dz.to(grad.dtype.element_ty), live)
        if LARGE:
            tl.store(large_token_ptr + 2 * t + 1, tl.max(other_token, 0))
            tl.store(large_value_ptr + 2 * t + 1, tl.sum(other_dz, 0))


@triton.jit
def _slope(
    raw,
    drift,  # where it is
    live,
    at_target,
    row,
    upstream,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    KL: tl.constexpr,
):
    """The gradient in raw logits of a row, and their p."""
    row_max, log_sum, entropy, peak, mean, one_minus_p = row
    g_logprob, g_entropy, g_kl = upstream
    z = transform_logits(raw, inverse_temperature, softcap, SOFTCAP)
    if SOFTCAP:
        z = tl.where(live, z, -1e30)  # what no column holds is not −∞ any more
    logp = (z - row_max) - log_sum
    bracket = -g_entropy * (logp + entropy)
    if KL:
        bracket += g_kl * (_difference(raw, drift, live, peak, inverse_temperature, softcap, SOFTCAP) - mean)
    p = tl.exp(logp)
    # at the target, −g p and +g join to g (1 − p), which is not formed by subtraction
    dz = tl.where(at_target, p * bracket + g_logprob * one_minus_p, p * (bracket - g_logprob))
    if SOFTCAP:
        bend = z / (softcap * inverse_temperature)
        dz *= 1.0 - bend * bend
    return dz * inverse_temperature, p


@triton.jit
def _kl_slope_bound(kl):
    """No |p_v d_v| is larger, of any distribution p and reference at this KL.

    Σ p d = 0, so none exceeds a = ½ Σ p |d|. As exp(−d) − 1 + d ≥ d² / (2 + |d|), which is convex in |d|,
    exp(KL) − 1 ≥ (2a)² / (2 + 2a). And where d < 0, of probability q, exp(KL) ≥ q exp(a / q): a ≤ q (KL − log q).
    """
    grown = expm1(tl.minimum(kl, 20.0))
    return tl.minimum(0.25 * (grown + tl.sqrt(grown * (grown + 8.0))), kl + 0.37)


@triton.jit
def _half_scale(bound):
    """A power of two that lifts `bound` to between 2¹³ and 2¹⁴, a quarter of what float16 holds, and its inverse."""
    exponent = 267 - (bound.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def transform_logits(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """Raw logits to the softmax's; −∞ becomes a number so small that its probability is 0 and 0·z is 0."""
    if SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(x) / softcap)
        bent = (1.0 - decay) / (1.0 + decay)
        x = tl.where(x < 0, -bent, bent) * softcap
    x = x * inverse_temperature
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def tanh(x):
    """To the last bits for small x too, as differences of logits are; logits make do with fewer registers."""
    decay = expm1(-2.0 * tl.abs(x))
    y = -decay / (2.0 + decay)
    return tl.where(x < 0, -y, y)


@triton.jit
def _difference(raw, pointers, live, peak, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """δ = z − z_ref less the peak's, from raw logits and where their drift is: `Transform.difference`'s formula."""
    delta = tl.load(pointers, live, other=0.0).to(tl.float32)
    if SOFTCAP:
        product = tanh(raw / softcap) * tanh((raw - delta) / softcap)
        delta = tanh(delta / softcap) * (1.0 - product) * softcap
    return delta * inverse_temperature - peak


@triton.jit
def _load(pointers, live, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    x = transform_logits(tl.load(pointers, live, other=0.0).to(tl.float32), inverse_temperature, softcap, SOFTCAP)
    return tl.where(live, x, -1e30)


@triton.jit
def _online(
    row,
    y,
    V,
    lanes,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PEAK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`(m, Σ exp(z − m), Σ exp(z − m)(z − m))` of a row, the target y left out of sums, and with PEAK a token of
    logit m; one cross-lane reduction a row."""
    m = tl.full((BLOCK,), -1e30, tl.float32)
    peak = tl.zeros((BLOCK,), tl.int32)
    s = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + lanes
        z = _load(row + v, v < V, inverse_temperature, softcap, SOFTCAP)
        counts = (v < V) & (v != y)
        n = tl.maximum(m, z)
        if PEAK:
            peak = tl.where(z > m, v, peak)
        shrink = tl.exp(m - n)
        e = tl.where(counts, tl.exp(z - n), 0.0)
        if ENTROPY:
            q = (q + s * (m - n)) * shrink + e * (z - n)
        s = s * shrink + e
        m = n
    highest = tl.max(m, 0)
    shrink = tl.exp(m - highest)
    if ENTROPY:
        q = (q + s * (m - highest)) * shrink
    token = 0
    if PEAK:
        token = tl.max(tl.where(m == highest, peak, 0), 0)
    return highest, tl.sum(s * shrink, 0), tl.sum(q, 0), token


@triton.jit
def _kl(z_row, d_row, row, V, lanes, inverse_temperature, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """`(Σ p δ, KL)` of a row: one pass for the mean and the reference's normaliser, one for the terms around it."""
    row_max, log_sum, peak = row
    mean = tl.zeros((BLOCK,), tl.float32)
    m = tl.full((BLOCK,), -1e30, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        live = v0 + lanes < V
        raw = tl.load(z_row + v0 + lanes, live, other=-1e30).to(tl.float32)
        z = transform_logits(raw, inverse_temperature, softcap, SOFTCAP) - row_max
        delta = _difference(raw, d_row + v0 + lanes, live, peak, inverse_temperature, softcap, SOFTCAP)
        mean += tl.where(live, tl.exp(z - log_sum) * delta, 0.0)
        n = tl.maximum(m, tl.where(live, z - delta, -1e30))
        s = s * tl.exp(m - n) + tl.where(live, tl.exp(z - delta - n), 0.0)
        m = n
    mean = tl.sum(mean, 0)
    highest = tl.max(m, 0)
    rough = mean - log_sum + highest + tl.log(tl.sum(s * tl.exp(m - highest), 0))
    terms = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        live = v0 + lanes < V
        raw = tl.load(z_row + v0 + lanes, live, other=-1e30).to(tl.float32)
        logp = transform_logits(raw, inverse_temperature, softcap, SOFTCAP) - row_max - log_sum
        d = _difference(raw, d_row + v0 + lanes, live, peak, inverse_temperature, softcap, SOFTCAP) - mean
        p = tl.exp(logp)
        term = tl.where(tl.abs(d) < 1.0, p * (expm1(-d) + d), tl.exp(logp - d) - p + p * d)
        terms += tl.where(live, term, 0.0)
    # a sum of exponentials is good until it overflows; from 1 nat on a difference of normalisers is as good
    return mean, tl.where(rough < 1.0, log1p(tl.sum(terms, 0)), rough)


@triton.jit
def expm1(x):
    """exp(x) − 1 without cancellation (Kahan)."""
    u = tl.exp(x)
    exact = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, exact))


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation (Kahan), x ≥ 0."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def token_loss_slope(
    logprob,
    advantage,
    old_logprob,
    reference_logprob,
    clip_low,
    clip_high,
    dual_clip,
    cispo_cap,
    beta,
    CISPO: tl.constexpr,
    OLD: tl.constexpr,
    KL: tl.constexpr,  # 0: no penalty, else the estimator's number
    KL_TIMES_RATIO: tl.constexpr,
):
    """∂ loss / ∂ logprob of one token, of which `token_loss` gives the loss."""
    if OLD:
        ratio = tl.exp(logprob - old_logprob)
    else:
        ratio = tl.exp(logprob - logprob)
    if CISPO:
        slope = -tl.minimum(ratio, cispo_cap) * advantage
    else:
        positive = advantage > 0
        stopped = (positive & (ratio > 1.0 + clip_high)) | (
            (advantage < 0) & ((ratio < 1.0 - clip_low) | (ratio > dual_clip))
        )
        slope = tl.where(stopped, 0.0, -ratio * advantage)
    if KL > 0:
        d = logprob - reference_logprob
        if KL == 1:
            kl = d
            kl_slope = 1.0
        elif KL == 2:
            kl = 0.5 * d * d
            kl_slope = d
        else:
            kl = expm1(-d) + d
            kl_slope = -expm1(-d)
        if KL_TIMES_RATIO:
            kl_slope = (kl_slope + kl) * ratio
        slope += beta * kl_slope
    return slope


@dataclass(frozen=True)
class RowLaunch:
    """How `softmax_rows_kernel` is launched."""

    block: int = 4096
    warps: int = 8


def launch_rows() -> RowLaunch:
    """The shipped configuration; small blocks in the interpreter, so that tests cross their borders."""
    return RowLaunch(block=64, warps=1) if interpreted() else RowLaunch()


class TritonRows:
    """A chunk of float32 logits (or given ones of any precision), worked on in place by `softmax_rows_kernel`.

    Args:
        logits: `[r, V]`, last stride 1.
        targets: `[r]`.
        transform: raw logits to the softmax's.
        stats: room for the statistics, or the statistics themselves if `saved`.
        drift: `[r, V]`, raw logits minus the reference's, for KL. Plain torch works on it in place.
        out: `[r, V]`, where the gradient goes: over the logits by default. It may be a view of their memory in half
            precision, if each of its rows starts where the logits' row does: see `softmax_rows` on what it holds then.
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
        self.logits, self.targets, self.transform, self.stats = logits, targets, transform, stats
        self.saved, self.drift = saved, drift
        self.out = logits if out is None else out

    def statistics_(self) -> None:
        """Fill `stats`."""
        self._launch()
        self.saved = True

    def gradient_(
        self, grad_logprob: Tensor | None, grad_entropy: Tensor | None = None, grad_kl: Tensor | None = None
    ) -> RowGradient:
        """The gradient; `grad_logprob` None stands for ones. Fills `stats` if not saved."""
        even = grad_entropy is not None or grad_kl is not None
        return self._gradient(even, upstream=(grad_logprob, grad_entropy, grad_kl))

    def loss_gradient_(self, inputs: LossInputs) -> RowGradient:
        """Statistics and the gradient of `Σ weight · token_loss`, in one launch."""
        return self._gradient(inputs.config.entropy_coef != 0, loss=inputs)

    def _gradient(self, even: bool, **source) -> RowGradient:
        """The gradient; `even` if it is more than a log-prob's, whose one or two large entries outweigh the rest."""
        rows, device, gradient = self.logits.shape[0], self.logits.device, RowGradient(self.out)
        if self.out.dtype != self.logits.dtype and even:
            gradient = RowGradient(self.out.view(torch.float16), factor=torch.empty(rows, device=device))
        elif self.out.dtype != self.logits.dtype:
            gradient = RowGradient(self.out, large=LargeEntries.none(rows, device))
        self._launch(gradient, **source)
        return gradient

    def _launch(
        self,
        gradient: RowGradient | None = None,
        *,
        upstream: tuple[Tensor | None, ...] = (None, None, None),
        loss: LossInputs | None = None,
    ) -> None:
        rows, vocabulary = self.logits.shape
        stats, logits, drift = self.stats, self.logits, self.drift
        weight, advantages, old, reference_logprob = loss[:4] if loss else (None,) * 4
        config = loss.config if loss else LossConfig()
        out, factor, large = gradient or RowGradient(logits)
        launch = launch_rows()
        softmax_rows_kernel[(rows,)](
            logits,
            out,
            *(large or (None, None)),
            factor,
            self.targets,
            drift,
            stats.logprob,
            stats.row_max,
            stats.log_sum,
            stats.entropy,
            stats.kl,
            stats.peak_drift,
            stats.mean_drift,
            *upstream,
            weight,
            advantages,
            old,
            reference_logprob,
            vocabulary,
            logits.stride(0),
            out.stride(0),
            0 if drift is None else drift.stride(0),
            1.0 / self.transform.temperature,
            self.transform.softcap or 1.0,
            config.clip_low,
            config.clip_high,
            float("inf") if config.dual_clip is None else config.dual_clip,
            config.cispo_cap,
            config.beta,
            config.entropy_coef,
            SOFTCAP=self.transform.softcap is not None,
            ENTROPY=stats.entropy is not None,
            KL=drift is not None,
            SAVED=self.saved,
            GRAD=gradient is not None,
            LARGE=large is not None,
            SCALED=factor is not None,
            UPSTREAM_LOGPROB=upstream[0] is not None,
            UPSTREAM_ENTROPY=upstream[1] is not None,
            UPSTREAM_KL=upstream[2] is not None,
            LOSS=loss is not None,
            CISPO=config.loss_type == "cispo",
            OLD=old is not None,
            KL_ESTIMATOR=int(config.kl_estimator[1]) if config.beta and reference_logprob is not None else 0,
            KL_TIMES_RATIO=config.kl_times_ratio,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
