"""The GRPO loss written out with `grpo_core`'s formulas in float64, and the comparison of both fused losses with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import CISPO, GRPO, VESPO, importance_ratio, policy_loss
from grpo_kernels import grpo_loss, linear_grpo_loss

from .cases import relative

T, H, V = 45, 12, 67
CLIP, CAP = {"clip_low": 0.1, "clip_high": 0.28}, 1.4
KERNEL = {  # what each loss type takes at the kernels, and the engine's loss of the same numbers
    "clip": CLIP,
    "cispo": {"clip_low": 0.1, "cispo_cap": CAP},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 3.0},
}


def batch(T=T, H=H, V=V, seed=0):
    """Hidden states, a head, targets, and per-token inputs that reach both sides of every clip; some weights are 0."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    targets = torch.randint(V, (T,), generator=g)
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return (
        hidden,
        weight,
        {
            "targets": targets,
            "advantages": torch.randn(T, generator=g),
            "loss_weight": torch.rand(T, generator=g) * (torch.rand(T, generator=g) > 0.2) / T,
            "old_logprob": logprob + 0.5 * torch.randn(T, generator=g),
            "reference_logprob": logprob + 0.3 * torch.randn(T, generator=g),
        },
    )


def written_out(
    logits, tokens, *, loss_type, dual_clip, beta, kl_estimator, kl_times_ratio, entropy_coef, completion_index=None
):
    """The loss by `grpo_core.losses` on log-probs of a plain softmax, in float64."""
    logp = torch.log_softmax(logits, -1)
    logprob = logp.gather(1, tokens["targets"][:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    old = tokens["old_logprob"].double() if tokens["old_logprob"] is not None else logprob.detach()
    advantages, weight = tokens["advantages"].double(), tokens["loss_weight"].double()
    index, level = torch.zeros_like(tokens["targets"]), "token"
    if completion_index is not None:  # a row of weight 0 belongs to no sequence
        level = "sequence_product" if loss_type == "vespo" else "sequence"
        index = torch.where(weight != 0, completion_index, completion_index.max() + 1)
    members = int(index.max()) + 1
    if loss_type == "cispo":
        core_loss = CISPO(cispo_cap=CAP, epsilon_low=CLIP["clip_low"])
    elif loss_type == "vespo":
        core_loss = VESPO(k_pos=1.5, lambda_pos=2.5, k_neg=2.0, lambda_neg=3.0)
    else:
        core_loss = GRPO(epsilon=CLIP["clip_low"], epsilon_high=CLIP["clip_high"], delta=dual_clip)
    surrogate = policy_loss(core_loss, logprob, old, advantages, index, members, ratio_level=level)
    loss = surrogate.loss
    if beta:
        level = "token" if level == "sequence_product" else level
        ratio = importance_ratio(logprob, old, index, members, level) if kl_times_ratio else None
        loss = loss + beta * kl_penalty(logprob, tokens["reference_logprob"].double(), kl_estimator, ratio)
    loss = loss - entropy_coef * entropy
    return (loss * weight).sum(), {"logprob": logprob, "entropy": entropy, "surrogate": surrogate}


KLS = [(0.0, "k3", False), *((0.1, name, times) for name in ("k1", "k2", "k3") for times in (False, True))]


MATRIX = [
    case
    for case in itertools.product(("clip", "cispo"), KLS, (True, False), (None, 1.6), (0.0, 0.05))
    if case[0] == "clip" or case[3] is None  # a dual clip is clip's alone
]


def transformed(logits, temperature=1.0, softcap=None):
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def check(case, given_logits, backend, T=T, bias=None, transform=None, **extra):
    transform = transform or {}
    loss_type, (beta, estimator, times_ratio), with_old, dual_clip, entropy_coef = case
    hidden, weight, tokens = batch(T)
    if not with_old:
        tokens["old_logprob"] = None
    options = {
        "loss_type": loss_type,
        "dual_clip": dual_clip,
        "beta": beta,
        "kl_estimator": estimator,
        "kl_times_ratio": times_ratio,
        "entropy_coef": entropy_coef,
    }
    formula = dict(options)
    options |= KERNEL[loss_type]
    scale = transform.get("temperature", 1.0)  # z = logits / temperature of one size: their rounding grows with it
    hidden, bias = hidden * scale, None if bias is None else bias * scale
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    wide = [x.double().requires_grad_() for x in inputs]
    wide_logits = wide[0] @ wide[1].T + (0.0 if bias is None else wide[2])
    if transform:  # log-probs that samplers of this very temperature would have given
        logprob = torch.log_softmax(transformed(wide_logits.detach(), **transform), -1)
        logprob = logprob.gather(1, tokens["targets"][:, None])[:, 0].float()
        for name in ("old_logprob", "reference_logprob"):
            tokens[name] = logprob + 0.4 * torch.randn(T, generator=torch.Generator().manual_seed(len(name)))
    index = extra.get("completion_index")
    want, details = written_out(transformed(wide_logits, **transform), tokens, **formula, completion_index=index)
    want.backward()
    if given_logits:
        logits = wide_logits.detach().float().requires_grad_()
        got = grpo_loss(logits, **tokens, **options, **transform, **extra, backend=backend)
        got.loss.backward()
        gradients = [(logits.grad.double() @ weight.double(), wide[0].grad)]
    else:
        leaves = [x.clone().requires_grad_() for x in inputs]
        extra |= transform | ({} if bias is None else {"bias": leaves[2]})
        got = linear_grpo_loss(*leaves[:2], **tokens, **options, **extra, backend=backend)
        got.loss.backward()
        gradients = [(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    assert float(got.loss.detach() - want.detach()) == pytest.approx(0.0, abs=2e-6)
    # a weight wᵏ exp(λ (1 − w)) multiplies the rounding of log w by k + λ w
    assert max(relative(*pair) for pair in gradients) < (4e-6 if loss_type == "vespo" else 1e-6)
    live = tokens["loss_weight"] != 0
    for name in ("logprob", "entropy"):
        assert (getattr(got, name) - details[name].detach())[live].abs().max() < 1e-5
        assert (getattr(got, name)[~live] == 0).all()
    assert torch.equal(got.clipped_low, details["surrogate"].clipped_low & live)
    assert torch.equal(got.clipped_high, details["surrogate"].clipped_high & live)
    if loss_type == "clip" and with_old and index is None and backend == "torch":
        assert got.clipped_low.any()
        assert got.clipped_high.any()
    if beta:
        kl = kl_penalty(details["logprob"].detach(), tokens["reference_logprob"].double(), estimator)
        assert (got.kl - kl)[live].abs().max() < 1e-5
