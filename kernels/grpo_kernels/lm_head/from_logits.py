"""GRPO loss of given logits: loss, per-token statistics and the gradient, written over the logits by option.

    loss = Σ_t loss_weight_t · token_loss_t        `token_loss` has the formulas, `_rows` the softmax

One launch reads a row for its statistics, finds the token's slope from its own log-prob, and writes the gradient: of
`[T, V]` two bytes in and two bytes out a token in bfloat16, where separate forward and backward launches read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import (
    GRAPH_BREAK,
    HAS_TRITON,
    SECOND_DERIVATIVE,
    Backend,
    accumulator_dtype,
    choose_backend,
    tl,
    triton,
)
from grpo_kernels.lm_head._rows import (
    RowGradient,
    Rows,
    RowStatistics,
    Transform,
    check_logits,
    check_softmax,
    logit_rows,
)
from grpo_kernels.lm_head.token_loss import KLEstimator, LossConfig, LossInputs, LossType

Chunks = Iterator[tuple[slice, Rows]]


class GRPOLoss(NamedTuple):
    """Only `loss` is differentiable; the rest is `[T]`, for metrics and the next epoch.

    Rows of weight 0 hold 0 everywhere, whatever their logits are.
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

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> GRPOLoss:
        """The result with a function applied to each per-token field."""
        return GRPOLoss(
            loss=self.loss,
            token_loss=function(self.token_loss),
            logprob=function(self.logprob),
            entropy=function(self.entropy),
            ratio=function(self.ratio),
            kl=None if self.kl is None else function(self.kl),
            clipped_low=function(self.clipped_low),
            clipped_high=function(self.clipped_high),
        )


def loss_pass(
    chunks: Callable[[bool], Chunks],
    stats: RowStatistics,
    inputs: LossInputs,
    add_gradient: Callable[[slice, RowGradient], None] | None,
) -> GRPOLoss:
    """Compute the loss over all chunks of rows.

    Args:
        chunks: gives the rows anew; called with whether `stats` is known already.
        stats: where the statistics of all rows go.
        add_gradient: takes in each chunk's gradient, before the next chunk overwrites it; None: no gradient is wanted.
    """
    assert stats.entropy is not None  # callers make room for it, be it for metrics alone
    if add_gradient is None:
        for _, chunk in chunks(False):
            chunk.statistics_()
    elif inputs.completion_index is None:
        for rows, chunk in chunks(False):
            add_gradient(rows, chunk.loss_gradient_(inputs.rows(rows)))
    else:  # a completion's ratio is known after its last row: statistics of all rows first, then their gradients
        last = None
        for rows, chunk in chunks(False):
            chunk.statistics_()
            last = rows, chunk
        slopes = inputs.slopes(stats.logprob, stats.entropy)
        # the logits of a single chunk are still there; those of several were overwritten by the next one's
        for rows, chunk in [last] if last is not None and last[0].start == 0 else chunks(True):
            add_gradient(rows, chunk.gradient_(*(None if x is None else x[rows] for x in slopes)))

    live = inputs.weight != 0  # rows of weight 0 may hold anything, NaN too, and NaN · 0 is NaN
    tokens = inputs.loss(stats.logprob, stats.entropy)
    by_token = torch.where(live, tokens.loss, 0.0)
    return GRPOLoss(
        loss=(by_token * inputs.weight).sum(),
        token_loss=by_token,
        logprob=torch.where(live, stats.logprob, 0.0),
        entropy=torch.where(live, stats.entropy, 0.0),
        ratio=torch.where(live, tokens.ratio, 0.0),
        kl=None if tokens.kl is None else torch.where(live, tokens.kl, 0.0),
        clipped_low=tokens.clipped_low & live,
        clipped_high=tokens.clipped_high & live,
    )


