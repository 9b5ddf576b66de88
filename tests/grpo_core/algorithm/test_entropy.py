"""The entropy threshold and bonus, however a step is split."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.algorithm.entropy import entropy_bonus, entropy_histogram, entropy_threshold


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_the_threshold_keeps_the_fraction_of_highest_entropy_to_a_bin(seed, fraction, count):
    entropy = torch.rand(count, generator=torch.Generator().manual_seed(seed)).pow(4) * 11
    threshold = entropy_threshold(entropy_histogram(entropy), fraction)
    kept = entropy >= threshold
    wanted = math.ceil(fraction * count - 1e-9)
    assert kept.sum() >= wanted
    exact = entropy.sort(descending=True).values[wanted - 1]
    assert threshold <= exact
    assert threshold >= exact * (1 - 2**-7)


def test_the_threshold_does_not_depend_on_how_the_step_is_split():
    entropy = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 5
    whole = entropy_histogram(entropy)
    split = sum(entropy_histogram(part) for part in entropy.split([300, 1, 699]))
    assert torch.equal(whole, split)
    masked = entropy_histogram(entropy, torch.arange(1000) < 300)
    assert torch.equal(masked, entropy_histogram(entropy[:300]))


def test_all_tokens_are_kept_at_fraction_one_and_zero_entropies_are_counted():
    entropy = torch.tensor([0.0, -0.0, -1e-9, 0.5])
    histogram = entropy_histogram(entropy)
    assert histogram.sum() == 4
    assert histogram[0] == 3
    assert entropy_threshold(histogram, 1.0) == 0


def test_the_bonus_is_the_mean_entropy_over_micro_batches():
    entropy = torch.rand(10, dtype=torch.float64)
    mask = torch.arange(10) % 3 > 0
    parts = [entropy_bonus(e, int(mask.sum()), m) for e, m in zip(entropy.split(4), mask.split(4), strict=True)]
    torch.testing.assert_close(sum(parts), entropy[mask].mean())
