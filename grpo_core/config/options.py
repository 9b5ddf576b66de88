"""Options of a run as dataclasses: what may be set, what it means, and which combinations are refused.

`--help` prints fields in the order of this file, most used first. Nothing here may import torch: `--help` and a
mistyped key must not wait seconds for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from grpo_core.algorithm.losses import LOSS_TYPES, RATIO_LEVELS, Clip, LossType, RatioLevel
from grpo_core.algorithm.off_policy import SAMPLER_CORRECTIONS
from grpo_core.config.fields import ConfigSection, chosen_by, option, plugin_files
from grpo_core.storage.trackers import TRACKERS


@dataclass
class RolloutConfig(ConfigSection, key="rollout"):
    """Sampling of completions."""

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
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size is {self.group_size}: set it to 1 or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens is {self.max_new_tokens}: set it to 1 or more")
        # beyond these every distribution is uniform or certain in float32, and no log-prob has a gradient
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(
                f"rollout.temperature is {self.temperature}: set it near 1 (from 0.001 to 1000), or to 0 (greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}: set it above 0 and at most 1 (1 is off)")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"rollout.min_p is {self.min_p}: set it in [0, 1) (0 is off)")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k is {self.top_k}: set it to 0 (off) or above")
        if self.repetition_penalty <= 0:
            raise ValueError(f"rollout.repetition_penalty is {self.repetition_penalty}: set it above 0 (1 is off)")


@dataclass
class AlgorithmConfig(ConfigSection, key="algorithm"):
    """The objective. Formulas and sources: docs/algorithms.md."""

    loss_type: str = option("dapo", choices=LOSS_TYPES)
    """How a token's loss is made from its ratio, and how token losses are averaged; see docs/algorithms.md."""
    loss: LossType = chosen_by("loss_type")
    """Options of the loss type."""
    beta: float = 0.0
    """Weight of the KL penalty. 0 also skips the reference pass."""
    kl_estimator: str = option("k3", choices=("k1", "k2", "k3", "full"))
    """Estimator of KL(policy ‖ reference) from the sampled tokens; full is no estimate but the sum over the
    vocabulary, with gradient, and needs an LM head that is not trained."""
    scale_rewards: str = option("group", choices=("group", "batch", "none"))
    """Divide advantages by the standard deviation of their group, of all rewards of the step, or only centre them. In
    a group of two, group makes every difference ±0.7, however small it is: take batch or none there."""
    baseline: str = option("mean", choices=("mean", "leave_one_out"))
    """What a reward is compared with: the mean of its group, or of the group's other members."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each reward by name; a reward that is not named weighs 1."""
    multi_objective_aggregation: str = option(
        "sum_then_normalize", choices=("sum_then_normalize", "normalize_then_sum")
    )
    """Sum the weighted rewards before advantages are made, or make advantages of each reward and sum those (GDPO)."""
    num_iterations: int = 1
    """μ, passes over each rollout."""
    steps_per_generation: int = 1
    """Optimiser steps in a pass, each on its own share of the rollout's groups."""
    mask_truncated_completions: bool = False
    """Leave completions that reached rollout.max_new_tokens out of the loss."""
    dynamic_sampling: bool = False
    """Train on groups whose rewards differ, as far as reserve_prompts gives enough of them."""
    reserve_prompts: int = 0
    """Prompts sampled in a step beyond run.prompts_per_step, over all ranks, for dynamic_sampling to choose from."""
    importance_sampling_level: str | None = option(None, choices=RATIO_LEVELS)
    """Level of the importance ratio: a token's, its completion's, or the completion's value with the token's gradient.
    Unset, the loss type's default."""
    entropy_coef: float = 0.0
    """Weight of the mean token entropy, as a bonus; with entropy_target, where the adaptive weight starts."""
    entropy_target: float | None = None
    """Pay the bonus only after steps whose entropy, in nats per token, was at or below this, and adapt its weight."""
    entropy_coef_delta: float = 0.005
    """Change of the adaptive weight per step."""
    entropy_coef_min: float = 0.0
    """Smallest adaptive weight."""
    entropy_coef_max: float = 1.0
    """Largest adaptive weight."""
    top_entropy_quantile: float = 1.0
    """Share of a step's tokens, the most uncertain ones, whose policy loss counts. 1 is off."""
    sampler_correction: str = option("none", choices=("none", *SAMPLER_CORRECTIONS))
    """Weight the loss by the probability of a token, or a completion, under the trainer over that under the sampler;
    truncate clamps the weight into the bounds below, mask makes it 0 outside."""
    sampler_low: float = 0.0
    """Lower bound of sampler_correction's weight."""
    sampler_high: float = 3.0
    """Upper bound of sampler_correction's weight."""
    off_policy_mask_threshold: float | None = None
    """Drop completions of negative advantage that have become this much less likely since they were sampled, in nats
    per token; unset, off."""
    beta_end: float | None = None
    """β of the last step, with beta_schedule; unset, β is constant."""
    beta_schedule: str = option("linear", choices=("linear", "cosine"))
    """Shape of the schedule from beta to beta_end."""
    kl_target: float | None = None
    """Adapt β so that the KL, in nats per token, stays near this; unset, off."""
    kl_horizon: float = 10_000.0  # as in lm-human-preferences, the code of arXiv 1909.08593
    """Completions in which an adaptive β can grow or fall by a fifth."""
    kl_in: str = option("loss", choices=("loss", "reward"))
    """Where the penalty is applied: added to every token's loss, or subtracted from a completion's reward (usually as
    k1)."""
    unbiased_kl: bool = False
    """Multiply k3 by the ratio, which makes its gradient that of the reverse KL."""
    reference: str = option("frozen", choices=("frozen", "adapter_off"))
    """The policy that KL is measured against: the trained parameters as they were when training began (with LoRA, a
    copy of the adapter), or the base model with its adapters off. After a cold start, which lives in the adapter, the
    two differ."""
    reference_offload: bool = option(False, free=True)
    """Keep the frozen copy in host memory, and swap it with the policy's weights for the reference pass."""
    ref_model_sync_steps: int = 0
    """Move the frozen reference towards the policy every N steps; 0 disables."""
    ref_model_mixup_alpha: float = 1.0
    """Share of the policy in the moved reference: 1 replaces it, less makes it an exponential moving average."""

    @property
    def ratio_level(self) -> RatioLevel:
        """Level of the importance ratio in the loss: the option's if set, or the loss type's default."""
        # checked against RATIO_LEVELS, which a type checker cannot see
        return self.importance_sampling_level or self.loss.ratio_level  # type: ignore[return-value]

    def __post_init__(self) -> None:
        super().__post_init__()
        # combinations are refused here, in the first second, and not where they would first matter, in the first step
        self._check_loss()
        self._check_entropy()
        self._check_kl()
        if self.num_iterations < 1:
            raise ValueError(f"algorithm.num_iterations is {self.num_iterations}: set it to 1 or more")
        if self.steps_per_generation < 1:
            raise ValueError(f"algorithm.steps_per_generation is {self.steps_per_generation}: set it to 1 or more")
        if self.dynamic_sampling != (self.reserve_prompts > 0):
            raise ValueError(
                f"algorithm.dynamic_sampling is {self.dynamic_sampling} and reserve_prompts {self.reserve_prompts}: "
                "dynamic sampling needs a reserve above 0, and a reserve has no other use: set both or neither"
            )
        # GDPO fixes both scales, so another one could only be ignored
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ValueError(
                "algorithm.multi_objective_aggregation normalize_then_sum scales each reward in its group and the sum "
                "over the step: leave scale_rewards at group"
            )

    def _check_loss(self) -> None:
        # 0.01 lies between the papers' ranges on these levels (4e-4) and on tokens (0.2), far from both
        if isinstance(self.loss, Clip) and self.ratio_level != "token" and max(self.loss.clip_range) > 0.01:
            warnings.warn(
                f"algorithm.loss.epsilon is {self.loss.clip_range[0]} with loss_type {self.loss_type}, whose ratio is "
                "a mean over tokens and hardly moves: its paper has 3e-4 and 4e-4",
                stacklevel=4,  # the line that makes the config: above this check, __post_init__ and __init__
            )
        if not 0 <= self.sampler_low < self.sampler_high:
            raise ValueError(
                f"algorithm.sampler_low is {self.sampler_low} and sampler_high {self.sampler_high}: set the lower one "
                "to 0 or above, and below the other"
            )

    def _check_entropy(self) -> None:
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"algorithm.top_entropy_quantile is {self.top_entropy_quantile}: set it above 0 and at most 1 (off)"
            )
        if self.entropy_target is not None and not (
            0 <= self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max and self.entropy_coef_delta > 0
        ):
            raise ValueError(
                "algorithm.entropy_target adapts entropy_coef: set entropy_coef_min ≤ entropy_coef ≤ entropy_coef_max "
                "and entropy_coef_delta above 0"
            )

    def _check_kl(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"algorithm.beta is {self.beta}: set it to 0 (no reference) or above, and finite")
        # the ratio does not improve k1 and k2; in the reward only the value counts, so there is no gradient to correct
        if self.unbiased_kl and (self.kl_estimator != "k3" or self.kl_in == "reward"):
            raise ValueError("algorithm.unbiased_kl multiplies k3 in the loss by the ratio: set kl_estimator to k3")
        if self.kl_in == "reward" and self.kl_estimator == "full":
            raise ValueError("algorithm.kl_in is reward, where the KL is summed over sampled tokens: not full, but k1")
        if self.kl_in == "reward" and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "algorithm.kl_in is reward, but normalize_then_sum has no sum to subtract it from: set it to loss"
            )
        if self.kl_target is not None and self.beta_end is not None:
            raise ValueError("algorithm.kl_target and beta_end both steer beta: set one of them")
        for key, wanted in (
            ("kl_target", self.kl_target is not None),
            ("beta_end", self.beta_end is not None),
            ("kl_in", self.kl_in == "reward"),
            ("ref_model_sync_steps", self.ref_model_sync_steps > 0),
            ("reference_offload", self.reference_offload),
        ):
            if wanted and self.beta == 0:  # refused rather than ignored: the run would silently have no KL
                raise ValueError(f"algorithm.{key} is set, but beta is 0, so there is no reference: set beta above 0")
        if self.beta_end is not None and self.beta_end < 0:
            raise ValueError(f"algorithm.beta_end is {self.beta_end}: set it to 0 or above")
        if self.kl_target is not None and min(self.kl_target, self.kl_horizon) <= 0:
            raise ValueError("algorithm.kl_target and kl_horizon: set both above 0")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"algorithm.ref_model_mixup_alpha is {self.ref_model_mixup_alpha}: set it above 0 and at most 1"
            )
        if self.reference == "adapter_off" and (self.ref_model_sync_steps or self.reference_offload):
            raise ValueError(
                "algorithm.reference is adapter_off, the base model itself: ref_model_sync_steps and "
                "reference_offload are for a frozen copy"
            )


