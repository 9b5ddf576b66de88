"""Group sampling against transformers, and the invariants that a rollout keeps."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from grpo_core.config.options import RolloutConfig
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.backends.transformers import TransformersDecoder
from grpo_core.rollout.sampler import GroupSampler
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import (
    PLACEHOLDER,
    VOCABULARY,
    CharTokenizer,
    FeaturePolicy,
    generated,
    make_prompts,
    sampled,
    token_ids,
)

LENGTHS = (5, 1, 17, 9, 30, 2)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_greedy_decoding_equals_generate(family, lora):
    lm = make_lm(family, lora)
    lm.generation_config.eos_token_id = [1, *range(4, 97, 5)]  # many end tokens: rows end early, at different lengths
    policy = FeaturePolicy(lm)
    prompts = make_prompts(LENGTHS, features=True)
    groups = sampled(GroupSampler(policy, CharTokenizer()), prompts, group_size=2, max_new_tokens=12, temperature=0.0)
    expected = [generated(policy, prompt, 12) for prompt in prompts]
    assert token_ids(groups) == [[tokens, tokens] for tokens in expected]
    assert len({len(tokens) for tokens in expected}) > 1
    for group, tokens in zip(groups, expected, strict=True):
        ended = tokens[-1] in lm.generation_config.eos_token_id
        assert [c.finish_reason for c in group.completions] == ["stop" if ended else "length"] * 2


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_equal_the_policys(family, temperature):
    policy = FeaturePolicy(make_lm(family, lora=True))
    prompts = make_prompts(LENGTHS, features=True)
    groups = sampled(
        GroupSampler(policy, CharTokenizer()),
        prompts,
        group_size=3,
        max_new_tokens=20,
        temperature=temperature,
        top_p=0.9,
        repetition_penalty=1.2,
    )
    layout = GroupLayout.from_groups(groups)
    with torch.no_grad():
        expected = policy.logprobs(layout, prompts, temperature=temperature).logprob
    ours = torch.from_numpy(np.concatenate([c.logprobs for group in groups for c in group.completions]))
    assert len(ours) == sum(len(c.token_ids) for group in groups for c in group.completions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_completions_do_not_depend_on_the_batch():
    """One prompt at a time, all at once in another order, few slots, two ranks: the same bits, if promised."""
    rounding = 0 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1e-6
    policy = Policy(make_lm("qwen2", lora=True))
    policy.model.generation_config.eos_token_id = [1, *range(60, 65)]
    prompts = make_prompts((5, 1, 17, 40, 30, 2, 70, 9, 12, 130))
    rollout = RolloutConfig(group_size=5, max_new_tokens=40)
    whole = GroupSampler(policy, CharTokenizer(), seed=3).sample(prompts, rollout)
    assert len({len(c.token_ids) for group in whole for c in group.completions}) > 10

    few_slots = GroupSampler(policy, CharTokenizer(), seed=3, memory_budget=400_000)
    others = {
        "few slots": few_slots.sample(prompts, rollout),
        "reversed": GroupSampler(policy, CharTokenizer(), seed=3).sample(prompts[::-1], rollout)[::-1],
        "alone": [g for p in prompts for g in GroupSampler(policy, CharTokenizer(), seed=3).sample([p], rollout)],
        "two ranks": [
            group
            for pair in zip(
                GroupSampler(policy, CharTokenizer(), seed=3).sample(prompts[::2], rollout),
                GroupSampler(policy, CharTokenizer(), seed=3).sample(prompts[1::2], rollout),
                strict=True,
            )
            for group in pair
        ],
    }
    assert 1 <= few_slots.timings["slots"] < len(prompts)
    for name, groups in others.items():
        assert token_ids(groups) == token_ids(whole), name
        for ours, theirs in zip(groups, whole, strict=True):
            for a, b in zip(ours.completions, theirs.completions, strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=rounding, err_msg=name)


def test_seed_step_and_member_change_the_draw():
    policy = Policy(make_lm())
    prompts = make_prompts((4, 6))
    base = sampled(GroupSampler(policy, CharTokenizer(), seed=0), prompts, group_size=4, max_new_tokens=8)
    again = sampled(GroupSampler(policy, CharTokenizer(), seed=0), prompts, group_size=4, max_new_tokens=8)
    seed = sampled(GroupSampler(policy, CharTokenizer(), seed=1), prompts, group_size=4, max_new_tokens=8)
    step = sampled(GroupSampler(policy, CharTokenizer(), seed=0), prompts, step=1, group_size=4, max_new_tokens=8)
    assert token_ids(base) == token_ids(again)
    assert token_ids(base) != token_ids(seed)
    assert token_ids(base) != token_ids(step)
    assert len(set(token_ids(base)[0])) > 1


def test_a_larger_group_begins_with_the_smaller_one():
    policy = Policy(make_lm())
    prompts = make_prompts((4, 6))
    sampler = GroupSampler(policy, CharTokenizer())
    small = token_ids(sampled(sampler, prompts, group_size=3, max_new_tokens=8))
    large = token_ids(sampled(sampler, prompts, group_size=7, max_new_tokens=8))
    assert [group[:3] for group in large] == small


def test_sampled_frequencies_pass_chi_square():
    policy = Policy(make_lm())
    prompts = make_prompts((6,))
    groups = sampled(GroupSampler(policy, CharTokenizer()), prompts, group_size=6000, max_new_tokens=2, temperature=1.5)
    first = np.bincount([c.token_ids[0] for c in groups[0].completions], minlength=VOCABULARY)
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompts[0].token_ids])).logits[0, -1]
    expected = torch.softmax(logits.double() / 1.5, -1).numpy() * first.sum()
    order = np.argsort(expected)
    pooled = np.maximum(np.searchsorted(np.cumsum(expected[order]), 5), 1)  # rare tokens in one bin
    observed = np.r_[first[order[:pooled]].sum(), first[order[pooled:]]]
    expected = np.r_[expected[order[:pooled]].sum(), expected[order[pooled:]]]
    assert len(observed) > 20
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_the_policys_update_is_seen_at_the_next_call():
    lm = make_lm("qwen3", lora=True)
    policy = Policy(lm)
    sampler = GroupSampler(policy, CharTokenizer())
    prompts = make_prompts((8,))
    before = sampled(sampler, prompts, group_size=1, max_new_tokens=12, temperature=0.0)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        lm.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.1)
    after = sampled(sampler, prompts, group_size=1, max_new_tokens=12, temperature=0.0)
    assert token_ids(after) == [[generated(policy, prompts[0], 12)]]
    assert token_ids(after) != token_ids(before)


def test_stop_string_ends_a_completion_and_is_cut_from_its_text():
    policy = Policy(make_lm())
    tokenizer = CharTokenizer()
    prompts = make_prompts((4, 6, 11))
    sampler = GroupSampler(policy, tokenizer)
    free = sampled(sampler, prompts, group_size=4, max_new_tokens=30)
    text = tokenizer.decode(free[1].completions[2].token_ids)
    stop = text[10:12]  # a pair of characters that this completion holds
    groups = sampled(sampler, prompts, group_size=4, max_new_tokens=30, stop_strings=(stop,))
    completion = groups[1].completions[2]
    at = text.index(stop)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == free[1].completions[2].token_ids[: at + 2]
    assert completion.text == text[:at]
    for ours, theirs in zip(groups, free, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            assert a.token_ids == b.token_ids[: len(a.token_ids)]
            assert (stop in tokenizer.decode(b.token_ids)) == (len(a.token_ids) < len(b.token_ids)) or a == b


def test_stop_strings_that_never_come_leave_the_length_limit():
    policy = Policy(make_lm())
    groups = sampled(
        GroupSampler(policy, CharTokenizer(), forbidden_tokens=[1]),
        make_prompts((4,)),
        group_size=3,
        max_new_tokens=9,
        stop_strings=("never comes",),
    )
    assert [(len(c.token_ids), c.finish_reason) for c in groups[0].completions] == [(9, "length")] * 3


def test_forbidden_tokens_and_spare_head_rows_are_never_sampled():
    lm = make_lm()
    with torch.no_grad():  # the head loves the placeholder and rows behind the tokenizer's end
        lm.lm_head.weight[[PLACEHOLDER, 95, 96]] *= 10
    policy = Policy(lm)
    prompts = make_prompts((4, 6))
    size = dict(group_size=16, max_new_tokens=16)
    drawn = {
        t
        for group in token_ids(sampled(GroupSampler(policy, CharTokenizer()), prompts, **size))
        for c in group
        for t in c
    }
    assert {PLACEHOLDER, 95, 96} & drawn
    sampler = GroupSampler(policy, CharTokenizer(95), forbidden_tokens=[PLACEHOLDER, -1, 99])
    for temperature in (0.0, 1.0):
        groups = sampled(sampler, prompts, temperature=temperature, **size)
        drawn = {t for group in token_ids(groups) for c in group for t in c}
        assert PLACEHOLDER not in drawn
        assert max(drawn) < 95


def test_repetition_penalty_equals_generate():
    policy = Policy(make_lm())
    prompts = make_prompts((4, 9))
    groups = sampled(
        GroupSampler(policy, CharTokenizer()),
        prompts,
        group_size=2,
        max_new_tokens=20,
        temperature=0.0,
        repetition_penalty=1.6,
    )
    for group in groups:
        embeds = policy.embed([group.prompt])[0].detach()[None]
        expected = policy.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=1.6,
        )[0].tolist()
        assert [list(c.token_ids) for c in group.completions] == [expected] * 2


def test_other_architectures_run_through_transformers():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1
    )
    lm = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        lm.transformer.wte.weight.mul_(4)
    lm.generation_config.eos_token_id = [1, *range(4, 97, 5)]
    policy = Policy(lm)
    sampler = GroupSampler(policy, CharTokenizer())
    assert isinstance(sampler.decoder, TransformersDecoder)
    lm.transformer.h[1].train()  # as left by whoever trains a part of the model
    prompts = make_prompts((5, 1, 17))
    greedy = sampled(sampler, prompts, group_size=2, max_new_tokens=12, temperature=0.0)
    assert token_ids(greedy) == [[generated(policy, prompt, 12)] * 2 for prompt in prompts]
    groups = sampled(sampler, prompts, group_size=5, max_new_tokens=12)
    assert lm.transformer.h[1].mlp.training
    assert not lm.transformer.h[0].mlp.training
    lm.eval()
    assert len({len(c.token_ids) for group in groups for c in group.completions}) > 1
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logprobs = torch.log_softmax(lm(ids).logits[0, -len(completion.token_ids) - 1 : -1], -1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_timings_count_tokens():
    sampler = GroupSampler(Policy(make_lm()), CharTokenizer(), forbidden_tokens=[1])
    sampled(sampler, make_prompts((4, 7)), group_size=3, max_new_tokens=6)
    timings = sampler.timings
    assert timings["prompt_tokens"] == 11
    assert timings["completion_tokens"] == 36
    assert timings["steps"] == 5  # the first token comes from the prompt
    assert all(timings[phase] > 0 for phase in ("refresh", "embed", "prefill", "decode", "text"))


def test_sampling_leaves_no_gradient_state_behind():
    lm = make_lm(lora=True).train()
    policy = FeaturePolicy(lm)
    groups = sampled(GroupSampler(policy, CharTokenizer()), make_prompts(LENGTHS, features=True), group_size=2)
    assert lm.training
    prompts = [group.prompt for group in groups]
    policy.logprobs(GroupLayout.from_groups(groups), prompts).logprob.sum().backward()
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)
