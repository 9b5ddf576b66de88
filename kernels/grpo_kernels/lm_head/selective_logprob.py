"""Log-prob of a target and entropy for given logits, with a gradient that can take the logits' own memory.

    logprob = log softmax(transform(logits))[target]        `softmax_rows` has the formulas

`[T, V]` is read once forward; read once and written once backward. Nothing of that size is allocated with
`inplace=True`, and one gradient without. Given low-precision logits cannot be better than their rounding (0.02 nats for
bfloat16 at a logit of 26): with the hidden states at hand, `linear_logprob` starts from float32 accumulators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels._backend import Backend, choose_backend
from grpo_kernels._checks import FLOAT_DTYPES, GRAPH_BREAK, accumulator_dtype, check_softmax, check_targets
from grpo_kernels.lm_head._gemm import row_chunks
from grpo_kernels.lm_head._rows import RowStatistics, Transform
from grpo_kernels.lm_head._softmax_rows import Rows, make_rows


class SelectiveLogprob(NamedTuple):
    """`selective_logprob`'s result, each of `targets`' shape and differentiable."""

    logprob: Tensor
    """log p(target), nats."""
    entropy: Tensor | None
    """Nats; None unless asked for."""


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, transform, entropy, inplace, backend):
        stats = RowStatistics.empty(
            targets.shape[0], logits.device, accumulator_dtype(logits), entropy=entropy, kl=False
        )
        for _, chunk in given_rows(logits, logits, targets, transform, stats, backend):
            chunk.statistics_()
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.inplace, ctx.backend = transform, inplace, backend
        ctx.save_for_backward(logits, targets, *stats.tensors())
        return stats.logprob, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        logits, targets, *stats = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 6
        stats = RowStatistics(*stats)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(stats.logprob)
        upstream = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        for rows, chunk in given_rows(logits, out, targets, ctx.transform, stats, ctx.backend, saved=True):
            chunk.gradient_(*(None if g is None else g[rows] for g in upstream))
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None


def row_views(logits: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two `[..., V]` as 2-D views `[r, V]` that cover both in order: one if strides allow, else one an index."""
    if logits.dim() == 2:
        return [(logits, out)]
    try:
        return [(logits.view(-1, logits.shape[-1]), out.view(-1, out.shape[-1]))]
    except RuntimeError:  # e.g. logits[:, :-1]
        return [views for parts in zip(logits, out, strict=True) for views in row_views(*parts)]


def given_rows(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    transform: Transform,
    stats: RowStatistics,
    backend: Backend,
    saved: bool = False,
) -> Iterator[tuple[slice, Rows]]:
    """Yield `(rows, chunk)` over logits `[..., V]`; a chunk's gradient goes to the same place of `out`."""
    start = 0
    for view, out_view in row_views(logits, out):
        size, vocabulary = view.shape
        pieces = [slice(0, size)] if size else []
        if backend == "torch":  # copies in accumulator precision: exp(z − m), z − m
            pieces = row_chunks(size, 2 * vocabulary * stats.logprob.dtype.itemsize, logits.device, None)
        for piece in pieces:
            rows = slice(start + piece.start, start + piece.stop)
            yield (
                rows,
                make_rows(
                    backend,
                    view[piece],
                    targets[rows],
                    transform,
                    stats.rows(rows),
                    saved=saved,
                    out=out_view[piece],
                ),
            )
        start += size


def check_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits `[..., V]` with a last stride of 1, for targets `[...]`.

    Raises:
        ValueError: shapes do not fit. TypeError: logits that are not floating point.
    """
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"need logits [..., V] and targets [...], got {list(logits.shape)} and {list(targets.shape)}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


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
            nothing else reads later; autograd refuses where it notices.

    Returns:
        `SelectiveLogprob` in float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    logits = check_logits(logits, targets)
    flat = targets.reshape(-1).contiguous()
    check_targets(flat, flat.shape[0], logits.shape[-1], logits.device, validate)
    check_softmax(temperature, softcap)
    result = _SelectiveLogprob.apply(
        logits,
        flat,
        Transform(temperature, softcap),
        entropy,
        inplace,
        choose_backend(logits.device, backend, logits.dtype),
    )
    return SelectiveLogprob(*(None if x is None else x.view(targets.shape) for x in result))


def selective_logprob_reference(logits: Tensor, targets: Tensor, **options) -> SelectiveLogprob:
    """`selective_logprob` in plain torch. The path taken on a CPU."""
    return selective_logprob(logits, targets, backend="torch", **options)
