"""GRPO loss of an LM head: loss, per-token statistics and gradients in three GEMMs and one in-place pass.

    logits = hidden · weightᵀ            fp32 accumulators, at most `chunk_bytes` of them at a time
    dz     ← over the logits             statistics, the token's slope, the gradient: one launch (`_rows`)
    dhidden = dz · weight,  dweight = dzᵀ · hidden

A token's slope needs nothing but its own log-prob (and entropy), which are known once its row has been read; so the
gradient can be had in the forward, and no logits are kept or computed twice. A frozen head leaves two GEMMs. Ratios of
whole completions (GSPO) are known only after their last row: statistics first, then a second pass, which recomputes
logits only where they did not fit into one chunk.

Bytes beside the GEMMs, per token: V·(4 + 4 + 2) with half-precision operands. fp32 logits are read twice (the rows in
flight on a large GPU exceed its L2), and the half-precision gradient is written. Figures: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels._backend import GRAPH_BREAK, Backend, accumulator_dtype, choose_backend
from grpo_kernels.lm_head._gemm import Head, HeadGradients, gather_head
from grpo_kernels.lm_head._rows import HeadOptions, RowStatistics, Transform, check_softmax, head_rows
from grpo_kernels.lm_head.from_logits import GRPOLoss, loss_pass, with_gradients
from grpo_kernels.lm_head.token_loss import KLEstimator, LossConfig, LossInputs, LossType


@torch.compiler.disable(reason=GRAPH_BREAK)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    live_rows: int | None = None,
    chunk_bytes: int | None = None,
    backend: Backend | None = None,
    validate: bool = False,
) -> GRPOLoss:
    """`Σ_t loss_weight_t · (surrogate_t + β·kl_t − entropy_coef·H_t)`, its gradients computed along with it.

    Args:
        hidden: `[T, H]`, the rows that predict `targets`.
        weight: `[V, H]`. If it needs no gradient, none is computed.
        targets: int64 or int32 `[T]`, each in `[0, V)` where `loss_weight` is not 0.
        advantages: `[T]`, one per token (a sequence's advantage repeated).
        loss_weight: `[T]`; what distinguishes grpo, dapo, dr_grpo and bnpo. 1/(M·L_i): mean over sequences of the mean
            over tokens; 1/ΣL: mean over tokens; 1/(M·L_max): Dr. GRPO. 0 leaves a row out, before the first GEMM. A
            loss scale belongs here too: with an upstream gradient of 1 the backward touches nothing.
        old_logprob: `[T]` under the policy that sampled; None: the policy is on its own samples (ratio 1).
        reference_logprob: `[T]` under the reference; needed if beta is not 0.
        loss_type: 'clip', 'cispo' or 'vespo'; `token_loss` has the formulas.
        clip_low, clip_high, dual_clip, cispo_cap, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, beta,
            kl_estimator, kl_times_ratio, entropy_coef: as in `LossConfig`.
        completion_index, num_completions: int64 `[T]` in `[0, num_completions)`: ratios of whole completions (GSPO;
            vespo needs them), over rows of weight ≠ 0.
        temperature, softcap, bias, chunk_bytes, backend, validate: as in `linear_logprob`.
        live_rows: how many weights are not 0, if the host knows. On a CPU they are counted. On a GPU counting them
            would synchronise: without this number, rows of weight 0 skip the pass but not the GEMMs.

    Returns:
        `GRPOLoss`.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit each other; the message says which and why.
    """
    weight, bias = gather_head(hidden, weight, bias)
    rows = hidden.shape[0]
    inputs = LossInputs.checked(
        rows,
        hidden.device,
        accumulator_dtype(hidden, weight),
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
        loss_weight=loss_weight,
        advantages=advantages,
        old_logprob=old_logprob,
        reference_logprob=reference_logprob,
        completion_index=completion_index,
        num_completions=num_completions,
    )
    live, skipped = _live_rows(inputs.weight, live_rows), None
    if live is not None:  # rows of weight 0 go before the first GEMM
        hidden, targets, inputs = hidden[live], targets[live], inputs.rows(live)
    elif hidden.device.type != "cpu" or bool((inputs.weight == 0).any()):  # a GPU is not asked: it would synchronise
        # their gradient is 0, but times a state of NaN it would be NaN in the whole weight's
        skipped, hidden = inputs.weight, torch.where((inputs.weight != 0)[:, None], hidden, 0.0)
    targets = inputs.without_ignored_ids(targets)
    transform = Transform(temperature, softcap)
    check_softmax(
        transform, targets, hidden.shape[0], weight.shape[0], hidden.device, chunk_bytes=chunk_bytes, validate=validate
    )
    options = HeadOptions(
        transform=transform,
        entropy=True,
        chunk_bytes=chunk_bytes,
        backend=choose_backend(hidden.device, backend, inputs.weight.dtype),
    )

    def compute(needs: Sequence[bool]) -> tuple[GRPOLoss, Sequence[Tensor | None]]:
        head = Head(hidden, weight, options.backend)
        stats = RowStatistics.empty(hidden.shape[0], hidden.device, head.accumulator, entropy=True, kl=False)
        gradients = HeadGradients(head, hidden, bias, *needs)  # needs: of hidden, weight and bias, as `inputs` below
        result = loss_pass(
            lambda saved: head_rows(head, hidden, bias, targets, stats, options, saved=saved, weight=skipped),
            stats,
            inputs,
            add_gradient=gradients.add if any(needs) else None,
        )
        return result, gradients.results()

    with torch.autocast(hidden.device.type, enabled=False):  # it would round operands and accumulators alike
        result = with_gradients(compute, hidden, weight, bias)
    if live is None:
        return result
    # back to T rows; those left out are 0
    return result.map_tokens(lambda x: x.new_zeros(rows).index_copy_(0, live, x))


def linear_grpo_loss_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, **options: Any
) -> GRPOLoss:
    """`linear_grpo_loss` in plain torch: chunked and bounded in memory. The path taken on a CPU."""
    return linear_grpo_loss(hidden, weight, targets, advantages, backend="torch", **options)


def _live_rows(loss_weight: Tensor, count: int | None) -> Tensor | None:
    """Indices of the rows that count, or None to keep all rows. Synchronises with no device."""
    if loss_weight.device.type == "cpu":
        live = loss_weight.nonzero()[:, 0]
        if count not in (None, live.shape[0]):
            raise ValueError(f"live_rows is {count}, but {live.shape[0]} loss weights are not 0")
        return None if live.shape[0] == loss_weight.shape[0] else live
    # nonzero() would copy the count to the host; with the size given, indices stay on the device
    return None if count is None else torch.nonzero_static(loss_weight, size=count)[:, 0]