Compute = Callable[[Sequence[bool]], tuple[GRPOLoss, Sequence[Tensor | None]]]
"""Takes which inputs need a gradient; gives the result, and its gradient in each input (None where none is needed)."""


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed along with it."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        result, ctx.gradients = compute(ctx.needs_input_grad[1:])  # [0] is `compute` itself
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps one gradient, so its backward runs once: call the loss again")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and given away: they serve once
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_loss)
        return None, *gradients


def with_gradients(compute: Compute, *inputs: Tensor | None) -> GRPOLoss:
    """A differentiable `GRPOLoss` from `compute(needs)`: the result, and its gradients in the inputs that need one."""
    recording = torch.is_grad_enabled()  # inside `forward` it is always off, and needs_input_grad knows no `no_grad`
    return GRPOLoss(*_WithGradients.apply(lambda needs: compute([recording and need for need in needs]), *inputs))


SCALE = {"BLOCK": 4096, "num_warps": 8}
"""Launch of `scale_kernel`: 16 numbers a thread."""


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
    if tensor.is_cuda and tensor.is_contiguous() and HAS_TRITON:
        scale_kernel[(triton.cdiv(tensor.numel(), SCALE["BLOCK"]),)](
            x=tensor, factor_ptr=factor, n=tensor.numel(), **SCALE
        )
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
    clip_low: float | None = None,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cispo_cap: float = 5.0,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_times_ratio: bool = False,
    entropy_coef: float = 0.0,
    completion_index: Tensor | None = None,
    num_completions: int | None = None,
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
            its output for its backward.) Without it one tensor of the logits' size is allocated. Refused where rows
            share memory, as after `expand`.
        the rest: as in `linear_grpo_loss`.

    Returns:
        `GRPOLoss`, its per-token fields of `targets`' shape.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    logits = check_logits(logits, targets, inplace=inplace)
    shape, rows = targets.shape, targets.numel()
    inputs = LossInputs.checked(
        rows,
        logits.device,
        accumulator_dtype(logits),
        LossConfig(
            loss_type=loss_type,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            cispo_cap=cispo_cap,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
            beta=beta,
            kl_estimator=kl_estimator,
            kl_times_ratio=kl_times_ratio,
            entropy_coef=entropy_coef,
        ),
        loss_weight=loss_weight.reshape(-1),
        advantages=advantages.reshape(-1),
        old_logprob=None if old_logprob is None else old_logprob.reshape(-1),
        reference_logprob=None if reference_logprob is None else reference_logprob.reshape(-1),
        completion_index=None if completion_index is None else completion_index.reshape(-1),
        num_completions=num_completions,
    )
    flat = inputs.without_ignored_ids(targets.reshape(-1))
    transform, backend = Transform(temperature, softcap), choose_backend(logits.device, backend, logits.dtype)
    check_softmax(transform, flat, rows, logits.shape[-1], logits.device, validate=validate)

    def compute(needs: Sequence[bool]) -> tuple[GRPOLoss, Sequence[Tensor | None]]:
        stats = RowStatistics.empty(rows, logits.device, accumulator_dtype(logits), entropy=True, kl=False)
        (need,) = needs
        values = logits.detach()
        out = torch.empty_like(values) if need and not inplace else values
        result = loss_pass(
            lambda saved: logit_rows(values, out, flat, transform, stats, backend, saved, inputs.weight),
            stats,
            inputs,
            add_gradient=(lambda rows, gradient: None) if need else None,  # it lies in `out` already
        )
        if need and inplace:  # a later use of the logits by autograd is refused, not silently wrong
            torch.autograd.graph.increment_version(logits)
        return result, (out if need else None,)

    return with_gradients(compute, logits).map_tokens(lambda x: x.view(shape))


def grpo_loss_reference(logits: Tensor, targets: Tensor, advantages: Tensor, **options: Any) -> GRPOLoss:
    """`grpo_loss` in plain torch. The path taken on a CPU."""
    return grpo_loss(logits, targets, advantages, backend="torch", **options)
