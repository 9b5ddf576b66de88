"""AdamW, its schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from grpo_core.config.options import OptimConfig


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over named parameters, one pass over memory a step; weight decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step`, counted from 0: linear warm-up, then the named shape down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1), 1.0)
    if config.lr_scheduler == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], lr: float, max_grad_norm: float
) -> Tensor:
    """Clip, step and clear; returns the gradient's global norm before clipping, on its device.

    A gradient that is not finite is dropped whole: the parameters stay as they were, and the norm says so.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
