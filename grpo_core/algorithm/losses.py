"""Define loss types: how a token's loss is computed from its ratio and advantage, and how token losses are averaged.

A loss type is a frozen dataclass registered under a name: its fields are its options (`algorithm.loss.…`), its call
computes the surrogate, and `register_loss` records its ratio level, its average and its source. docs/algorithms.md
has the table and shows how to add one.

Nothing here imports torch when the module is loaded: `--help` and a mistyped key must not wait seconds for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

from grpo_core.algorithm.completions import completion_mean, completion_sum
from grpo_core.config.fields import ConfigSection
from grpo_core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_product"]
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
Average = Literal["sequence", "token", "constant", "sum"]
AVERAGES: tuple[str, ...] = get_args(Average)


class Surrogate(NamedTuple):
    """Token losses before averaging, all `[R]`."""

    loss: Tensor
    """Differentiable in the log-probs."""
    ratio: Tensor
    """π / π_old, detached; on the sequence levels, that of the token's completion."""
    clipped_low: Tensor
    """bool: the lower clip took the gradient away (ratio < 1 − ε, advantage < 0); in cispo, the ratio was raised."""
    clipped_high: Tensor
    """bool: the upper clip took the gradient away (ratio > 1 + ε, advantage > 0); in cispo, the ratio was capped."""


