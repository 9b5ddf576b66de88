"""One optimiser step: gradients summed over ranks, clipping, AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from grpo_core.config.options import OptimConfig
from grpo_core.distributed import Distributed, all_reduce_gradients


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
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    dist: Distributed,
    step: int,
    max_steps: int,
) -> tuple[Tensor, float]:
    """Sum gradients over ranks, clip, step with the scheduled learning rate, and clear.

    A gradient that is not finite, or 0 throughout, is dropped whole: parameters and moments stay as they were, and the
    norm says so. With a gradient of 0 Adam would go on in the direction of earlier steps, and weight decay would shrink
    the weights, in a step in which no completion counts.

    Args:
        step: optimiser steps made before, of `max_steps` in the run.

    Returns:
        The gradient's global norm before clipping, a scalar on its device, and the learning rate.
    """
    parameters = list(parameters)
    all_reduce_gradients(parameters, dist)
    lr = learning_rate(step, max_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(with_gradient, config.max_grad_norm if config.max_grad_norm > 0 else math.inf)
    # A wait for the device that cannot be saved: a NaN must not reach the weights. All comparisons with NaN are false.
    if 0 < norm.item() < math.inf:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, lr
