"""Triton kernels over rows of logits, a row a program: statistics, gradient, loss; and products of large entries.

`_rows` has the formulas, and the classes that launch these kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import interpreted, tl, triton


@triton.jit
def softmax_rows_kernel(
    # rows
    logits,  # [T, V]
    grad,  # where the gradient goes: over the logits, each row's from the row's start on
    large_token_ptr,  # [T, 2]: the target's entry, and that of a token with most of the others' probability
    large_value_ptr,
    factor_ptr,  # what a scaled gradient has to be multiplied by
    targets,  # [T]
    drift,  # [T, V], raw logits minus the reference's
    # statistics, [T] each: read if SAVED, else written
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
    WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CISPO: tl.constexpr,
    OLD: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. Pass 1 reads it for its statistics, pass 2 reads it again to write the gradient over it."""
    t = tl.program_id(0).to(tl.int64)  # T·V passes 2³¹ at T = 14,123 for V = 152,064
    z_row = logits + t * logits_stride
    g_row = grad + t * grad_stride
    d_row = z_row
    if KL:
        d_row = drift + t * drift_stride
    lanes = tl.arange(0, BLOCK)
    y = tl.load(targets + t)

    if LOSS or WEIGHT:
        weight = tl.load(loss_weight_ptr + t)
        if weight == 0.0:  # a row that does not count: defined values, no gradient, and its logits are not read
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
        # the target joins: its logit may be the largest, so the others' sums move to the new maximum
        highest = tl.maximum(row_max, z_y)
        shrink = tl.exp(row_max - highest)
        moment = (moment + others * (row_max - highest)) * shrink
        others = others * shrink
        row_max = tl.where(highest <= -1e30, float("nan"), highest)  # no token is possible: the row has no distribution
        e_y = tl.exp(z_y - row_max)
        log_sum = tl.log(others + e_y)
        # −log(1 + exp(gap)) in a form that overflows for no gap, exact where the target has nearly all of p. The two
        # logits meet first: the sum with log(others) would be rounded at their offset's size
        gap = tl.log(others) + (row_max - z_y)
        logprob = -(tl.maximum(gap, 0.0) + log1p(tl.exp(-tl.abs(gap))))
        logprob = tl.where(z_y <= -1e30, logprob - float("inf"), logprob)  # NaN stays
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
            policy = (row_max, log_sum, peak)
            mean, kl = _kl(z_row, d_row, policy, V, lanes, inverse_temperature, softcap, SOFTCAP, BLOCK)
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
        one_minus_p = -expm1(logprob)  # 1 − exp(logprob) would be 0 for a confident token
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
        tl.debug_barrier()  # every thread has read x_y before the row is overwritten
        for v0 in range(0, V, BLOCK):
            v = v0 + lanes
            live = v < V
            raw = tl.load(z_row + v, live, other=-1e30).to(tl.float32)
            dz, p = _slope(
                raw, d_row + v, live, v == y, row, upstream, inverse_temperature, softcap, SOFTCAP, UPSTREAM_KL
            )
            if LARGE:
                # more than half of what the target leaves: one other token at most. 0.51, not 0.5, so that two halves
                # that are both rounded up cannot both pass
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
    raw,  # logits
    drift,  # pointers to their drift
    live,  # the columns that exist
    at_target,
    row,  # its statistics
    upstream,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    KL: tl.constexpr,
):
    """The gradient in some raw logits of a row, and their p."""
    row_max, log_sum, entropy, peak, mean, one_minus_p = row
    g_logprob, g_entropy, g_kl = upstream
    cap_slope = inverse_temperature
    if SOFTCAP:
        # `transform_logits`, which shares its terms with the slope of softcap · tanh(x / softcap): that is 1 − tanh² of
        # the raw logit as 4 e / (1 + e)², because 1 − tanh² would cancel next to the cap
        decay = tl.exp(-2.0 * tl.abs(raw) / softcap)
        inverse = 1.0 / (1.0 + decay)
        z = tl.where(raw < 0, decay - 1.0, 1.0 - decay) * inverse * (softcap * inverse_temperature)
        cap_slope *= 4.0 * decay * inverse * inverse
        z = tl.where(live, z, -1e30)  # softcap made −softcap of the −∞ that stands for columns past V
    else:
        z = transform_logits(raw, inverse_temperature, softcap, SOFTCAP)
    logp = (z - row_max) - log_sum
    bracket = -g_entropy * (logp + entropy)
    if KL:
        bracket += g_kl * (_difference(raw, drift, live, peak, inverse_temperature, softcap, SOFTCAP) - mean)
    p = tl.exp(logp)
    # at the target, −g p and +g join to g (1 − p), which is not formed by subtraction
    dz = tl.where(at_target, p * bracket + g_logprob * one_minus_p, p * (bracket - g_logprob))
    return dz * cap_slope, p


