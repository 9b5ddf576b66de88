"""Log-prob, entropy and exact KL of an LM head's softmax, without the `[T, V]` logits.

    logits = hidden · weightᵀ + bias        fp32 accumulators, at most `chunk_bytes` of them at a time
    logprob, entropy, kl                    `_rows` says how, forward and backward

Cost of T tokens, H hidden, V vocabulary, one GEMM being 2·T·H·V FLOP: the forward takes one GEMM. With a trainable
head the backward takes two more (input and weight), three in all if one chunk holds all logits, and is kept until then;
of several chunks it computes each again, four in all. With a frozen head (LoRA) the forward also takes the gradient of
each row's log-prob with respect to its hidden state, `[T, H]`, which the backward only scales: two GEMMs in all,
whatever the per-token gradient turns out to be. Where no gradient is wanted and the logits would exceed a chunk,
`lm_head_stats` takes the GEMM and writes no logits at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import GRAPH_BREAK, SECOND_DERIVATIVE, Backend, accumulator_dtype, choose_backend
from grpo_kernels.lm_head._gemm import Head, HeadGradients, fits_descriptors, gather_head
from grpo_kernels.lm_head._rows import (
    HeadOptions,
    RowStatistics,
    Transform,
    check_softmax,
    default_chunk_bytes,
    head_rows,
)
from grpo_kernels.lm_head._stats import lm_head_stats


class LinearLogprob(NamedTuple):
    """`linear_logprob`'s result, each `[T]` and differentiable."""

    logprob: Tensor
    """log p(target), nats."""
    entropy: Tensor | None
    """Of the whole distribution, nats; None unless asked for."""
    kl: Tensor | None
    """KL(policy ‖ reference) over the whole vocabulary, nats; None without `reference_hidden`."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_hidden: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stats = RowStatistics.empty(
            hidden.shape[0],
            hidden.device,
            accumulator_dtype(hidden, weight),
            entropy=options.entropy,
            kl=reference_hidden is not None,
        )
        grad_wanted = options.grad and any(ctx.needs_input_grad)
        if options.backend == "triton" and not grad_wanted and reference_hidden is None:
            logits_bytes = hidden.shape[0] * weight.shape[0] * 4
            chunk_bytes = options.chunk_bytes or default_chunk_bytes(hidden.device)
            if logits_bytes > chunk_bytes and fits_descriptors(hidden, weight):
                # several chunks of logits would be written and read again: the other kernel writes none. One chunk is
                # left to cuBLAS and the row pass
                lm_head_stats(hidden, weight, targets, options.transform, stats, bias)
                return stats.logprob, stats.entropy, stats.kl
        head_frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        head = Head(hidden, weight, options.backend)
        # ∂ logprob / ∂ hidden [T, H] while the logits are there: with a frozen head it is all that a backward needs
        logprob_slope = None
        if grad_wanted and head_frozen and reference_hidden is None:
            logprob_slope = torch.empty_like(hidden, dtype=head.accumulator)  # rounded once, after the upstream factor
        ctx.options, ctx.kept_chunk = options, None
        for rows, chunk in head_rows(head, hidden, bias, targets, stats, options, reference_hidden=reference_hidden):
            if logprob_slope is None:
                chunk.statistics_()
                if grad_wanted and rows == slice(0, hidden.shape[0]):
                    # logits of a single chunk are kept, and not computed again. Without its statistics: those are
                    # results, which hold this graph, so [T, V] would live until the collector finds the cycle
                    del chunk.stats
                    ctx.kept_chunk = chunk
            else:
                head.grad_hidden(chunk.gradient_(None), out=logprob_slope[rows])
        ctx.set_materialize_grads(False)  # an output without an upstream gradient gives None, not a tensor of zeros
        ctx.save_for_backward(hidden, weight, bias, reference_hidden, targets, logprob_slope, *stats)
        return stats.logprob, stats.entropy, stats.kl

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        hidden, weight, bias, reference_hidden, targets, logprob_slope, *saved = ctx.saved_tensors
        stats = RowStatistics(*saved)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if grad_entropy is None and grad_kl is None:
            if grad_logprob is None:
                return (None,) * 6
            if logprob_slope is not None:
                return ((logprob_slope * grad_logprob[:, None]).to(hidden.dtype), *(None,) * 5)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(stats.logprob)
        # `.sum()` gives an expanded scalar of stride 0 as upstream gradient: kernels read one number a row
        upstream = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy, grad_kl)]
        if grad_kl is None:
            reference_hidden = None
        head = Head(hidden, weight, ctx.options.backend)
        gradients = HeadGradients(head, hidden, bias, need_hidden, need_weight, need_bias)
        # the gradient goes over the logits, so they serve once: a second backward computes them again
        kept_chunk, ctx.kept_chunk = ctx.kept_chunk, None
        with torch.autocast(hidden.device.type, enabled=False):  # a backward may run outside the forward's context
            if kept_chunk is not None:
                kept_chunk.stats = stats
                chunks = iter([(slice(0, hidden.shape[0]), kept_chunk)])
            else:
                chunks = head_rows(
                    head,
                    hidden,
                    bias,
                    targets,
                    stats,
                    ctx.options,
                    saved=True,
                    reference_hidden=reference_hidden,
                )
            for rows, chunk in chunks:
                gradients.add(rows, chunk.gradient_(*(None if g is None else g[rows] for g in upstream)))
        return *gradients.results(), None, None, None


@torch.compiler.disable(reason=GRAPH_BREAK)
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    reference_hidden: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: Backend | None = None,
    validate: bool = False,
) -> LinearLogprob:
    """Log-probabilities of `targets` under `softmax(hidden · weightᵀ + bias)`, and on request entropy and KL.

    Args:
        hidden: `[T, H]`, float16, bfloat16, float32 or float64 (as are the other tensors; dtypes may differ).
        weight: `[V, H]`, tied or not; a head without `requires_grad` costs half as much.
        targets: int64 or int32 `[T]`, each in `[0, V)`.
        bias: `[V]`.
        temperature: divides the logits.
        softcap: logits become `softcap · tanh(logits / softcap)` first (Gemma).
        entropy: give the entropy too.
        reference_hidden: `[T, H]`, hidden states of a reference model with the same head (LoRA switched off): give
            KL(policy ‖ reference) too. The reference is a constant: no gradient flows into or through it.
        chunk_bytes: most bytes of logits at a time; default 32 MiB on a CPU, 1/16 of a GPU's memory. With a trainable
            head, logits that fit are kept until the backward. Where many results wait for theirs, set it low.
        backend: 'triton', 'torch', or None for the device's own.
        validate: check the range of `targets` on a GPU too, at the price of a synchronisation.

    Returns:
        `LinearLogprob`, float32 (float64 if an operand is), computed from float32 accumulators. T = 0 gives empty
        results and gradients of zeros, for any V, 0 included.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    weight, bias = gather_head(hidden, weight, bias, reference_hidden)
    transform = Transform(temperature, softcap)
    check_softmax(
        transform, targets, hidden.shape[0], weight.shape[0], hidden.device, chunk_bytes=chunk_bytes, validate=validate
    )
    options = HeadOptions(
        transform=transform,
        entropy=entropy,
        chunk_bytes=chunk_bytes,
        backend=choose_backend(hidden.device, backend, accumulator_dtype(hidden, weight)),
        grad=torch.is_grad_enabled(),
    )
    if reference_hidden is not None:
        reference_hidden = reference_hidden.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogprob(
            *_LinearLogprob.apply(hidden, weight, bias, reference_hidden, targets.contiguous(), options)
        )


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> LinearLogprob:
    """`linear_logprob` in plain torch: chunked, bounded in memory, differentiable. The path taken on a CPU."""
    return linear_logprob(hidden, weight, targets, backend="torch", **options)