@dataclass
class OptimConfig(ConfigSection, key="optim"):
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
    """Clip the global gradient norm to this; 0 disables."""
    lr_scheduler: str = option("constant", choices=("constant", "linear", "cosine"))
    """Shape of the learning rate after warm-up; linear and cosine end at 0 on the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    max_tokens_per_micro_batch: int = option(16384, free=True)
    """Tokens packed into one forward and backward; groups are accumulated until the step is whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{self.config_key}.{name} is {getattr(self, name)}: set it to 0 or above, and finite")
        if self.learning_rate > 0.1:
            warnings.warn(
                f"optim.learning_rate is {self.learning_rate}: AdamW moves each weight by about that much in a step, "
                "and is used with 1e-6 to 1e-2",
                stacklevel=3,
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}: set both in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optim.eps is {self.eps}: set it above 0, and finite")
        if self.max_grad_norm < 0:
            raise ValueError(f"optim.max_grad_norm is {self.max_grad_norm}: set it to 0 (off) or above")
        if self.max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"optim.max_tokens_per_micro_batch is {self.max_tokens_per_micro_batch}: set it to 1 or more"
            )


def _without_schedules(config: Any) -> bool:
    """Whether no schedule of a config ends at `run.max_steps`, so that a longer run begins like a shorter one."""
    sections = list(_sections(config))
    constant = all(optim.lr_scheduler == "constant" for optim in sections if isinstance(optim, OptimConfig))
    return constant and all(a.beta_end is None for a in sections if isinstance(a, AlgorithmConfig))


