"""One definition of each formula: the engine's losses are these bit for bit, the kernel's slope is their autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import CISPO, GRPO, VESPO, policy_loss
from grpo_kernels import cispo_surrogate, clipped_surrogate, importance_weight, kl_estimate, vespo_surrogate
from grpo_kernels._backend import tl
from grpo_kernels.lm_head import _rows_triton
from grpo_kernels.lm_head.token_loss import LossConfig, token_loss
from grpo_kernels.testing.interpreter import InterpretedFunction, interpret

ESTIMATORS = ("k1", "k2", "k3")
N = 256


def tokens(seed=0):
    """Log-probs, old ones and the reference's (some equal), and advantages of either sign and 0."""
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(N, generator=g) * 5
    old = logprob + 0.5 * torch.randn(N, generator=g)
    reference = logprob + 0.3 * torch.randn(N, generator=g)
    advantages = torch.randn(N, generator=g)
    old[:9], reference[:9], advantages[5:12] = logprob[:9], logprob[:9], 0.0
    # where exponentials overflow (88.7 nats) and are bounded (88 for the ratio, 20 for k3), for each sign of A
    far = torch.tensor([-torch.inf, -1e4, -89.0, -87.9, -30.0, -20.1, -19.9, 30.0, 200.0])
    for start, advantage in ((16, 1.0), (32, -1.0), (48, 0.0)):
        advantages[start : start + 16] = advantage
        old[start : start + 8] = logprob[start : start + 8] + far[:8]
        reference[start + 8 : start + 16] = logprob[start + 8 : start + 16] - far[1:]
    return logprob, old, reference, advantages


def core(loss, old=None):
    logprob, given, _, advantages = tokens()
    old = given if old is None else old
    return policy_loss(loss, logprob, old, advantages, torch.zeros(N, dtype=torch.int64), 1).loss


def test_the_clipped_surrogate_by_hand():
    ratio, advantages = torch.tensor([0.5, 1.0, 2.0]).repeat(2), torch.tensor([1.0, -1.0]).repeat_interleave(3)
    loss = clipped_surrogate(ratio, advantages, 0.1, 0.25)
    assert loss.tolist() == pytest.approx([-0.5, -1.0, -1.25, 0.9, 1.0, 2.0])
    loss = clipped_surrogate(ratio, advantages, 0.1, 0.25, dual_clip=1.5)
    assert loss.tolist() == pytest.approx([-0.5, -1.0, -1.25, 0.9, 1.0, 1.5])


def test_the_cispo_surrogate_by_hand_and_its_ratio_is_a_constant():
    logprob, ratio = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)
    loss = cispo_surrogate(logprob, ratio, torch.tensor([1.0, -1.0]), 2.0)
    loss.sum().backward()
    assert loss.tolist() == [0.5, -4.0]
    assert logprob.grad.tolist() == [-0.5, 2.0]
    assert ratio.grad is None


def test_kl_estimates_by_hand():
    logprob, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    want = {"k1": [1.0, -1.0], "k2": [0.5, 0.5], "k3": [math.exp(-1), math.e - 2]}
    for name, values in want.items():
        assert kl_estimate(logprob, reference, name).tolist() == pytest.approx(values)


@pytest.mark.parametrize("dual_clip", [None, 1.6])
def test_the_clipped_surrogate_is_that_of_the_engine(dual_clip):
    logprob, old, _, advantages = tokens()
    mine = clipped_surrogate(importance_weight(logprob - old), advantages, 0.1, 0.28, dual_clip)
    assert torch.equal(mine, core(GRPO(epsilon=0.1, epsilon_high=0.28, delta=dual_clip)))
    config = LossConfig(clip_low=0.1, clip_high=0.28, dual_clip=dual_clip)
    assert torch.equal(mine, token_loss(logprob, None, advantages, old, None, config).loss)
    outside = ((logprob - old).exp() > 1.28) & (advantages > 0)
    assert outside.any()
    torch.testing.assert_close(mine[outside], -1.28 * advantages[outside])


@pytest.mark.parametrize("clip_low", [None, 0.1])
def test_the_cispo_surrogate_is_that_of_the_engine(clip_low):
    logprob, old, _, advantages = tokens()
    mine = cispo_surrogate(logprob, importance_weight(logprob - old), advantages, 1.4, clip_low)
    assert torch.equal(mine, core(CISPO(cispo_cap=1.4, epsilon_low=clip_low)))
    config = LossConfig(loss_type="cispo", cispo_cap=1.4, clip_low=clip_low)
    assert torch.equal(mine, token_loss(logprob, None, advantages, old, None, config).loss)
    assert ((mine == -advantages * 0.9 * logprob) & (advantages != 0)).any() == (clip_low is not None)


def test_the_vespo_surrogate_is_that_of_the_engine():
    logprob, old, _, advantages = tokens()
    index = torch.zeros(N, dtype=torch.int64)
    old = torch.where((logprob - old).abs() < 5, old, logprob)  # a product of 256 ratios, one of which is e⁸⁹
    product = (logprob - old).double().sum().float().exp().expand(N)
    mine = vespo_surrogate(logprob, product, advantages, 1.5, 2.5, 2.0, 3.0)
    theirs = core(VESPO(k_pos=1.5, lambda_pos=2.5, k_neg=2.0, lambda_neg=3.0), old)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    config = LossConfig(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=2.0, vespo_lambda_neg=3.0)
    kernels = token_loss(logprob, None, advantages, old, None, config, completion_index=index, num_completions=1)
    torch.testing.assert_close(kernels.loss, theirs, rtol=2e-4, atol=0)  # a float32 sum of 256 log-ratios
    assert (theirs != 0).any()


