"""Every option of a run, as dataclasses: what may be set, what it means, and which combinations are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from grpo_core.algorithm import AlgorithmConfig


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    group_size: int = 8
    """G, completions per prompt. Advantages compare the members of a group, so training needs at least 2."""
    max_new_tokens: int = 64
    """Longest completion, in tokens, the stop token included."""
    temperature: float = 1.0
    """Softmax temperature of the policy, in sampling and in the loss alike. 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with at least this probability. 1 is off."""
    top_k: int = 0
    """Sample among the k most probable tokens. 0 is off."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one. 0 is off."""
    repetition_penalty: float = 1.0
    """Divide (multiply, if negative) the logits of tokens that were already generated. 1 is off."""
    stop_strings: tuple[str, ...] = ()
    """End a completion when its text contains one of these; the end-of-sequence token always ends it."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size is {self.group_size}: set it to 1 or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens is {self.max_new_tokens}: set it to 1 or more")
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature is {self.temperature}: set it to 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}: set it above 0 and at most 1 (1 is off)")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"rollout.min_p is {self.min_p}: set it in [0, 1) (0 is off)")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k is {self.top_k}: set it to 0 (off) or above")
        if self.repetition_penalty <= 0:
            raise ValueError(f"rollout.repetition_penalty is {self.repetition_penalty}: set it above 0 (1 is off)")


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (biases, norms and other vectors are not decayed)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = 1e-8
    """AdamW's ε."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this. 0 is off."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at 0 on the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens packed into one forward and backward; groups are accumulated until the step is whole."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"optim.learning_rate is {self.learning_rate}: set it to 0 or above")
        if self.max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"optim.max_tokens_per_micro_batch is {self.max_tokens_per_micro_batch}: set it to 1 or more"
            )


@dataclass
class RunConfig:
    """Where a run writes, and how often."""

    name: str = "run"
    """Name of the run; its files lie in output_dir/name."""
    output_dir: Path = Path("runs")
    """Folder of all runs."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    max_steps: int = 100
    """Optimiser steps (rollouts, for GRPO)."""
    prompts_per_step: int = 16
    """Prompts of one step, over all ranks."""
    eval_steps: int = 0
    """Evaluate every so many steps. 0: never within training."""
    metric_for_best_model: str = ""
    """Metric of the evaluations, such as eval/f1, higher is better: the best evaluated policy is kept and is what
    training ends with. Unset, the last one is."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations without a new best. 0: never."""
    save_steps: int = 0
    """Write a checkpoint every so many steps. 0: never within training."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Continue from the newest checkpoint of this run, when there is one."""
    check_first_step: bool = True
    """Stop the run if its first step shows that sampler and trainer disagree, that the policy is not its reference,
    that a gradient is not finite, or that a modality has no effect."""
    tensorboard: bool = False
    """Also write TensorBoard's files (needs the package tensorboard)."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.output_dir / self.name

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1:
            raise ValueError(f"run.prompts_per_step is {self.prompts_per_step}: set it to 1 or more")
        if self.early_stopping_patience and not (self.metric_for_best_model and self.eval_steps):
            raise ValueError(
                "run.early_stopping_patience needs run.metric_for_best_model and run.eval_steps: set both, or 0"
            )
        if self.keep_checkpoints < 1:
            raise ValueError(f"run.keep_checkpoints is {self.keep_checkpoints}: set it to 1 or more")


@dataclass
class GRPOConfig:
    """A GRPO run."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.rollout.group_size < 2:
            raise ValueError("rollout.group_size is 1: an advantage compares members of a group, set it to 2 or more")
        rollout = self.rollout
        if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0 or rollout.repetition_penalty != 1:
            raise ValueError(
                "rollout.top_p, top_k, min_p and repetition_penalty draw from another distribution than the policy's, "
                "whose log-probs are what ratios and gradients are made of: train with 1, 0, 0 and 1 (evaluation may "
                "set them)"
            )
        parts = self.algorithm.steps_per_generation
        if self.run.prompts_per_step < parts:
            raise ValueError(
                f"algorithm.steps_per_generation is {parts}, but a step has {self.run.prompts_per_step} prompts: raise "
                "run.prompts_per_step, or lower it"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature is 0: greedy members of a group are all the same, set it above 0")


@dataclass
class SFTConfig:
    """A supervised run (the cold start)."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))
    run: RunConfig = field(default_factory=RunConfig)
