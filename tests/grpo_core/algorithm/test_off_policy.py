"""Corrections for samples of another policy against their formulas."""

import math

import pytest
import torch

from grpo_core.algorithm.off_policy import off_policy_mask, sampler_correction
from tests.grpo_core.algorithm.tokens import INDEX, LENGTHS, random_completions


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.4), (0.8, 1.3)])
def test_sampler_corrections_follow_their_formulas(level, low, high):
    logprob, sampler, _ = random_completions()
    truncated = sampler_correction(logprob, sampler, INDEX, len(LENGTHS), f"{level}_truncate", low=low, high=high)
    masked = sampler_correction(logprob, sampler, INDEX, len(LENGTHS), f"{level}_mask", low=low, high=high)
    assert not truncated.requires_grad
    start = 0
    for length in LENGTHS:
        differences = [(logprob[t] - sampler[t]).item() for t in range(start, start + length)]
        for t, difference in enumerate(differences, start):
            total = sum(differences)
            weight = math.exp({"token": difference, "sequence": total, "geometric": total / length}[level])
            assert truncated[t].item() == pytest.approx(min(max(weight, low), high), rel=1e-9)
            assert masked[t].item() == pytest.approx(weight if low <= weight <= high else 0.0, rel=1e-9)
        start += length
    assert (masked == 0).any()


def test_a_token_the_sampler_gave_no_logprob_for_counts_as_on_policy():
    old, sampler = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, float("nan")])
    assert (sampler_correction(old, sampler, torch.tensor([0, 0]), 1, "sequence_mask") == 1).all()
    assert off_policy_mask(old, sampler, torch.tensor([-1.0, -1.0]), torch.tensor([0, 0]), 1, 0.0).all()


def test_a_long_unlikely_completion_is_masked_without_overflow():
    old, sampler = torch.zeros(2000), torch.full((2000,), -1.0)
    index = torch.zeros(2000).long()
    assert (sampler_correction(old, sampler, index, 1, "sequence_mask") == 0).all()
    assert (sampler_correction(old, sampler, index, 1, "sequence_truncate") == 3).all()


def test_only_bad_completions_that_became_unlikely_are_dropped():
    lengths = torch.tensor([2, 2, 2])
    index = torch.arange(3).repeat_interleave(lengths)
    sampler = torch.zeros(6)
    logprob = torch.tensor([-0.9, -0.3, -0.9, -0.3, -0.1, -0.3])  # mean drift 0.6, 0.6, 0.2
    advantages = torch.tensor([-1.0, 1.0, -1.0])[index]
    keep = off_policy_mask(logprob, sampler, advantages, index, 3, threshold=0.5)
    assert keep.tolist() == [False, False, True, True, True, True]
