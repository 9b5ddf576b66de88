"""KL estimators against their formulas, values and gradients."""

import pytest
import torch

from grpo_core.algorithm.kl import completion_kl, kl_penalty
from grpo_core.algorithm.losses import importance_ratio
from tests.grpo_core.algorithm.tokens import INDEX, LENGTHS, random_completions, random_tokens


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


def test_gradients_of_kl_estimators_in_the_mean():
    """Over all tokens of a small vocabulary: what a penalty pulls towards, on samples of another policy `old`."""
    logits = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64, requires_grad=True)
    policy, reference, old = logits.softmax(0), torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.3, 0.4, 0.3])
    logp = policy.log()
    (reverse,) = torch.autograd.grad((policy * (policy / reference).log()).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((reference * (reference / policy).log()).sum(), logits, retain_graph=True)

    def gradient(estimator, sampled_from, ratio=None):
        penalty = kl_penalty(logp, reference.log(), estimator, ratio)
        return torch.autograd.grad((sampled_from.detach() * penalty).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient("k1", policy), torch.zeros_like(reverse), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient("k2", policy), reverse)
    torch.testing.assert_close(gradient("k3", policy), forward)
    ratio = importance_ratio(logp, old.double().log(), torch.arange(3), 3)
    torch.testing.assert_close(gradient("k3", old.double(), ratio), reverse)
    value = (old.double() * kl_penalty(logp, reference.log(), "k3", ratio)).sum()
    torch.testing.assert_close(value, (policy * (policy / reference).log()).sum())


def test_a_completions_kl_is_the_sum_over_its_tokens():
    logprob, reference, _ = random_completions()
    for estimator in ("k1", "k2", "k3"):
        by_token = kl_penalty(logprob, reference, estimator).detach().split(LENGTHS)
        expected = torch.stack([tokens.sum() for tokens in by_token])
        result = completion_kl(logprob, reference, INDEX, len(LENGTHS), estimator)
        assert not result.requires_grad
        torch.testing.assert_close(result, expected)
