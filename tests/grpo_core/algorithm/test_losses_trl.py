"""The same loss and gradient as TRL's GRPO trainer on the same inputs, for every loss type and correction it shares."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_core.algorithm.entropy import entropy_bonus
from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import LOSS_TYPES, importance_ratio, policy_loss, token_weights
from grpo_core.algorithm.off_policy import off_policy_mask, sampler_correction

trl = pytest.importorskip("trl.trainer.grpo_trainer")

LENGTHS = torch.tensor([6, 3, 1, 5])
M, L, MAX_LENGTH = 4, 6, 9
CLIP = {"clip_low": 0.1, "clip_high": 0.15}
CAP, TEMPERATURES, BETA = 1.3, (1.0, 1.4), 0.1
GAMMA = {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.0, "lambda_neg": 3.0}
MASK = (torch.arange(L) < LENGTHS[:, None]).long()
FLAT = MASK.bool()


@pytest.fixture(params=range(3))
def batch(request):
    """Padded `[M, L]`, in float64, with garbage in the padding."""
    g = torch.Generator().manual_seed(request.param)
    logprob = -3 * torch.rand(M, L, generator=g, dtype=torch.float64)
    noise = [0.4 * torch.randn(M, L, generator=g, dtype=torch.float64) for _ in range(3)]
    return SimpleNamespace(
        logprob=logprob,
        old=logprob + noise[0],
        reference=logprob + noise[1],
        sampler=logprob + noise[0] + noise[2],
        entropy=torch.rand(M, L, generator=g, dtype=torch.float64),
        advantages=torch.randn(M, generator=g, dtype=torch.float64),
    )


def trl_loss(batch, loss_type, level, **options):
    """(loss, gradient by log-prob) of TRL's `_compute_loss` on a stand-in for the trainer."""
    logprob = batch.logprob.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    same = lambda x, **_: x  # noqa: E731
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=same, reduce=same, num_processes=1, sync_gradients=False),
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=options.get("unbiased", False),
            steps_per_generation=1,
            sapo_temperature_pos=TEMPERATURES[0],
            sapo_temperature_neg=TEMPERATURES[1],
            vespo_k_pos=GAMMA["k_pos"],
            vespo_lambda_pos=GAMMA["lambda_pos"],
            vespo_k_neg=GAMMA["k_neg"],
            vespo_lambda_neg=GAMMA["lambda_neg"],
        ),
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=options.get("off_policy_threshold"),
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=level,
        beta=options.get("beta", 0.0),
        loss_type=loss_type,
        epsilon_low=CLIP["clip_low"],
        epsilon_high=CAP if loss_type == "cispo" else CLIP["clip_high"],
        max_completion_length=MAX_LENGTH,
        use_vllm="correction" in options,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy_coef" in options,
        entropy_coef=options.get("entropy_coef"),
        use_adaptive_entropy=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(M, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(M, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(M, L, dtype=torch.int64),
        "completion_mask": MASK,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference,
        "sampling_per_token_logps": batch.sampler,
        "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": options.get("correction"),
    }
    loss = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    return loss.detach(), logprob.grad[FLAT], None if entropy.grad is None else entropy.grad[FLAT]


def our_loss(batch, loss_type, level, **options):
    """The same from the flat functions; the padding is not there."""
    logprob = batch.logprob[FLAT].clone().requires_grad_()
    entropy = batch.entropy[FLAT].clone().requires_grad_()
    index = torch.arange(M).repeat_interleave(LENGTHS)
    old, advantages, completions = batch.old[FLAT], batch.advantages[index], (index, M)
    ours = {"epsilon": CLIP["clip_low"], "epsilon_high": CLIP["clip_high"], "delta": options.get("delta")}
    ours = {
        "cispo": {"cispo_cap": CAP},
        "sapo": {"temperature_pos": TEMPERATURES[0], "temperature_neg": TEMPERATURES[1]},
        "vespo": GAMMA,
    }.get(loss_type, ours)
    loss = policy_loss(LOSS_TYPES[loss_type](**ours), logprob, old, advantages, *completions, ratio_level=level).loss
    if "off_policy_threshold" in options:
        threshold = options["off_policy_threshold"]
        loss = loss * off_policy_mask(logprob, batch.sampler[FLAT], advantages, *completions, threshold)
    if "correction" in options:
        loss = loss * sampler_correction(old, batch.sampler[FLAT], *completions, options["correction"], high=1.5)
    if options.get("beta"):
        ratio = importance_ratio(logprob, old, *completions, level) if options.get("unbiased") else None
        loss = loss + options["beta"] * kl_penalty(logprob, batch.reference[FLAT], "k3", ratio)
    totals = {"total_completions": M, "total_tokens": int(MASK.sum()), "max_length": MAX_LENGTH}
    loss = (token_weights(LENGTHS, index, LOSS_TYPES[loss_type].average, **totals) * loss).sum()
    if "entropy_coef" in options:
        loss = loss - options["entropy_coef"] * entropy_bonus(entropy, int(MASK.sum()))
    loss.backward()
    return loss.detach(), logprob.grad, entropy.grad


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        if their is None:
            assert our is None
        else:
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize("kl", [{}, {"beta": BETA}, {"beta": BETA, "unbiased": True}], ids=["no KL", "k3", "unbiased"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo"])
def test_loss_types(batch, loss_type, level, kl, delta):
    assert_same(
        our_loss(batch, loss_type, level, delta=delta, **kl), trl_loss(batch, loss_type, level, delta=delta, **kl)
    )


@pytest.mark.parametrize("kl", [{}, {"beta": BETA}], ids=["no KL", "k3"])
def test_vespo_weighs_whole_completions(batch, kl):
    assert_same(our_loss(batch, "vespo", None, **kl), trl_loss(batch, "vespo", "token", **kl))


def test_gspo_is_grpo_on_the_sequence_level(batch):
    assert_same(our_loss(batch, "gspo", None), trl_loss(batch, "grpo", "sequence"))


def test_luspo_is_by_the_sequence_level(batch):
    assert_same(our_loss(batch, "luspo", None), trl_loss(batch, "luspo", "sequence"))


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_corrections(batch, kind):
    level, mode = kind.split("_")
    difference = (batch.old - batch.sampler) * MASK  # TRL computes this weight where it samples, not in the loss
    weight = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    weight = weight.clamp(max=1.5) if mode == "truncate" else weight.masked_fill(weight > 1.5, 0.0)
    theirs = trl_loss(batch, "dapo", "token", beta=BETA, correction=weight)
    assert_same(our_loss(batch, "dapo", "token", beta=BETA, correction=kind), theirs)


def test_off_policy_mask(batch):
    options = {"off_policy_threshold": 0.1, "beta": BETA}
    assert_same(our_loss(batch, "grpo", "token", **options), trl_loss(batch, "grpo", "token", **options))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_entropy_bonus(batch, loss_type):
    ours = our_loss(batch, loss_type, "token", entropy_coef=0.03)
    theirs = trl_loss(batch, loss_type, "token", entropy_coef=0.03)
    assert theirs[2].abs().sum() > 0
    assert_same(ours, theirs)
