"""GRPO loss of given logits: loss, per-token statistics and the gradient, written over the logits by option.

    loss = Σ_t loss_weight_t · token_loss_t        `token_loss` has the formulas, `softmax_rows` the softmax

One launch reads a row for its statistics, finds the token's slope from its own log-prob, and writes the gradient: of
`[T, V]` two bytes in and two bytes out a token in bfloat16, where separate forward and backward launches read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels._backend import Backend, choose_backend
from grpo_kernels._checks import GRAPH_BREAK, accumulator_dtype, check_softmax, check_targets
from grpo_kernels.lm_head._rows import RowGradient, RowStatistics, Transform
from grpo_kernels.lm_head._softmax_rows import Rows
from grpo_kernels.lm_head.selective_logprob import check_logits, given_rows
from grpo_kernels.lm_head.token_loss import KLEstimator, LossConfig, LossInputs, LossType

Chunks = Iterator[tuple[slice, Rows]]


class GRPOLoss(NamedTuple):
    """Only `loss` is differentiable; the rest is `[T]`, for metrics and the next epoch.

    Rows of weight 0 have log-prob, entropy and loss 0.
    """

    loss: Tensor
    """Scalar: `Σ loss_weight · token_loss`."""
    token_loss: Tensor
    """Unweighted."""
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    """π / π_old."""
    kl: Tensor | None
    """The chosen estimate of KL(policy ‖ reference); None without `reference_logprob`."""
    clipped_low: Tensor
    """bool."""
    clipped_high: Tensor
    """bool."""


def loss_pass(
    chunks: Callable[[bool], Chunks],
    stats: RowStatistics,
    inputs: LossInputs,
    take: Callable[[slice, RowGradient], None] | None,
) -> GRPOLoss:
    """The loss over all chunks of rows, handing each chunk's gradient to `take` (None: no gradient is wanted).

    Args:
        chunks: gives the rows anew; called with whether `stats` is known already.
    """
    if take is None:
        for _, chunk in chunks(False):
            chunk.statistics_()
    elif inputs.sequence_index is None:
        for rows, chunk in chunks(False):
            take(rows, chunk.loss_gradient_(inputs.rows(rows)))
    else:  # a sequence's ratio is known after its last row
        last = None
        for rows, chunk in chunks(False):
            chunk.statistics_()
            last = rows, chunk
        slopes = inputs.slopes(stats.logprob, stats.entropy)
        one_chunk = last is not None and last[0].start == 0
        for rows, chunk in [last] if one_chunk else chunks(True):
            take(rows, chunk.gradient_(*(None if x is None else x[rows] for x in slopes)))

    live = inputs.weight != 0
    tokens = inputs.loss(stats.logprob, stats.entropy)
    by_token = torch.where(live, tokens.loss, 0.0)
    return GRPOLoss(
        (by_token * inputs.weight).sum(),
        by_token,
        torch.where(live, stats.logprob, 0.0),
        torch.where(live, stats.entropy, 0.0),
        tokens.ratio,
        tokens.kl,
        tokens.clipped_low & live,
        tokens.clipped_high & live,
    )


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed along with it."""

    @staticmethod
    def forward(ctx, compute, *inputs):
        result, ctx.gradients = compute(ctx.needs_input_grad[1:])
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps one gradient, so its backward runs once: call the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_loss)
        return None, *gradients


def with_gradients(
    compute: Callable[[Sequence[bool]], tuple[GRPOLoss, Sequence[Tensor | None]]], *inputs: Tensor | None
) -> GRPOLoss:
    """A differentiable `GRPOLoss` from `compute(needs)`: the result, and its gradients in the inputs that need one."""
    recording = torch.is_grad_enabled()
    return GRPOLoss(*_WithGradients.apply(lambda needs: compute([recording and need for need in needs]), *inputs))


@triton.jit
def scale_kernel(x, factor_ptr, n, BLOCK: tl.constexpr):
    """x ·= factor, read on the device; a factor of 1 costs no memory traffic."""
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < n).to(tl.float32) * factor
    tl.store(x + at, values.to(x.dtype.element_ty), at < n)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """`tensor ·= factor` (0-d) in place; the usual factor of 1 costs neither a pass nor a synchronisation."""
    if tensor.is_cuda and tensor.is_contiguous():
        block = 4096
        scale_kernel[(triton.cdiv(tensor.numel(), block),)](tensor, factor, tensor.numel(), BLOCK=block, num_warps=8)
    elif tensor.is_cuda or factor.item() != 1.0:
        tensor.mul_(factor)


@torch.compiler.disable(reason=GRAPH_BREAK)
def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    loss_weight: Tensor,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    loss_type: LossType = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cispo_cap: float = 5.0,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_times_ratio: bool = False,
    entropy_coef: float = 0.0,
    sequence_index: Tensor | None = None,
    num_sequences: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
    backend: Backend | None = None,
    validate: bool = False,
) -> GRPOLoss:
    """`Σ_t loss_weight_t · (surrogate_t + β·kl_t − entropy_coef·H_t)` of given logits.

    Args:
        logits: `[..., V]`, any strides; targets, and every per-token tensor, have the leading shape `[...]`.
        inplace: the gradient is written over `logits` at once; they hold it from then on. (A linear layer does not need
            its output for its backward.) Without it one tensor of the logits' size is allocated.
        the rest: as in `linear_grpo_loss`.

    Returns:
        `GRPOLoss`, its per-token fields of `targets`' shape.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    logits = check_logits(logits, targets)
    shape, rows = targets.shape, targets.numel()
    check_softmax(temperature, softcap)
    inputs = LossInputs.checked(
        rows,
        logits.device,
        accumulator_dtype(logits),
        LossConfig(
            loss_type,
            clip_low,
            clip_high,
            dual_clip,
            cispo_cap,
            beta,
            kl_estimator,
            kl_times_ratio,
            entropy_coef,
        ),
        *(
            None if x is None else x.reshape(-1)
            for x in (loss_weight, advantages, old_logprob, reference_logprob, sequence_index)
        ),
        num_sequences,
    )
    flat = inputs.counting(targets.reshape(-1))
    check_targets(flat, rows, logits.shape[-1], logits.device, validate)
    transform, backend = Transform(temperature, softcap), choose_backend(logits.device, backend, logits.dtype)

    def compute(needs):
        stats = RowStatistics.empty(rows, logits.device, accumulator_dtype(logits), entropy=True, kl=False)
        (need,) = needs
        given = logits.detach()
        out = torch.empty_like(given) if need and not inplace else given
        result = loss_pass(
            lambda saved: given_rows(given, out, flat, transform, stats, backend, saved),
            stats,
            inputs,
            (lambda *_: None) if need else None,
        )
        if need and inplace:
            torch.autograd.graph.increment_version(logits)
        return result, (out if need else None,)

    result = with_gradients(compute, logits)
    return GRPOLoss(result.loss, *(None if x is None else x.view(shape) for x in result[1:]))


def grpo_loss_reference(logits: Tensor, targets: Tensor, advantages: Tensor, **options) -> GRPOLoss:
    """`grpo_loss` in plain torch. The path taken on a CPU."""
    return grpo_loss(logits, targets, advantages, backend="torch", **options)