def test_vespo_by_hand():
    logprob = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss = vespo_surrogate(logprob, torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, -1.0]))
    assert loss.tolist() == pytest.approx([1.0, 4 * math.exp(-3), -0.125 * math.e])
    loss.sum().backward()
    assert logprob.grad.tolist() == pytest.approx([-1.0, -4 * math.exp(-3), 0.125 * math.e])
    assert vespo_surrogate(logprob, torch.full((3,), 1e38), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
def test_kl_estimates_are_those_of_the_engine_and_leave_the_reference_alone(kl_estimator):
    logprob, _, reference, _ = tokens()
    reference.requires_grad_()
    mine = kl_estimate(logprob.requires_grad_(), reference, kl_estimator)
    assert torch.equal(mine, kl_penalty(logprob, reference, kl_estimator))
    mine.sum().backward()
    assert reference.grad is None
    assert logprob.grad.abs().sum() > 0


def test_k3_keeps_its_precision_close_to_the_reference():
    difference = torch.tensor(1e-4)
    assert kl_estimate(difference, torch.tensor(0.0), "k3") == pytest.approx(5e-9, rel=1e-3)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4': choose k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def slope_kernel(
    out, logprob, old, reference, advantages, beta,
    CISPO: tl.constexpr, OLD: tl.constexpr, KL: tl.constexpr, KL_TIMES_RATIO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, SIZE)
    slope = _rows_triton.token_loss_slope(
        tl.load(logprob + i), tl.load(advantages + i), tl.load(old + i), tl.load(reference + i),
        0.1, 0.28, 1.6, 1.4, beta, CISPO, OLD, KL, KL_TIMES_RATIO,
    )  # fmt: skip
    tl.store(out + i, slope)


@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
@pytest.mark.parametrize("with_old", [True, False])
def test_the_kernels_slope_is_autograd_of_the_formulas(loss_type, with_old):
    logprob, old, reference, advantages = tokens()
    for estimator, times_ratio in itertools.product((None, *ESTIMATORS), (False, True)):
        leaf = logprob.double().requires_grad_()
        ratio = importance_weight(leaf - (old.double() if with_old else leaf.detach()))
        if loss_type == "clip":
            loss = clipped_surrogate(ratio, advantages.double(), 0.1, 0.28, 1.6)
        else:
            loss = cispo_surrogate(leaf, ratio, advantages.double(), 1.4, 0.1)
        if estimator:
            kl = kl_estimate(leaf, reference.double(), estimator)
            loss = loss + 0.3 * (kl * ratio if times_ratio else kl)
        loss.sum().backward()
        out = torch.full((N,), torch.nan)
        with interpret():
            InterpretedFunction(slope_kernel)[(1,)](
                out=out, logprob=logprob, old=old, reference=reference, advantages=advantages, beta=0.3,
                CISPO=loss_type == "cispo", OLD=with_old, KL=int(estimator[1]) if estimator else 0,
                KL_TIMES_RATIO=times_ratio, SIZE=N,
            )  # fmt: skip
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(out, leaf.grad.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "gpro"}, "unknown loss_type 'gpro'"),
        ({"kl_estimator": "k4"}, "unknown KL estimator 'k4': choose k1, k2 or k3"),
        ({"clip_low": 1.5}, "need 0 ≤ clip_low ≤ 1"),
        ({"dual_clip": 1.1}, "dual_clip must exceed 1 \\+ clip_high"),
        ({"dual_clip": math.nan}, "dual_clip must exceed 1 \\+ clip_high"),
        ({"clip_high": math.nan}, "clip_high ≥ 0"),
        ({"loss_type": "cispo", "dual_clip": 2.0}, "dual_clip = 2.0 belongs to loss_type 'clip'.*leave it out"),
        ({"loss_type": "vespo", "dual_clip": 2.0}, "dual_clip = 2.0 belongs to loss_type 'clip'.*leave it out"),
        ({"loss_type": "vespo", "clip_low": 0.2}, "clip_low = 0.2 would be ignored: leave it out"),
        ({"loss_type": "cispo", "cispo_cap": -1.0}, "cispo_cap is an absolute ratio and must exceed 1, got -1.0"),
        ({"loss_type": "cispo", "cispo_cap": 0.28}, "cispo_cap is an absolute ratio and must exceed 1, got 0.28"),
        ({"vespo_k_pos": -1.0}, "vespo_k_pos must be finite and ≥ 0"),
        ({"vespo_lambda_neg": math.inf}, "vespo_lambda_neg must be finite and above 0"),
        ({"beta": math.nan}, "beta must be finite and ≥ 0"),
        ({"beta": -0.1}, "beta must be finite and ≥ 0"),
        ({"entropy_coef": math.inf}, "entropy_coef must be finite"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        LossConfig(**options)
