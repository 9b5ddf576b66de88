"""Sampling from logits against transformers' warpers and an exact inverse CDF."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_core.config.options import RolloutConfig
from grpo_core.rollout.sampling import sample_tokens


def choose(logits, uniforms=None, seen=None, forbidden=(), limit=None, **rollout):
    vocabulary = logits.shape[1]
    never_sampled = torch.tensor([*forbidden, *range(limit or vocabulary, vocabulary)], dtype=torch.int64)
    uniforms = torch.zeros(len(logits)) if uniforms is None else uniforms
    return sample_tokens(logits, uniforms, RolloutConfig(**rollout), never_sampled, seen)


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    ],
    ids=str,
)
def test_drawn_frequencies_follow_transformers_warpers(settings_):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, logprobs = choose(logits.expand(draws, -1), uniforms, **settings_)
    rollout = RolloutConfig(**settings_)
    scores = logits / rollout.temperature
    torch.testing.assert_close(logprobs, torch.log_softmax(scores, -1)[0, tokens])
    if rollout.top_k:
        scores = TopKLogitsWarper(rollout.top_k)(None, scores)
    if rollout.top_p < 1:
        scores = TopPLogitsWarper(rollout.top_p)(None, scores)
    if rollout.min_p:
        scores = MinPLogitsWarper(rollout.min_p)(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy() * draws
    observed = np.bincount(tokens.numpy(), minlength=40)
    assert not observed[expected == 0].any()
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


@given(
    size=st.integers(1, 200),
    uniform=st.one_of(st.sampled_from([0.5**33, 0.5, 1 - 0.5**33]), st.floats(1e-9, 1 - 1e-9)),
    seed=st.integers(0, 99),
    kept=st.floats(0.01, 1),
)
def test_inverse_cdf_finds_the_token_whose_share_holds_the_number(size, uniform, seed, kept):
    """For vocabularies below, at and above the block size, with tokens of weight 0 at either end too."""
    random = np.random.default_rng(seed)
    weights = random.exponential(size=(1, size)) * (random.random((1, size)) < kept)
    weights[0, random.integers(size)] = 1.0
    logits = torch.from_numpy(np.log(np.maximum(weights, 1e-300)) - 1e3 * (weights == 0)).float()
    tokens, _ = choose(logits, torch.tensor([uniform], dtype=torch.float64))
    sums = np.cumsum(weights[0]) / weights.sum()
    assert weights[0, tokens[0]] > 0
    assert sums[tokens[0]] >= uniform - 1e-5
    assert sums[tokens[0]] - weights[0, tokens[0]] / weights.sum() <= uniform + 1e-5


def test_log_prob_of_a_token_whose_probability_underflows_is_finite():
    tokens, logprobs = choose(torch.tensor([[300.0, 0.0, -5.0]]), temperature=0.0, forbidden=[0])
    assert (tokens.item(), logprobs.item()) == (1, -300.0)


def test_repetition_penalty_forbidden_tokens_and_limit_change_the_draw_and_not_the_log_prob():
    logits = torch.tensor([[3.0, 2.0, -1.0, 2.5, 9.0]])
    seen = torch.tensor([[True, False, False, False, False]])
    full = torch.log_softmax(logits, -1)[0]
    for options, expected in (
        ({"limit": 4}, 0),
        ({"limit": 4, "seen": seen, "repetition_penalty": 2.0}, 3),
        ({"limit": 4, "forbidden": [0, 3]}, 1),
        ({"limit": 4, "forbidden": [0, 3, 4]}, 1),
    ):
        tokens, logprobs = choose(logits, temperature=0.0, **options)
        assert tokens.tolist() == [expected]
        torch.testing.assert_close(logprobs[0], full[expected])


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
@pytest.mark.parametrize(
    "rollout", [{}, {"temperature": 0.7}, {"repetition_penalty": 1.1}, {"temperature": 0.0}], ids=str
)
def test_logprobs_over_a_large_vocabulary_are_not_biased(vocabulary, rollout):
    """softmax of a CPU adds a row in one float32 sum, by which all log-probs of a row are off to the same side."""
    generator = torch.Generator().manual_seed(vocabulary)
    temperature = rollout.get("temperature") or 1.0
    errors = []
    for spread in (1.0, 3.0, 8.0):
        logits = torch.randn(16, vocabulary, generator=generator) * spread
        seen = torch.zeros(16, vocabulary, dtype=torch.bool) if "repetition_penalty" in rollout else None
        tokens, logprobs = choose(logits, torch.rand(16, generator=generator), seen, **rollout)
        exact = torch.log_softmax((logits / temperature).double(), -1).gather(1, tokens[:, None])[:, 0]
        errors.append(logprobs.double() - exact)
    for error in errors:
        assert error.mean().abs() <= 3e-7
        assert error.abs().max() <= 1.5e-6


def test_forbidden_tokens_count_in_the_logprob_as_before():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = choose(logits, torch.full((8,), 0.4), forbidden=[1, 2, 3])
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0])