@triton.jit
def _kl_slope_bound(kl):
    """No |p_v d_v| is larger, of any distribution p and reference at this KL.

    Σ p d = 0, so none exceeds a = ½ Σ p |d|. As exp(−d) − 1 + d ≥ d² / (2 + |d|), which is convex in |d|,
    exp(KL) − 1 ≥ (2a)² / (2 + 2a). And where d < 0, of probability q, exp(KL) ≥ q exp(a / q): a ≤ q (KL − log q).
    """
    # The first, solved for a: ¼ (g + √(g² + 8 g)), g = exp(KL) − 1; cut at 20 nats, where the second is the smaller one
    grown = expm1(tl.minimum(kl, 20.0))
    # The second: q KL ≤ KL, and −q log q is at most 1 / e = 0.3679 (at q = 1 / e), rounded up
    return tl.minimum(0.25 * (grown + tl.sqrt(grown * (grown + 8.0))), kl + 0.37)


@triton.jit
def _half_scale(bound):
    """A power of two that lifts `bound` to between 2¹³ and 2¹⁴, a quarter of what float16 holds, and its inverse."""
    # A float32's exponent field is e = 127 + ⌊log₂ x⌋ (its sign bit is 0 here), so 2ᵏ has the field 127 + k. Wanted is
    # k = 13 − ⌊log₂ bound⌋ = 13 + 127 − e, of field 254 + 13 − e = 267 − e. Fields 1 to 253 are those of normal numbers
    # whose inverse, of field 254 − (field), is one too
    exponent = 267 - (bound.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def transform_logits(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """Raw logits to the softmax's; −∞ becomes a number so small that its probability is 0 and 0·z is 0."""
    if SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(x) / softcap)
        magnitude = (1.0 - decay) / (1.0 + decay)  # tanh |x / softcap|; `tanh` is better near 0, for more registers
        x = tl.where(x < 0, -magnitude, magnitude) * softcap
    x = x * inverse_temperature
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def tanh(x):
    """Accurate for small x, which differences of logits need. `transform_logits` has a cheaper form for logits."""
    decay = expm1(-2.0 * tl.abs(x))
    y = -decay / (2.0 + decay)
    return tl.where(x < 0, -y, y)


@triton.jit
def _difference(raw, pointers, live, peak, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """δ = z − z_ref less the peak's, from raw logits and pointers to their drift: `Transform.difference`'s formula."""
    delta = tl.load(pointers, live, other=0.0).to(tl.float32)
    if SOFTCAP:
        product = tanh(raw / softcap) * tanh((raw - delta) / softcap)
        delta = tanh(delta / softcap) * (1.0 - product) * softcap
    return delta * inverse_temperature - peak


@triton.jit
def _load(pointers, live, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """The softmax's logits at `pointers`; −1e30 where no column is."""
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
        n = tl.maximum(m, z)  # each lane has its own maximum: lanes meet once, after the loop
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
def _kl(z_row, d_row, policy, V, lanes, inverse_temperature, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """`(Σ p δ, KL)` of a row: one pass for the mean and the reference's normaliser, one for the terms around it."""
    row_max, log_sum, peak = policy
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
    """exp(x) − 1 without cancellation (Kahan: the rounding of u enters (u − 1) / log u in both places, and cancels)."""
    u = tl.exp(x)
    exact = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, exact))


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation, x ≥ 0 (Kahan, as in Goldberg 1991, theorem 4)."""
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
    """∂ loss / ∂ logprob of one token; `token_loss.token_loss` has the loss, and autograd of it is the test."""
    if OLD:
        log_ratio = logprob - old_logprob
    else:
        log_ratio = logprob - logprob  # 0, but NaN for the row of a target out of range
    bounded = log_ratio > 88.0  # `token_loss.LOG_RATIO_LIMIT`, where the ratio is constant
    ratio = tl.exp(tl.where(bounded, 88.0, log_ratio))
    ratio_slope = tl.where(bounded, 0.0, ratio)
    if CISPO:
        slope = -tl.minimum(tl.maximum(ratio, 1.0 - clip_low), cispo_cap) * advantage
    else:
        # where the minimum is attained by a clamped branch the gradient is 0
        positive = advantage > 0
        stopped = (positive & (ratio > 1.0 + clip_high)) | (
            (advantage < 0) & ((ratio < 1.0 - clip_low) | (ratio > dual_clip))
        )
        slope = tl.where(stopped, 0.0, -ratio_slope * advantage)
    if KL > 0:
        d = logprob - reference_logprob
        if KL == 1:
            kl_slope = 1.0
            both = 1.0 + d
        elif KL == 2:
            kl_slope = d
            both = d + 0.5 * d * d
        else:
            kl_bounded = d < -20.0  # `token_loss.KL_LOG_RATIO_LIMIT`: k3 is e²⁰ − 21 from there on
            kl_slope = tl.where(kl_bounded, 0.0, -expm1(-d))
            both = tl.where(kl_bounded, 485165174.4, d)  # the exponentials of kl and kl' cancel
        if KL_TIMES_RATIO:
            kl_slope = tl.where(bounded, kl_slope, both) * ratio  # (kl · r)' = (kl' + kl) r, as r' = r
        slope += beta * kl_slope
    return slope


@dataclass(frozen=True)
class RowLaunch:
    """How `softmax_rows_kernel` is launched."""

    block: int = 4096
    """16 numbers a thread: four loads of 16 bytes in flight, from float32."""
    warps: int = 8


def launch_rows() -> RowLaunch:
    """The shipped configuration; small blocks in the interpreter, so that tests cross their borders."""
    return RowLaunch(block=64, warps=1) if interpreted() else RowLaunch()


SLOTS = 2
"""Large entries of a row, at most."""
BLOCK_ROWS, BLOCK_H = 16, 512
"""Rows that a run of equal tokens is summed by; hidden features of a program."""


class LargeEntries(NamedTuple):
    """The few large entries of a gradient `[r, V]`, in float32 beside a half-precision rest: `[r, SLOTS]` each.

    A GEMM takes the gradient of logits in half precision, 1.65e-3 from what it was. Most of that is the rounding of one
    or two entries a row: the target's, g (1 − p), and that of another token, if it has most of the 1 − p. With those
    apart,

        dhidden = rest · weight + large · weight         rows of the weight, times a number each
        dweight = restᵀ · hidden + largeᵀ · hidden       runs of equal tokens: one program each, in order, no atomics

    are as good as their own rounding. Beside two GEMMs of 2·r·H·V FLOP that is some 20·r·H bytes.
    """

    token: Tensor
    """int64, the column; −1 where there is no entry."""
    value: Tensor
    """float32; undefined where `token` is −1."""

    @classmethod
    def none(cls, rows: int, device: torch.device) -> LargeEntries:
        """An empty set of entries for `rows` rows."""
        return cls(torch.full((rows, SLOTS), -1, device=device), torch.empty(rows, SLOTS, device=device))

    def add_product(self, total: Tensor, weight: Tensor, out: Tensor) -> None:
        """`out[r, H] = total + large · weight` from float32 totals and `weight [V, H]`, rounded once."""
        rows, width = total.shape
        add_product_kernel[(rows, triton.cdiv(width, BLOCK_H))](
            out=out,
            total=total,
            weight=weight,
            token_ptr=self.token,
            value_ptr=self.value,
            H=width,
            out_stride=out.stride(0),
            out_step=out.stride(1),
            weight_stride=weight.stride(0),
            weight_step=weight.stride(1),
            SLOTS=SLOTS,
            BLOCK_H=BLOCK_H,
        )

    def add_transposed(self, hidden: Tensor, total: Tensor) -> None:
        """`total[V, H] += largeᵀ · hidden[r, H]`, a row with entries rounded once; the same bits each time."""
        width = total.shape[1]
        token, entry = self.token.flatten().sort(stable=True)  # stable: a run is summed in the order of its rows
        end = torch.searchsorted(token, token, right=True)
        add_transposed_kernel[(token.shape[0], triton.cdiv(width, BLOCK_H))](
            total=total,
            hidden=hidden,
            token_ptr=token,
            entry_ptr=entry,
            end_ptr=end,
            value_ptr=self.value,
            H=width,
            total_stride=total.stride(0),
            total_step=total.stride(1),
            hidden_stride=hidden.stride(0),
            hidden_step=hidden.stride(1),
            SLOTS=SLOTS,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_H=BLOCK_H,
        )


@triton.jit
def add_product_kernel(
    # data
    out,  # [r, H]
    total,  # [r, H] float32, contiguous
    weight,  # [V, H]
    token_ptr,
    value_ptr,
    # shapes and strides: `_stride` between rows, `_step` between features
    H,
    out_stride,
    out_step,
    weight_stride,
    weight_step,
    SLOTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row of hidden states a program, BLOCK_H features of it."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.load(total + t * H + h, h < H, other=0.0)
    for slot in tl.static_range(SLOTS):
        token = tl.load(token_ptr + t * SLOTS + slot)
        value = tl.load(value_ptr + t * SLOTS + slot, token >= 0, other=0.0)
        w = tl.load(weight + token * weight_stride + h * weight_step, (h < H) & (token >= 0), other=0.0)
        x += value * w.to(tl.float32)
    tl.store(out + t * out_stride + h * out_step, x.to(out.dtype.element_ty), h < H)


@triton.jit
def add_transposed_kernel(
    # data
    total,  # [V, H]
    hidden,  # [r, H]
    token_ptr,  # [r · SLOTS], in order
    entry_ptr,  # where each was before
    end_ptr,  # of its run of equal tokens
    value_ptr,
    # shapes and strides: `_stride` between rows, `_step` between features
    H,
    total_stride,
    total_step,
    hidden_stride,
    hidden_step,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One run of equal tokens a program, BLOCK_H features of it; all but the first of a run have nothing to do."""
    first = tl.program_id(0)
    token = tl.load(token_ptr + first)
    if (token < 0) | (token == tl.load(token_ptr + first - 1, first > 0, other=-1)):
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.zeros((BLOCK_H,), tl.float32)
    end = tl.load(end_ptr + first)
    for start in range(first, end, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        entry = tl.load(entry_ptr + place, place < end, other=0)
        value = tl.load(value_ptr + entry, place < end, other=0.0)
        row = hidden + (entry // SLOTS)[:, None] * hidden_stride + h[None, :] * hidden_step
        states = tl.load(row, (place < end)[:, None] & (h < H)[None, :], other=0.0)
        x += tl.sum(value[:, None] * states.to(tl.float32), 0)
    row = total + token * total_stride + h * total_step
    x += tl.load(row, h < H, other=0.0).to(tl.float32)
    tl.store(row, x.to(total.dtype.element_ty), h < H)