class LossType(Protocol):
    """A registered loss type: an instance holds its options."""

    ratio_level: ClassVar[RatioLevel]
    """Default level of its importance ratio: see `importance_ratio`."""
    average: ClassVar[Average]
    """How token losses are averaged: see `token_weights`."""
    source: ClassVar[str]
    """The paper or code that defines it."""

    def __call__(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute token losses `[R]`; to report clipping, return (losses, clipped_low, clipped_high), masks as bool."""


LOSS_TYPES: Registry[Any] = Registry("loss type")
"""Loss types by name; each is a class that keeps `LossType`."""

Loss = TypeVar("Loss", bound=Callable[..., Any])


def register_loss(
    name: str, *, ratio: RatioLevel = "token", average: Average, source: str = ""
) -> Callable[[Loss], Loss]:
    """Register the class or function below as loss type `name`.

    A class becomes a frozen dataclass: its fields are its options. A function has none. Either is called as
    `loss(logprob=…, ratio=…, advantages=…)`, all `[R]`, and returns what `LossType.__call__` returns.

    Args:
        ratio: default level of the importance ratio, see `importance_ratio`.
        average: average of the token losses, see `token_weights`.
        source: the paper that defines it.

    Raises:
        ValueError: the name or the class is registered already, the ratio level or average is unknown, or nothing
            computes the surrogate.
    """
    for option, value, known in (("ratio", ratio, RATIO_LEVELS), ("average", average, AVERAGES)):
        if value not in known:
            raise ValueError(f"loss type {name!r}: {option} is {value!r}, choose one of {', '.join(known)}")

    def decorate(loss: Loss) -> Loss:
        # looked up in the class bodies: every class is callable by itself, to make an instance
        surrogate = _attribute(loss, "__call__") if isinstance(loss, type) else loss
        arguments = inspect.signature(surrogate).parameters if surrogate is not None else ()
        if not {"logprob", "ratio", "advantages"} <= set(arguments):
            wanted = "__call__(self, logprob, ratio, advantages)"
            if not isinstance(loss, type):
                wanted = "its three arguments logprob, ratio and advantages"
            raise ValueError(f"loss type {name!r} has no surrogate: define {wanted}, which returns the token losses")
        if "ratio_level" in vars(loss):  # the second name would change the ratio level and average of the first
            raise ValueError(f"loss type {name!r}: {loss.__name__} is registered already, register a subclass of it")
        entry: Any = loss
        if not isinstance(loss, type):
            # a function becomes a class without options, so that configs and messages treat both alike
            body = {"__call__": staticmethod(loss), "__doc__": loss.__doc__, "__module__": loss.__module__}
            entry = make_dataclass(loss.__name__, [], frozen=True, namespace=body)
        elif "__dataclass_fields__" not in vars(loss):  # also where a base has them: this class may add options
            entry = dataclass(frozen=True)(loss)
        elif not loss.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise ValueError(f"loss type {name!r}: make {loss.__name__} a @dataclass(frozen=True)")
        LOSS_TYPES.add(name, entry)
        entry.ratio_level, entry.average, entry.source = ratio, average, source
        return loss  # as written, so that a decorated function can still be called

    return decorate


def _attribute(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


# --- the loss types ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip(ConfigSection, key="algorithm.loss"):
    """PPO's clipped surrogate, −min(min(r, δ) · A, clip(r, 1 − ε, 1 + ε_high) · A)."""

    epsilon: float | None = None
    """Lower clip range: a token of negative advantage has no gradient at ratios below 1 − epsilon. Unset, the range of
    the loss type's paper."""
    epsilon_high: float | None = None
    """Upper clip range; unset, epsilon, or the range of the loss type's paper."""
    delta: float | None = None
    """Upper cap of the ratio for negative advantages (two-sided clipping); unset, off."""

    paper_range: ClassVar[tuple[float, float]] = (0.2, 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ValueError(f"algorithm.loss.epsilon is {self.epsilon}: set it between 0 and 1, or leave it out")
        if self.epsilon_high is not None and self.epsilon_high <= 0:
            raise ValueError(f"algorithm.loss.epsilon_high is {self.epsilon_high}: set it above 0, or leave it out")
        if self.delta is not None and self.delta <= 1 + self.clip_range[1]:
            raise ValueError(f"algorithm.loss.delta is {self.delta}: set it above 1 + epsilon_high, or leave it out")

    @property
    def clip_range(self) -> tuple[float, float]:
        """(clip_low, clip_high)."""
        low, high = self.paper_range
        if self.epsilon is not None:  # for both, as in TRL: the paper's upper range does not fit another epsilon
            low = high = self.epsilon
        return low, high if self.epsilon_high is None else self.epsilon_high

    def __call__(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from grpo_kernels import clipped_surrogate  # here, because it imports torch

        clip_low, clip_high = self.clip_range
        loss = clipped_surrogate(ratio, advantages, clip_low, clip_high, self.delta)
        ratio = ratio.detach()
        # the min in the formula clips a ratio only where moving it further would raise the objective
        clipped_low = (ratio < 1.0 - clip_low) & (advantages < 0)
        return loss, clipped_low, (ratio > 1.0 + clip_high) & (advantages > 0)


@register_loss("grpo", average="sequence", source="DeepSeekMath, arXiv 2402.03300")
class GRPO(Clip):
    """Clipped ratio, averaged over each completion's tokens, then over completions."""


@register_loss("bnpo", average="token", source="TRL")
class BNPO(Clip):
    """Clipped ratio, averaged over all tokens; TRL counts those of a micro-batch, we those of the whole step."""


@register_loss("dapo", average="token", source="DAPO, arXiv 2503.14476")
class DAPO(Clip):
    """Clipped ratio with a higher upper range (0.2, 0.28), averaged over all tokens of the step."""

    paper_range = (0.2, 0.28)


@register_loss("dr_grpo", average="constant", source="Dr. GRPO, arXiv 2503.20783")
class DrGRPO(Clip):
    """Clipped ratio, summed and divided by completions × rollout.max_new_tokens, so that length has no weight."""


@register_loss("gspo", ratio="sequence", average="sequence", source="GSPO, arXiv 2507.18071, eq. 5")
class GSPO(Clip):
    """Clipped ratio of whole completions (range 3e-4, 4e-4), averaged over completions."""

    # a sequence's ratio is a mean over its tokens, which varies a thousand times less than a token's
    paper_range = (3e-4, 4e-4)


@register_loss("gspo_token", ratio="sequence_token", average="sequence", source="GSPO, arXiv 2507.18071, eq. 13")
class GSPOToken(GSPO):
    """As gspo, with the gradient of each token's ratio."""


@register_loss("cispo", average="token", source="MiniMax-M1, arXiv 2506.13585")
@dataclass(frozen=True)
class CISPO(ConfigSection, key="algorithm.loss"):
    """Log-probs weighted by the capped ratio, so that no token loses its gradient; averaged over all tokens."""

    cispo_cap: float = 5.0  # ScaleRL's, arXiv 2510.13786
    """Cap of the ratio, absolute as TRL's epsilon_high is for cispo (some engines add 1)."""
    epsilon_low: float | None = None
    """Lower clamp: ratios below 1 − epsilon_low are raised to it (the paper's ε_low; verl's clip_ratio_low, slime's
    eps_clip, 1 − NeMo-RL's ratio_clip_min); unset, none, as MiniMax trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cispo_cap > 1:
            raise ValueError(f"algorithm.loss.cispo_cap is {self.cispo_cap}: set it above 1")
        if self.epsilon_low is not None and not 0 < self.epsilon_low < 1:
            raise ValueError(
                f"algorithm.loss.epsilon_low is {self.epsilon_low}: set it between 0 and 1, or leave it out"
            )

    def __call__(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from grpo_kernels import cispo_surrogate

        loss = cispo_surrogate(logprob, ratio, advantages, self.cispo_cap, self.epsilon_low)
        ratio = ratio.detach()
        lowest = 0.0 if self.epsilon_low is None else 1.0 - self.epsilon_low
        return loss, (ratio < lowest) & (advantages < 0), (ratio > self.cispo_cap) & (advantages > 0)


@register_loss("sapo", average="sequence", source="SAPO, arXiv 2511.20347")
@dataclass(frozen=True)
class SAPO(ConfigSection, key="algorithm.loss"):
    """A smooth gate in place of the clip, −(4 / τ) · σ(τ · (r − 1)) · A; averaged as grpo."""

    temperature_pos: float = 1.0
    """Steepness τ of the gate for positive advantages."""
    temperature_neg: float = 1.05  # above the positive one: a negative advantage raises all unsampled tokens' logits
    """Steepness τ for all other advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature_pos", "temperature_neg"):
            if getattr(self, name) <= 0:
                raise ValueError(f"algorithm.loss.{name} is {getattr(self, name)}: set it above 0")

    def __call__(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        temperature = ratio.new_full(ratio.shape, self.temperature_neg)
        temperature = temperature.masked_fill(advantages > 0, self.temperature_pos)
        return -4.0 / temperature * (temperature * (ratio - 1.0)).sigmoid() * advantages


@register_loss("vespo", ratio="sequence_product", average="token", source="VESPO, arXiv 2602.10693")
@dataclass(frozen=True)
class VESPO(ConfigSection, key="algorithm.loss"):
    """Log-probs weighted by φ(w) = wᵏ exp(λ (1 − w)) of the whole completion's ratio w; averaged over all tokens."""

    k_pos: float = 2.0
    """k for advantages ≥ 0: how fast completions that have become less likely lose weight."""
    lambda_pos: float = 3.0
    """λ for advantages ≥ 0: how fast completions that have become more likely lose weight."""
    k_neg: float = 3.0
    """k for negative advantages."""
    lambda_neg: float = 2.0
    """λ for negative advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k_pos", "k_neg"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"algorithm.loss.{name} is {getattr(self, name)}: set it to 0 or more")
        for name in ("lambda_pos", "lambda_neg"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"algorithm.loss.{name} is {getattr(self, name)}: set it above 0")

    def __call__(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        from grpo_kernels import vespo_surrogate

        return vespo_surrogate(logprob, ratio, advantages, self.k_pos, self.lambda_pos, self.k_neg, self.lambda_neg)


@register_loss("luspo", ratio="sequence", average="sum", source="LUSPO, arXiv 2602.05261")
class LUSPO(GSPO):
    """As gspo, without the division by length."""


# --- their use ---------------------------------------------------------------------------------------------------


def policy_loss(
    loss: LossType,
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    completion_index: Tensor,
    num_completions: int,
    *,
    ratio_level: RatioLevel | None = None,
) -> Surrogate:
    """Compute the losses of tokens under a loss type, before averaging.

    Args:
        loss: an instance of a registered loss type, `AlgorithmConfig.loss`.
        logprob: `[R]` log-probability of each token under the policy.
        old_logprob: `[R]` the same under the weights that sampled; no gradient flows into it.
        advantages: `[R]`.
        completion_index: int64 `[R]`, each token's completion, in `[0, num_completions)`.
        ratio_level: replaces the loss type's default.

    Raises:
        ValueError: an unknown ratio level.
    """
    level = ratio_level or loss.ratio_level
    ratio = importance_ratio(logprob, old_logprob, completion_index, num_completions, level)
    result = loss(logprob=logprob, ratio=ratio, advantages=advantages)
    ratio = ratio.detach()
    if isinstance(result, tuple):
        token_loss, clipped_low, clipped_high = result
        return Surrogate(token_loss, ratio, clipped_low, clipped_high)
    never = ratio.new_zeros(ratio.shape).bool()
    return Surrogate(result, ratio, never, never)


def importance_ratio(
    logprob: Tensor,
    old_logprob: Tensor,
    completion_index: Tensor,
    num_completions: int,
    level: RatioLevel = "token",
) -> Tensor:
    """Compute π / π_old of each token, `[R]`, differentiable in `logprob`.

    With `d_t = logp_t − logp_old_t`: token `exp(d_t)`; sequence `s = exp(mean d over the completion)` (GSPO, arXiv
    2507.18071, eq. 7), the same for all its tokens; sequence_token `sg(s) · π_t / sg(π_t)` (eq. 14): the value of the
    sequence's ratio with the gradient of the token's; sequence_product `exp(Σ d over the completion)`, the completion's
    own ratio without the division by length (VESPO). Above e⁸⁸ a ratio is constant (`grpo_kernels.importance_weight`).

    Args:
        logprob, old_logprob: `[R]`; no gradient flows into the old one.
        completion_index: int64 `[R]`, each token's completion, in `[0, num_completions)`.

    Raises:
        ValueError: the level is unknown.
    """
    from grpo_kernels import importance_weight

    log_ratio = logprob - old_logprob.detach()
    if level == "token":
        return importance_weight(log_ratio)
    if level not in RATIO_LEVELS:
        raise ValueError(f"unknown ratio level {level!r}: choose one of {', '.join(RATIO_LEVELS)}")
    reduce = completion_sum if level == "sequence_product" else completion_mean
    sequence = reduce(log_ratio, completion_index, num_completions).to(logprob.dtype)[completion_index]
    if level == "sequence_token":
        # added in log space, where logprob − sg(logprob) is exactly 0: the value stays the sequence's to the last bit
        sequence = sequence.detach() + (logprob - logprob.detach())
    return importance_weight(sequence)


def token_weights(
    completion_lengths: Tensor,
    completion_index: Tensor,
    average: Average,
    *,
    total_completions: int,
    total_tokens: int,
    max_length: int,
    completion_weights: Tensor | None = None,
) -> Tensor:
    """Compute the weight of each token's loss, float32 `[R]`; totals are those of the optimiser step, over all ranks.

    By `average`, for a token of completion i, of L_i tokens, among M completions and T tokens:
    sequence `1 / (M · L_i)`; token `1 / T`; constant `1 / (M · L_max)`; sum `1 / M`.

    Args:
        completion_lengths: int64 `[M_local]`, tokens of each completion in `completion_index`'s numbering.
        completion_index: int64 `[R]`, the completion that a token belongs to.
        average: of the loss type, `AlgorithmConfig.loss.average`.
        total_completions: M, with those of weight 0.
        total_tokens: T, without the tokens of completions of weight 0.
        max_length: L_max, the longest completion that can be sampled.
        completion_weights: `[M_local]`, a further factor for all tokens of a completion: 0 leaves it out, e.g. because
            it was cut off at `max_length` (`mask_truncated_completions`).

    Raises:
        ValueError: an unknown average.
    """
    if average not in AVERAGES:
        raise ValueError(f"unknown average of token losses {average!r}: choose one of {', '.join(AVERAGES)}")
    lengths = completion_lengths.double()  # M · L_max may exceed 2^24, beyond which float32 skips integers
    if average == "sequence":
        # a completion without tokens gives its weight to none, but its 1 / 0 would still be computed
        weights = 1.0 / (total_completions * lengths.clamp(min=1.0))
    else:
        count = {"token": total_tokens, "constant": total_completions * max_length, "sum": total_completions}[average]
        weights = lengths.new_full(lengths.shape, 1.0 / max(count, 1))  # a step may be left without tokens
    if completion_weights is not None:
        weights = weights * completion_weights
    return weights.float()[completion_index]
