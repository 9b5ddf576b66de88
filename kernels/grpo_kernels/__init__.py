"""Fused operations for GRPO: LM-head log-prob, group attention, sampling. Needs torch and triton alone."""
