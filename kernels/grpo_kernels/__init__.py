"""Fused operations for GRPO: LM-head log-prob, group attention, decoding, sampling. Needs torch and triton alone."""

from grpo_kernels._backend import choose_backend
from grpo_kernels.attention.group_attention import group_attention
from grpo_kernels.attention.group_decode_attention import (
    GroupRows,
    group_decode_attention,
    group_decode_attention_reference,
)
from grpo_kernels.attention.spans import GroupSpans
from grpo_kernels.layers.rms_norm import rms_norm, rms_norm_reference
from grpo_kernels.layers.rope_append import rope_append, rope_append_reference
from grpo_kernels.layers.silu_mul import silu_mul, silu_mul_reference
from grpo_kernels.lm_head.from_logits import GRPOLoss, grpo_loss, grpo_loss_reference
from grpo_kernels.lm_head.grpo_loss import linear_grpo_loss, linear_grpo_loss_reference
from grpo_kernels.lm_head.logprob import LinearLogprob, linear_logprob, linear_logprob_reference
from grpo_kernels.lm_head.selective_logprob import SelectiveLogprob, selective_logprob, selective_logprob_reference
from grpo_kernels.lm_head.token_loss import cispo_surrogate, clipped_surrogate, kl_estimate
from grpo_kernels.sampling.record_tokens import RowState, record_tokens, record_tokens_reference
from grpo_kernels.sampling.sample_head import sample_head, sample_head_reference
from grpo_kernels.sampling.sample_row import SampledTokens, SampleOptions, sample_row, sample_row_reference
from grpo_kernels.testing.interpreter import interpreted, repair_bfloat16

if interpreted():  # TRITON_INTERPRET=1
    repair_bfloat16()

__all__ = [
    "GRPOLoss",
    "GroupRows",
    "GroupSpans",
    "LinearLogprob",
    "RowState",
    "SampleOptions",
    "SampledTokens",
    "SelectiveLogprob",
    "choose_backend",
    "cispo_surrogate",
    "clipped_surrogate",
    "group_attention",
    "group_decode_attention",
    "group_decode_attention_reference",
    "grpo_loss",
    "grpo_loss_reference",
    "kl_estimate",
    "linear_grpo_loss",
    "linear_grpo_loss_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "record_tokens",
    "record_tokens_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_append",
    "rope_append_reference",
    "sample_head",
    "sample_head_reference",
    "sample_row",
    "sample_row_reference",
    "selective_logprob",
    "selective_logprob_reference",
    "silu_mul",
    "silu_mul_reference",
]
