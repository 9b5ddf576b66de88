"""Log-prob of a target and entropy for given logits, with a gradient that can take the logits' own memory.

    logprob = log softmax(transform(logits))[target]        `_rows` has the formulas

`[T, V]` is read once forward; read once and written once backward. Nothing of that size is allocated with
`inplace=True`, and one gradient without. Given low-precision logits cannot be better than their rounding (0.02 nats for
bfloat16 at a logit of 26): with the hidden states at hand, `linear_logprob` starts from float32 accumulators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import GRAPH_BREAK, SECOND_DERIVATIVE, Backend, accumulator_dtype, choose_backend
from grpo_kernels.lm_head._rows import (
    RowStatistics,
    Transform,
    check_logits,
    check_softmax,
    logit_rows,
)


class SelectiveLogprob(NamedTuple):
    """`selective_logprob`'s result, each of `targets`' shape and differentiable."""

    logprob: Tensor
    """log p(target), nats."""
    entropy: Tensor | None
    """Nats; None unless asked for."""


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: Transform, entropy: bool, inplace: bool, backend: Backend
    ) -> tuple[Tensor, Tensor | None]:
        stats = RowStatistics.empty(
            targets.shape[0], logits.device, accumulator_dtype(logits), entropy=entropy, kl=False
        )
        for _, chunk in logit_rows(logits, logits, targets, transform, stats, backend):
            chunk.statistics_()
        ctx.set_materialize_grads(False)  # an output without an upstream gradient gives None, not a tensor of zeros
        ctx.transform, ctx.inplace, ctx.backend = transform, inplace, backend
        ctx.save_for_backward(logits, targets, *stats)
        return stats.logprob, stats.entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        logits, targets, *saved = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 6
        stats = RowStatistics(*saved)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(stats.logprob)
        upstream = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        for rows, chunk in logit_rows(logits, out, targets, ctx.transform, stats, ctx.backend, saved=True):
            chunk.gradient_(*(None if g is None else g[rows] for g in upstream))
        if ctx.inplace:  # a later use of the logits by autograd is refused, not silently wrong
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None


@torch.compiler.disable(reason=GRAPH_BREAK)
def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace: bool = False,
    backend: Backend | None = None,
    validate: bool = False,
) -> SelectiveLogprob:
    """Log-probabilities of `targets` under `softmax(logits / temperature)`, and on request the entropy.

    Args:
        logits: `[..., V]`, any strides (a view such as `logits[:, :-1]` is not copied as long as its last stride is 1).
        targets: int64 or int32 `[...]`, each in `[0, V)`.
        temperature, softcap, entropy, backend, validate: as in `linear_logprob`.
        inplace: the backward writes the gradient over `logits`, which hold it from then on. Only for logits that
            nothing else reads later; autograd refuses where it notices. Rows that share memory, as after `expand`, are
            refused here.

    Returns:
        `SelectiveLogprob` in float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    logits = check_logits(logits, targets, inplace=inplace)
    flat = targets.reshape(-1).contiguous()
    transform = Transform(temperature, softcap)
    check_softmax(transform, flat, flat.shape[0], logits.shape[-1], logits.device, validate=validate)
    logprob, row_entropy = _SelectiveLogprob.apply(
        logits,
        flat,
        transform,
        entropy,
        inplace,
        choose_backend(logits.device, backend, logits.dtype),
    )
    return SelectiveLogprob(
        logprob=logprob.view(targets.shape), entropy=None if row_entropy is None else row_entropy.view(targets.shape)
    )


def selective_logprob_reference(logits: Tensor, targets: Tensor, **options: Any) -> SelectiveLogprob:
    """`selective_logprob` in plain torch. The path taken on a CPU."""
    return selective_logprob(logits, targets, backend="torch", **options)
