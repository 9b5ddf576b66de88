"""Fused operations for GRPO: LM-head log-prob, group attention, sampling. Needs torch and triton alone."""

from grpo_kernels.group_attention import group_attention
from grpo_kernels.spans import GroupSpans

__all__ = ["GroupSpans", "group_attention"]
