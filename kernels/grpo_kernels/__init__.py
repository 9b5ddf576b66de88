"""Fused operations for GRPO: LM-head log-prob, group attention, sampling. Needs torch and triton alone."""

from grpo_kernels.group_attention import group_attention
from grpo_kernels.linear_logprob import LinearLogprob, linear_logprob, linear_logprob_reference
from grpo_kernels.spans import GroupSpans

__all__ = [
    "GroupSpans",
    "LinearLogprob",
    "group_attention",
    "linear_logprob",
    "linear_logprob_reference",
]
