"""The mathematics of the loss, as pure functions on log-probabilities: the one place where it is written.

R predicted tokens of M completions are given flat, with the completion that each belongs to. A loss is
`Σ_t weight_t · loss_t`: a loss type names how a token's loss is made from its ratio (`policy_loss`) and how token
losses are averaged (`token_weights`). Weights are known before the first backward pass and count the whole optimiser
step, so that micro-batches and ranks only add up.
"""

from .corrections import off_policy_mask, sampler_correction
from .entropy import entropy_bonus, entropy_histogram, entropy_threshold
from .kl import completion_kl, kl_penalty
from .loss_types import LOSS_TYPES, LossType, token_weights
from .surrogates import Surrogate, clipped_surrogate, importance_ratio, policy_loss

__all__ = [
    "LOSS_TYPES",
    "LossType",
    "Surrogate",
    "clipped_surrogate",
    "completion_kl",
    "entropy_bonus",
    "entropy_histogram",
    "entropy_threshold",
    "importance_ratio",
    "kl_penalty",
    "off_policy_mask",
    "policy_loss",
    "sampler_correction",
    "token_weights",
]
