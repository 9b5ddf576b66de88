"""The GRPO loss of tokens as a function of their log-probs, in torch: the one definition of each formula.

With d = logp − logp_old, r = exp(d), A the advantage and e = logp − logp_ref:

    clip    −min(min(r, c)·A, clip(r, 1 − ε_low, 1 + ε_high)·A)      PPO, clip-higher, dual clip c; GRPO's family
    cispo   −sg(clip(r, 1 − ε_low, cap))·A·logp                      MiniMax-M1 (arXiv 2506.13585); ε_low by option
    vespo   −sg(φ(w))·A·logp,   φ(w) = wᵏ exp(λ (1 − w))             VESPO (arXiv 2602.10693), w = exp(Σ d)
    k1, k2, k3    e,   e²/2,   exp(−e) + e − 1                       times β, and times r by option
    entropy       −coefficient·H

Without an old log-prob the policy is its own sampler: r = 1, and its gradient is that of logp. A completion's ratio is
exp(mean d) over its tokens (GSPO, arXiv 2507.18071), for vespo exp(Σ d), shared by all of them. Kernels have the
derivative in closed form (`_rows_triton.token_loss_slope`), which tests hold against autograd of these functions.

Exponentials are bounded where float32 would overflow, because inf · 0 is NaN and a clipped token's slope is 0: r at
d = 88 (`importance_weight`), k3 at e = −20 (`kl_estimate`). Beyond, they are constant, and have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossType = Literal["clip", "cispo", "vespo"]
KLEstimator = Literal["k1", "k2", "k3"]
LOSS_TYPES = ("clip", "cispo", "vespo")
KL_ESTIMATORS = ("k1", "k2", "k3")

LOG_RATIO_LIMIT = 88.0
"""exp(88) = 1.7e38 is float32's last whole nat. Peers stop earlier (verl, SkyRL: 20); up to here the formula holds."""
KL_LOG_RATIO_LIMIT = 20.0
"""k3 grows as exp(−e), and peers bound e at −20 (verl's low_var_kl, NeMo-RL's kl_input_clamp_value): 4.9e8 nats."""
VESPO_RANGE = (1e-8, math.exp(20.0))
"""Range of vespo's w, as in its authors' code and in TRL."""