def _chooses_no_best(config: Any) -> bool:
    """Whether evaluations of a config are for information alone, and choose neither a model nor an end."""
    return not any(run.metric_for_best_model for run in _sections(config) if isinstance(run, RunConfig))


def _sections(config: Any) -> Iterator[Any]:
    yield config
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            yield from _sections(value)


@dataclass
class RunConfig(ConfigSection, key="run"):
    """A run's name, folder, length and checkpoints."""

    name: str = option("run", free=True)
    """Name of the run; its files are in output_dir/name, or beside it under a number if a finished run is there.
    {seed} in it becomes run.seed."""
    output_dir: Path = option(Path("runs"), free=True)
    """Folder of all runs."""
    seed: int = 0
    """Seed of data order, sampling and initialisation, below 2³²."""
    max_steps: int = option(100, free=_without_schedules)
    """Optimiser steps (rollouts, for GRPO)."""
    prompts_per_step: int = 16
    """Prompts of one step, over all ranks."""
    eval_steps: int = option(0, free=_chooses_no_best)
    """Evaluate every N steps; 0 disables."""
    metric_for_best_model: str = ""
    """Metric of the evaluations, such as eval/f1, of which more is better: training ends with the best evaluated
    policy. Unset, it ends with the last one."""
    early_stopping_patience: int = 0
    """Stop after N evaluations without a new best; 0 disables."""
    save_steps: int = option(0, free=True)
    """Write a checkpoint every N steps, and at the end; 0 goes by save_minutes."""
    save_minutes: float = option(10.0, free=True)
    """Without save_steps, write a checkpoint after the first step that ends this long after the last one, and at the
    end. 0 disables; a signal to stop and an evaluation of metric_for_best_model save all the same."""
    keep_checkpoints: int = option(2, free=True)
    """How many of the newest checkpoints to keep."""
    resume: bool = option(True, free=True)
    """Continue the run of this name, if it is unfinished; false starts a new one beside it, under the next number."""
    accept_changes: tuple[str, ...] = option((), free=True)
    """Options in which an unfinished run may go on with other values than it began with; without, they are refused.
    docs/config.md says what each changes from there."""
    lock_timeout: float = option(30.0, free=True)
    """Seconds to wait for another process in the run's folder to end, before this one is refused."""
    check_first_step: bool = option(True, free=True)
    """Stop the run if its first step shows that sampler and trainer disagree, that the policy is not its reference,
    that a gradient is not finite, or that a modality has no effect."""
    reward_timeout: float = option(180.0, free=True)
    """Seconds that a call of a reward may take, for one completion or, if it takes all at once, for a rank's share of
    the step; 0 for no limit. After two timeouts it is not asked again in that step."""
    max_reward_failures: float = option(0.25, free=True)
    """Share of a step's completions on which a reward may raise, take too long or return no number; they are left out.
    Above it the run stops."""
    max_unjudged_steps: int = option(3, free=True)
    """Stop after N steps in a row in which no reward judged any completion; 0 never stops."""
    max_nonfinite_steps: int = option(5, free=True)
    """Stop after N steps in a row whose gradient is not finite, each of which changes nothing; 0 never stops."""
    warn_after_idle_steps: int = option(5, free=True)
    """Warn after N steps in a row that taught nothing, because all rewards were equal or all completions cut off and
    masked, or in which one reward judged nothing; 0 never warns."""
    rank_timeout: float = option(600.0, free=True)
    """Seconds that a rank waits for the others in a collective before the run ends. A checkpoint that takes longer to
    write needs more."""
    watchdog_seconds: float = option(60.0, free=True)
    """After this many seconds in one collective, say which rank is waited for and what it was doing. 0 disables."""
    trackers: tuple[str, ...] = option((), free=True)
    """Where metrics go beside metrics.jsonl: tensorboard, or a tracker that a plug-in registers."""
    plugins: tuple[Path, ...] = plugin_files()
    """Python files that register losses, rewards, dataset layouts or model families; imported before options are
    checked. --plugins FILE.py may be repeated."""

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return self.output_dir / self.name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name.replace("{seed}", str(self.seed))
        # a name and not a path: "../x" would be outside of output_dir, and "" would be output_dir itself
        if (
            not self.name.strip()
            or self.name in (".", "..")
            or set(self.name) & set("/\\")
            or not self.name.isprintable()
        ):
            raise ValueError(f"run.name is {self.name!r}: give one plain name; its folder is made in run.output_dir")
        for name, least in (
            ("max_steps", 1),
            ("prompts_per_step", 1),
            ("keep_checkpoints", 1),
            ("eval_steps", 0),
            ("save_steps", 0),
            ("save_minutes", 0),
            ("watchdog_seconds", 0),
            ("early_stopping_patience", 0),
            ("lock_timeout", 0),
        ):
            if getattr(self, name) < least:
                off = " (off)" if least == 0 else ""
                raise ValueError(f"run.{name} is {getattr(self, name)}: set it to {least}{off} or more")
        if not 0 <= self.seed < 2**32:  # numpy's range, in which libraries seed it along with torch
            raise ValueError(f"run.seed is {self.seed}: set it from 0 to {2**32 - 1}")
        if self.rank_timeout <= 0:
            raise ValueError(f"run.rank_timeout is {self.rank_timeout}: set it above 0, in seconds")
        if self.metric_for_best_model and not self.eval_steps:
            raise ValueError(
                f"run.metric_for_best_model is {self.metric_for_best_model}, and run.eval_steps is 0, so that nothing "
                "is evaluated: set run.eval_steps"
            )
        if self.early_stopping_patience and not (self.metric_for_best_model and self.eval_steps):
            raise ValueError(
                "run.early_stopping_patience needs run.metric_for_best_model and run.eval_steps: set both, or 0"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise ValueError(f"run.trackers names {name!r}, which is not a tracker: choose among {known}")
        # absolute, so that a run that is resumed from another working folder finds them
        self.plugins = tuple(path.absolute() for path in self.plugins)
        for key in ("reward_timeout", "max_unjudged_steps", "max_nonfinite_steps", "warn_after_idle_steps"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"run.{key} is {getattr(self, key)}: set it to 0 (no limit) or above")
        if not 0 <= self.max_reward_failures <= 1:
            raise ValueError(
                f"run.max_reward_failures is {self.max_reward_failures}, a share: set it from 0 (none may fail) to 1"
            )


@dataclass
class GRPOConfig(ConfigSection):
    """A GRPO run."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grpo_options(self.algorithm, self.rollout, self.run)


@dataclass
class SFTConfig(ConfigSection):
    """A supervised run (the cold start)."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))
    run: RunConfig = field(default_factory=RunConfig)


def check_grpo_options(algorithm: AlgorithmConfig, rollout: RolloutConfig, run: RunConfig) -> None:
    """Check options that have to fit across sections.

    Raises:
        ValueError: a group of one, a sampling distribution other than the policy's, or fewer prompts than optimiser
            steps.
    """
    if rollout.group_size < 2:
        raise ValueError("rollout.group_size is 1: an advantage compares members of a group, set it to 2 or more")
    if rollout.temperature == 0:
        raise ValueError("rollout.temperature is 0: greedy members of a group are all the same, set it above 0")
    # refused for training only: evaluation, which takes no gradients, may restrict the sampling distribution
    if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0 or rollout.repetition_penalty != 1:
        raise ValueError(
            "rollout.top_p, top_k, min_p and repetition_penalty draw from another distribution than the policy's, "
            "whose log-probs ratios and gradients are made of: train with 1, 0, 0 and 1 (evaluation may set them)"
        )
    if rollout.group_size == 2 and algorithm.scale_rewards == "group":
        # stacklevel 1, this line: however many configs a program makes, Python shows it once
        warnings.warn(
            "rollout.group_size is 2 with algorithm.scale_rewards group: two rewards are one standard deviation apart "
            "whatever their difference, so 0.001 of reward weighs like 1.0. Set scale_rewards to batch or none, or "
            "group_size to 4 or more",
            stacklevel=1,
        )
    # each optimiser step needs a group at least
    if run.prompts_per_step < algorithm.steps_per_generation:
        raise ValueError(
            f"algorithm.steps_per_generation is {algorithm.steps_per_generation}, but a step has "
            f"{run.prompts_per_step} prompts: raise run.prompts_per_step, or lower it"
        )
