"""Group sampling within a budget of memory, and when memory runs out all the same."""

import pytest
import torch

from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts, sampled, token_ids


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch):
    policy = Policy(make_lm())
    prompts = make_prompts((5, 1, 17, 9, 30))
    expected = sampled(GroupSampler(policy, CharTokenizer()), prompts, group_size=3, max_new_tokens=15)
    sampler = GroupSampler(policy, CharTokenizer())
    step, calls = sampler.decoder.step, []

    def failing(tokens):
        calls.append(len(tokens))
        if sampler.timings["slots"] > 2 and len(calls) % 4 == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(tokens)

    monkeypatch.setattr(sampler.decoder, "step", failing)
    groups = sampled(sampler, prompts, group_size=3, max_new_tokens=15)
    assert sampler.timings["slots"] == 2
    assert token_ids(groups) == token_ids(expected)
    assert sampler.decoder.cache is None


def test_out_of_memory_with_one_group_is_an_error(monkeypatch):
    sampler = GroupSampler(Policy(make_lm()), CharTokenizer(), memory_budget=1)

    def failing(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler.decoder, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        sampled(sampler, make_prompts((5, 4)), group_size=3, max_new_tokens=15)


def test_cache_stays_within_the_budget():
    policy = Policy(make_lm())
    for budget in (200_000, 1_000_000):
        sampler = GroupSampler(policy, CharTokenizer(), memory_budget=budget)
        taken = []
        start = sampler.decoder.start_sampling

        def spy(*arguments, start=start, sampler=sampler, taken=taken):
            sampling = start(*arguments)
            cache = sampler.decoder.cache
            taken.append(cache.prefix.nbytes + cache.suffix.nbytes)
            return sampling

        sampler.decoder.start_sampling = spy
        sampled(sampler, make_prompts([20] * 12), group_size=4, max_new_tokens=20)
        assert len(taken) == 1
        assert budget / 10 < taken[0] <= budget