@dataclass(frozen=True)
class LossConfig:
    """Numbers and choices of a token loss.

    Attributes:
        loss_type: `clip`, `cispo` or `vespo`.
        clip_low: ε below: a range of clip's ratio, 0.2 if None; of cispo's weight, which has no lower bound if None.
        clip_high: ε above, of clip alone.
        dual_clip: upper bound of the ratio in the unclipped branch (it acts on negative advantages); None: unbounded.
        cispo_cap: upper bound of cispo's ratio, absolute (TRL's `epsilon_high` for cispo).
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: vespo's k and λ for advantages ≥ 0 and < 0.
        beta: weight of the KL penalty.
        kl_estimator: of KL(policy ‖ reference) from the sampled token.
        kl_times_ratio: multiply the estimate by the ratio, which makes k3 unbiased in value and gradient off-policy
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`). With vespo that of the token itself.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ValueError: a value that has no meaning, NaN among them, or that this loss type would ignore.
    """

    loss_type: LossType = "clip"
    clip_low: float | None = None
    clip_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_times_ratio: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}: choose clip, cispo or vespo")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"unknown KL estimator {self.kl_estimator!r}: choose k1, k2 or k3")
        if not (0.0 <= self.lower_range <= 1.0 and self.clip_high >= 0.0):
            raise ValueError(f"need 0 ≤ clip_low ≤ 1 and clip_high ≥ 0, got {self.clip_low} and {self.clip_high}")
        if self.clip_low is not None and self.loss_type == "vespo":
            raise ValueError(f"vespo clips no ratio, so clip_low = {self.clip_low} would be ignored: leave it out")
        if self.dual_clip is not None:
            if self.loss_type != "clip":
                raise ValueError(
                    f"dual_clip = {self.dual_clip} belongs to loss_type 'clip', {self.loss_type} would ignore it: "
                    "leave it out"
                )
            if not self.dual_clip > 1.0 + self.clip_high:
                raise ValueError(f"dual_clip must exceed 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")
        if not self.cispo_cap > 1.0:  # a ratio of 1 must be free: 0.28 is an ε of an engine that adds 1
            raise ValueError(f"cispo_cap is an absolute ratio and must exceed 1, got {self.cispo_cap}")
        for name in ("vespo_k_pos", "vespo_k_neg"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and ≥ 0, got {getattr(self, name)}")
        for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if not 0.0 <= self.beta < math.inf:
            raise ValueError(f"beta must be finite and ≥ 0, got {self.beta}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")

    @property
    def lower_range(self) -> float:
        """ε_low: clip's default is 0.2, and cispo's 1, which bounds its weight at 0, where it ends anyway."""
        if self.clip_low is not None:
            return self.clip_low
        return 0.2 if self.loss_type == "clip" else 1.0


def importance_weight(log_ratio: Tensor) -> Tensor:
    """π / π_old from its logarithm, differentiable; constant above e⁸⁸, where float32 would overflow.

    A clipped token's slope is 0, and 0 times the derivative of an infinite exponential would be NaN.
    """
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped surrogate of each token, `−min(min(r, c)·A, clip(r, 1 − ε_low, 1 + ε_high)·A)`.

    Sources: PPO (arXiv 1707.06347, eq. 7); two ranges are clip-higher (DAPO, arXiv 2503.14476, eq. 10); the bound c on
    the unclipped branch is two-sided clipping (INTELLECT-2, arXiv 2505.07291). Above 1 + ε_high it acts on A < 0 alone
    and is dual clip (arXiv 1912.09729).

    Args:
        ratio: `[R]` π / π_old, differentiable.
        advantages: `[R]`.
        clip_low, clip_high: ε_low and ε_high.
        dual_clip: c; None leaves the unclipped branch unbounded.

    Returns:
        `[R]` losses, with the gradient of `ratio`.
    """
    unclipped = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(unclipped * advantages, clipped * advantages)


def cispo_surrogate(
    logprob: Tensor, ratio: Tensor, advantages: Tensor, cispo_cap: float, clip_low: float | None = None
) -> Tensor:
    """CISPO's surrogate of each token, `−sg(clip(r, 1 − ε_low, cap))·A·logp` (MiniMax-M1, arXiv 2506.13585, eq. 4, 5).

    Args:
        logprob: `[R]` log-probs under the policy, differentiable.
        ratio: `[R]` π / π_old; a weight here, so no gradient flows into it.
        advantages: `[R]`.
        cispo_cap: upper bound of the weight, absolute, as TRL's `epsilon_high` is for cispo (some engines add 1).
        clip_low: ε_low. None: no lower bound, as MiniMax trained and as TRL has it; verl, slime and SkyRL bound the
            weight at 1 − ε_low too.

    Returns:
        `[R]` losses, with the gradient of `logprob`.
    """
    weight = ratio.detach().clamp(min=None if clip_low is None else 1.0 - clip_low, max=cispo_cap)
    return -weight * advantages * logprob


def vespo_surrogate(
    logprob: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO's surrogate of each token, `−sg(φ(w))·A·logp` with `φ(w) = wᵏ exp(λ (1 − w))` (arXiv 2602.10693).

    φ(1) = 1, and φ falls on both sides: by k below, by λ above. Defaults and bounds are those of TRL's `vespo`.

    Args:
        logprob: `[R]` log-probs under the policy, differentiable.
        ratio: `[R]` w, the ratio of the token's whole completion: the product of its tokens' ratios, not their mean.
            A weight here, so no gradient flows into it.
        advantages: `[R]`.
        k_pos, lambda_pos, k_neg, lambda_neg: k and λ for advantages ≥ 0, and for those below.

    Returns:
        `[R]` losses, with the gradient of `logprob`.
    """
    weight = ratio.detach().clamp(*VESPO_RANGE)
    negative = advantages < 0
    k, rate = (
        weight.new_full(weight.shape, good).masked_fill(negative, bad)
        for good, bad in ((k_pos, k_neg), (lambda_pos, lambda_neg))
    )
    # in logarithms: wᵏ alone may be e⁶⁰ where exp(−λ w) is 0
    return -torch.exp(k * weight.log() + rate * (1.0 - weight)) * advantages * logprob


def kl_estimate(logprob: Tensor, reference_logprob: Tensor, kl_estimator: KLEstimator) -> Tensor:
    """Schulman's estimate of KL(policy ‖ reference) from each sampled token.

    With `d = logp − logp_ref`: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d (joschu.net/blog/kl-approx.html). k1 and k3 are
    unbiased on the policy's own samples, and k3 is never negative. k3 takes d at −20 for less than that, and then has
    no gradient: 4.9e8 nats are enough, and float32 would overflow at −88.7. (verl and NeMo-RL bound d likewise. They
    also cut k3 itself at 10 by default, which is 2.6 nats from the reference: that would be another penalty.)

    Args:
        logprob: `[R]`, differentiable.
        reference_logprob: `[R]`; no gradient flows into it.
        kl_estimator: 'k1', 'k2' or 'k3'.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = logprob - reference_logprob.detach()
    if kl_estimator == "k1":
        return difference
    if kl_estimator == "k2":
        return 0.5 * difference.square()
    if kl_estimator == "k3":
        difference = difference.clamp(min=-KL_LOG_RATIO_LIMIT)
        return torch.expm1(-difference) + difference  # exp(−d) − 1 would cancel for policies close to the reference
    raise ValueError(f"unknown KL estimator {kl_estimator!r}: choose k1, k2 or k3")


class TokenLoss(NamedTuple):
    """`token_loss`'s result, each `[T]`; all but `loss` and `kl` without gradient."""

    loss: Tensor
    ratio: Tensor
    """π / π_old; a completion's, with `completion_index`."""
    kl: Tensor | None
    """The estimate (before β and the ratio); None without a reference."""
    clipped_low: Tensor
    """bool: the ratio fell below 1 − ε_low at a negative advantage, so the gradient is 0 (cispo: it was raised)."""
    clipped_high: Tensor
    """bool: the ratio rose above 1 + ε_high at a positive advantage, so the gradient is 0 (cispo: it was capped)."""


def token_loss(
    logprob: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    old_logprob: Tensor | None,
    reference_logprob: Tensor | None,
    config: LossConfig,
    *,
    completion_index: Tensor | None = None,
    num_completions: int | None = None,
) -> TokenLoss:
    """Losses of T tokens, differentiable in `logprob` and `entropy`.

    Args:
        logprob, advantages, old_logprob, reference_logprob: `[T]`.
        entropy: `[T]`; needed if `config.entropy_coef` is not 0.
        completion_index, num_completions: int64 `[T]` in `[0, num_completions)`: take the ratio of each token's whole
            completion; vespo needs it.
    """
    # without an old log-prob logp − sg(logp): 0, with the gradient of logp
    log_ratio = own_log_ratio = logprob - (logprob if old_logprob is None else old_logprob).detach()
    if completion_index is not None and num_completions is not None:
        count = torch.zeros(num_completions, dtype=logprob.dtype, device=logprob.device)
        total = count.index_add(0, completion_index, log_ratio)
        count = count.index_add(0, completion_index, torch.ones_like(log_ratio))
        # vespo's is a product of ratios; a completion without rows divides by 1, not 0
        log_ratio = (total if config.loss_type == "vespo" else total / count.clamp(min=1.0))[completion_index]
    ratio = importance_weight(log_ratio)
    lowest = 1.0 - config.lower_range
    highest = {"clip": 1.0 + config.clip_high, "cispo": config.cispo_cap, "vespo": math.inf}[config.loss_type]
    clipped_low = (ratio < lowest) & (advantages < 0)
    clipped_high = (ratio > highest) & (advantages > 0)
    if config.loss_type == "cispo":
        loss = cispo_surrogate(logprob, ratio, advantages, config.cispo_cap, config.lower_range)
    elif config.loss_type == "vespo":
        k_and_lambda = config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg
        loss = vespo_surrogate(logprob, ratio, advantages, *k_and_lambda)
    else:
        loss = clipped_surrogate(ratio, advantages, config.lower_range, config.clip_high, config.dual_clip)
    kl = None
    if reference_logprob is not None:
        kl = kl_estimate(logprob, reference_logprob, config.kl_estimator)
        if config.beta and config.kl_times_ratio:
            # by vespo's product of a whole completion the penalty would be e⁸⁸ times itself: TRL takes the token's own
            own = importance_weight(own_log_ratio) if config.loss_type == "vespo" else ratio
            loss = loss + config.beta * (kl * own)
        elif config.beta:
            loss = loss + config.beta * kl
    if config.entropy_coef:
        assert entropy is not None, "entropy_coef is not 0: pass the entropy"
        loss = loss - config.entropy_coef * entropy
    return TokenLoss(loss, ratio.detach(), kl, clipped_low, clipped_high)


class LossInputs(NamedTuple):
    """What a loss takes besides the logits, each `[T]` or None."""

    weight: Tensor
    advantages: Tensor
    old_logprob: Tensor | None
    reference_logprob: Tensor | None
    completion_index: Tensor | None
    num_completions: int | None
    config: LossConfig

    @classmethod
    def checked(
        cls,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        config: LossConfig,
        loss_weight: Tensor,
        advantages: Tensor,
        old_logprob: Tensor | None,
        reference_logprob: Tensor | None,
        completion_index: Tensor | None,
        num_completions: int | None,
    ) -> LossInputs:
        """Constants of the right shape, in accumulator precision; 0 in rows of weight 0, whatever they held.

        Raises:
            ValueError: a wrong shape or device, beta without reference_logprob, one of completion_index and
                num_completions without the other, or vespo without both. TypeError: an index that is no integer.
            IndexError: an index outside `[0, num_completions)`, on a CPU.
        """
        named = {
            "loss_weight": loss_weight,
            "advantages": advantages,
            "old_logprob": old_logprob,
            "reference_logprob": reference_logprob,
            "completion_index": completion_index,
        }
        check_per_token(named, rows, device)
        if config.beta and reference_logprob is None:
            raise ValueError("beta is not 0: give reference_logprob, or set beta=0")
        if (completion_index is None) != (num_completions is None):
            raise ValueError("give completion_index and num_completions together")
        if config.loss_type == "vespo" and completion_index is None:
            raise ValueError("vespo weighs whole completions: give completion_index and num_completions")
        live = loss_weight != 0

        def constant(values: Tensor) -> Tensor:
            # a row that does not count may hold anything, and 0 · NaN is NaN. Kernels read one number a row
            return torch.where(live, values.detach().to(dtype), 0.0).contiguous()

        if completion_index is not None and num_completions is not None:
            if completion_index.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"completion_index must be int64 or int32, got {completion_index.dtype}")
            if device.type == "cpu" and live.any():  # on a GPU a bool would wait for all that is queued
                low, high = (int(bound) for bound in torch.aminmax(completion_index[live]))
                if low < 0 or high >= num_completions:
                    raise IndexError(f"completion_index must lie in [0, {num_completions}), got {low}..{high}")
            # rows of weight 0 must not enter their completion's mean: they make up one more, whose ratio nobody uses
            completion_index = torch.where(live, completion_index.long(), num_completions)
            num_completions += 1
        return cls(
            weight=constant(loss_weight),
            advantages=constant(advantages),
            old_logprob=None if old_logprob is None else constant(old_logprob),
            reference_logprob=None if reference_logprob is None else constant(reference_logprob),
            completion_index=completion_index,
            num_completions=num_completions,
            config=config,
        )

    def rows(self, rows: slice | Tensor) -> LossInputs:
        """Some of the rows."""
        return LossInputs(
            weight=self.weight[rows],
            advantages=self.advantages[rows],
            old_logprob=None if self.old_logprob is None else self.old_logprob[rows],
            reference_logprob=None if self.reference_logprob is None else self.reference_logprob[rows],
            completion_index=None if self.completion_index is None else self.completion_index[rows],
            num_completions=self.num_completions,
            config=self.config,
        )

    def without_ignored_ids(self, targets: Tensor) -> Tensor:
        """Targets with id 0 where the weight is 0: ids of ignored rows may be −100, or padding past V."""
        if targets.shape != self.weight.shape or targets.is_floating_point():
            return targets  # for `check_softmax` to refuse
        return torch.where(self.weight != 0, targets, 0)

    def loss(self, logprob: Tensor, entropy: Tensor | None) -> TokenLoss:
        """`token_loss` of these inputs."""
        return token_loss(
            logprob,
            entropy,
            self.advantages,
            self.old_logprob,
            self.reference_logprob,
            self.config,
            completion_index=self.completion_index,
            num_completions=self.num_completions,
        )

    def slopes(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """∂ Σ weight · loss / ∂ (logprob, entropy), each `[T]`; None for entropy without a coefficient."""
        with torch.enable_grad():  # called from inside an autograd Function, where recording is off
            logprob, entropy = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
            loss = self.loss(logprob, entropy).loss
            grad_logprob, grad_entropy = torch.autograd.grad(loss, (logprob, entropy), self.weight, allow_unused=True)
        return grad_logprob, grad_entropy


def check_per_token(tensors: dict[str, Tensor | None], rows: int, device: torch.device) -> None:
    """Refuse per-token tensors that are not `[rows]` on `device`.

    Raises:
        ValueError: a wrong shape or device; the message names the argument.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (rows,):
            raise ValueError(f"{name} must have shape [{rows}], one value per row, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {device}")
