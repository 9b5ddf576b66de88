"""The loss's mathematics against formulas written out a second time, in float64, one token after another."""

import math

import pytest
import torch

from grpo_core.losses import clipped_surrogate, kl_penalty, token_weights


def random_tokens(count: int = 200, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    logprob = old + 0.6 * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    return logprob.requires_grad_(), old, advantages


@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_surrogate_is_the_clipped_minimum(low, high, delta):
    logprob, old, advantages = random_tokens()
    result = clipped_surrogate(logprob, old, advantages, clip_low=low, clip_high=high, delta=delta)
    for t in range(len(old)):
        ratio = math.exp(logprob[t].item() - old[t].item())
        advantage = advantages[t].item()
        free = min(ratio, delta) if delta else ratio
        loss = -min(free * advantage, max(min(ratio, 1 + high), 1 - low) * advantage)
        assert result.loss[t].item() == pytest.approx(loss, abs=1e-12)
        assert result.clipped_low[t].item() == (ratio < 1 - low and advantage < 0)
        assert result.clipped_high[t].item() == (ratio > 1 + high and advantage > 0)


def test_a_clipped_token_gives_no_gradient_and_a_free_one_gives_ratio_times_advantage():
    logprob, old, advantages = random_tokens()
    result = clipped_surrogate(logprob, old, advantages)
    result.loss.sum().backward()
    clipped = result.clipped_low | result.clipped_high
    assert clipped.any()
    assert (logprob.grad[clipped] == 0).all()
    torch.testing.assert_close(logprob.grad[~clipped], -(result.ratio * advantages)[~clipped])


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped():
    logprob, _, advantages = random_tokens()
    result = clipped_surrogate(logprob, logprob.detach(), advantages)
    assert (result.ratio == 1).all()
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_follow_their_formulas(estimator):
    logprob, reference, _ = random_tokens(seed=1)
    d = (logprob - reference).detach()
    expected = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    torch.testing.assert_close(kl_penalty(logprob, reference, estimator).detach(), expected, atol=1e-12, rtol=1e-12)


def test_k3_is_never_negative_and_exactly_zero_for_equal_policies():
    logprob, reference, _ = random_tokens(seed=2)
    assert (kl_penalty(logprob, reference) >= 0).all()
    assert (kl_penalty(logprob.float(), logprob.detach().float()) == 0).all()


def test_k3_mean_over_the_policys_own_samples_is_the_kl():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * kl_penalty(policy.log(), reference.log())).sum(), exact)


def test_weights_average_by_sequence_by_token_or_by_constant_length():
    lengths = torch.tensor([2, 0, 3])
    index = torch.tensor([0, 0, 2, 2, 2])
    totals = {"total_completions": 6, "total_tokens": 20, "max_length": 8}
    grpo = token_weights(lengths, index, "grpo", **totals)
    torch.testing.assert_close(grpo, torch.tensor([1 / 12, 1 / 12, 1 / 18, 1 / 18, 1 / 18]))
    assert (token_weights(lengths, index, "dapo", **totals) == torch.tensor(1 / 20)).all()
    assert (token_weights(lengths, index, "dr_grpo", **totals) == torch.tensor(1 / 48)).all()


def test_unknown_names_list_the_valid_ones():
    logprob, old, _ = random_tokens(3)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(logprob, old, "k4")
    with pytest.raises(ValueError, match="grpo, dapo or dr_grpo"):
        token_weights(torch.tensor([1]), torch.tensor([0]), "ppo", total_completions=1, total_tokens=1, max_length=1)
