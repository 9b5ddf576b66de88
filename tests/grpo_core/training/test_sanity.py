"""The first step's limits: in half precision, what the model's own forward leaves between two ways to run it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_core.config.options import AlgorithmConfig, RolloutConfig
from grpo_core.distributed import Distributed
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.training import sanity
from grpo_core.training.sanity import FirstStepError, cache_differences, check_first_step, mismatch_limit
from grpo_core.types import Completion, Group
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts


def bfloat16_groups(**rollout):
    policy = Policy(make_lm("qwen2", num_hidden_layers=4, hidden_size=64).to(torch.bfloat16))
    options = {"group_size": 4, "max_new_tokens": 20} | rollout
    return policy, GroupSampler(policy, CharTokenizer()).sample(make_prompts((12, 5)), RolloutConfig(**options))


def values(difference: float) -> dict[str, float]:
    keys = {"grad_norm": 1.0, "clip_ratio/region_mean": 0.0, "kl": 0.0}
    return keys | {"sampling/sampling_logp_difference/mean": difference}


def test_the_limit_in_half_precision_is_three_times_the_models_own_difference_to_itself():
    policy, groups = bfloat16_groups()
    group, lm = groups[0], policy.causal_lm
    by_hand = []
    with torch.no_grad():
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            start, targets = len(group.prompt.token_ids) - 1, torch.tensor(completion.token_ids)
            whole = lm(input_ids=ids, use_cache=False).logits[0, start:-1]
            step = lm(input_ids=ids[:, : start + 1], use_cache=True)
            rows = [step.logits[0, -1]]
            for token in completion.token_ids[:-1]:
                step = lm(input_ids=torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
                rows.append(step.logits[0, -1])
            both = (x.double().log_softmax(-1)[torch.arange(len(targets)), targets] for x in (whole, torch.stack(rows)))
            by_hand.append(next(both) - next(both))
    by_hand = torch.cat(by_hand).abs()
    found = cache_differences(policy, group, 1.0)
    assert len(found) == len(by_hand) == sum(len(completion.token_ids) for completion in group.completions)
    assert by_hand.mean() > 1e-3
    # a batch of four rows may round otherwise than each alone
    assert found.mean() == pytest.approx(float(by_hand.mean()), rel=0.5)
    colder = float(cache_differences(policy, group, 0.2).mean())  # five times the logits, and their rounding
    assert colder > 2**-7
    assert mismatch_limit(policy, groups, 0.2, Distributed()) == pytest.approx(3 * colder)


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_a_model_that_rounds_alike_with_and_without_its_cache_may_still_be_trained(dtype, step, monkeypatch):
    policy, groups = bfloat16_groups()
    monkeypatch.setattr(Policy, "dtype", dtype)
    monkeypatch.setattr(sanity, "cache_differences", lambda *_: torch.zeros(20, dtype=torch.float64))
    # as measured on two layers of width 96 in bfloat16: 0.0077, where its own two ways gave the same bits
    check_first_step(values(0.98 * step), AlgorithmConfig(), policy, groups, 1.0, Distributed())
    with pytest.raises(FirstStepError, match="differ from the trainer's"):
        check_first_step(values(3.1 * step), AlgorithmConfig(), policy, groups, 1.0, Distributed())


def test_completions_of_different_lengths_are_compared_on_their_own_tokens():
    policy, groups = bfloat16_groups()
    whole = cache_differences(policy, groups[0], 1.0)
    lengths = (20, 3, 0, 1)
    cut = [
        Completion(c.token_ids[:n], c.logprobs[:n], "length", "")
        for c, n in zip(groups[0].completions, lengths, strict=True)
    ]
    found = cache_differences(policy, Group(groups[0].prompt, cut), 1.0)
    assert len(found) == sum(lengths)
    # without a neighbour's rounding: a batch of three instead of four
    assert torch.isfinite(found).all()
    assert found.max() <= 3 * whole.max()
    assert len(cache_differences(policy, Group(groups[0].prompt, [cut[2]]), 1.0)) == 0


def test_what_a_fixed_limit_let_pass_is_refused_in_half_precision():
    policy, groups = bfloat16_groups()
    limit = mismatch_limit(policy, groups, 1.0, Distributed())
    check_first_step(values(0.9 * limit), AlgorithmConfig(), policy, groups, 1.0, Distributed())
    with pytest.raises(FirstStepError, match=r"differ from the trainer's by 0\.15 nats a token"):
        check_first_step(values(0.15), AlgorithmConfig(), policy, groups, 1.0, Distributed())


def test_a_healthy_rollout_in_half_precision_stays_below_the_limit():
    policy, groups = bfloat16_groups(max_new_tokens=40)
    trained = policy.logprobs(GroupLayout.from_groups(groups), [group.prompt for group in groups]).logprob.detach()
    drawn = np.concatenate([completion.logprobs for group in groups for completion in group.completions])
    difference = float(np.abs(trained.numpy() - drawn).mean())
    assert 0 < difference < mismatch_limit(policy, groups, 1.0, Distributed())


def test_ranks_measure_one_limit_together_and_one_without_groups_takes_part(monkeypatch):
    policy, groups = bfloat16_groups()
    alone = mismatch_limit(policy, groups, 0.2, Distributed())
    sums = []
    monkeypatch.setattr(sanity, "all_reduce_sum", lambda total, dist: sums.append(total) or total)
    assert mismatch_limit(policy, [], 1.0, Distributed()) == 3 * 2**-7  # nothing was measured
    assert mismatch_limit(policy, groups, 0.2, Distributed()) == alone
    assert [tuple(total.shape) for total in sums] == [(2,), (2,)]
    monkeypatch.setattr(sanity, "all_reduce_sum", lambda total, dist: sums[1])
    assert mismatch_limit(policy, [], 0.2, Distributed()) == alone


def test_a_rank_raises_what_another_has_found(monkeypatch):
    policy = Policy(make_lm())
    gathered = []
    monkeypatch.setattr(sanity, "gather_objects", lambda text, dist: gathered.append(text) or [text, "rank 1's audio"])
    with pytest.raises(FirstStepError, match="rank 1's audio"):
        check_first_step(values(0.0), AlgorithmConfig(), policy, [], 1.0, Distributed(0, 2))
    # a rank that has found something itself makes the same collective
    monkeypatch.setattr(sanity, "check_features", lambda *_: (_ for _ in ()).throw(FirstStepError("mine")))
    group = Group(make_prompts((3,))[0], [])
    with pytest.raises(FirstStepError, match="mine"):
        check_first_step(values(0.0), AlgorithmConfig(), policy, [group], 1.0, Distributed(0, 2))
    assert gathered == [None, "mine"]
