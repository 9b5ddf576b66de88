"""Decoding by kernels: the code that a GPU runs, without the capture of its steps.

Where a test asks for `kernels`, these run in Triton's interpreter; elsewhere, being slow there, as their plain twins.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_core.config.options import RolloutConfig
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.backends.torch import TorchDecoder
from grpo_core.rollout.backends.triton import TritonDecoder, batch_size
from grpo_core.rollout.sampler import GroupSampler
from grpo_kernels import sample_head
from grpo_kernels.testing.interpreter import InterpretedFunction, interpret
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer, FeaturePolicy, generated, make_prompts, sampled, token_ids


@pytest.fixture
def kernels():
    with interpret():
        yield


def make_sampler(policy, **options):
    sampler = GroupSampler(policy, CharTokenizer(), **options)
    sampler.decoder = TritonDecoder(sampler.model)
    return sampler


def test_kernels_are_chosen_where_they_run():
    policy = Policy(make_lm())
    assert isinstance(GroupSampler(policy, CharTokenizer()).decoder, TorchDecoder)
    with interpret():
        assert isinstance(GroupSampler(policy, CharTokenizer()).decoder, TritonDecoder)
        other = Policy(make_lm(hidden_act="gelu"))
        assert isinstance(GroupSampler(other, CharTokenizer()).decoder, TorchDecoder)


def assert_greedy_equals_generate(family, lengths, new_tokens):
    lm = make_lm(family, lora=True)
    lm.generation_config.eos_token_id = [1, *range(4, 97, 5)]
    policy = FeaturePolicy(lm)
    prompts = make_prompts(lengths, features=True)
    groups = sampled(make_sampler(policy), prompts, group_size=2, max_new_tokens=new_tokens, temperature=0.0)
    expected = [generated(policy, prompt, new_tokens) for prompt in prompts]
    assert token_ids(groups) == [[tokens, tokens] for tokens in expected]
    return expected


def test_greedy_decoding_equals_generate(family):
    """With LoRA, prompts as embeddings, mixed lengths, and rows that end early."""
    expected = assert_greedy_equals_generate(family, (5, 1, 17, 9, 30, 2), 12)
    assert len({len(tokens) for tokens in expected}) > 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_decoding_by_kernels_equals_generate(family):
    assert_greedy_equals_generate(family, (5, 1), 3)


def assert_log_probs_equal_the_policys(family, lengths, **options):
    policy = FeaturePolicy(make_lm(family, lora=True))
    prompts = make_prompts(lengths, features=True)
    groups = sampled(make_sampler(policy), prompts, **options)
    layout = GroupLayout.from_groups(groups)
    with torch.no_grad():
        temperature = options.get("temperature", 1.0)
        expected = policy.logprobs(layout, prompts, temperature=temperature).logprob
    ours = torch.from_numpy(np.concatenate([c.logprobs for group in groups for c in group.completions]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert len({c.token_ids for group in groups for c in group.completions}) > len(lengths)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}], ids=["whole", "cut"]
)
def test_log_probs_equal_the_policys(family, options):
    assert_log_probs_equal_the_policys(family, (5, 1, 17, 9, 30, 2), group_size=3, max_new_tokens=20, **options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3", {"temperature": 0.7}), ("qwen2", {"top_p": 0.9, "repetition_penalty": 1.2})],
    ids=["whole", "cut"],
)
def test_log_probs_by_kernels_equal_the_policys(family, options):
    assert_log_probs_equal_the_policys(family, (9, 4), group_size=3, max_new_tokens=3, **options)


@pytest.mark.usefixtures("kernels")
def test_bfloat16_samples_inside_the_head_and_its_log_probs_are_near_the_trainers(monkeypatch):
    policy = Policy(make_lm("qwen2").to(torch.bfloat16))
    prompts = make_prompts((5, 20))
    monkeypatch.setitem(sample_head.__globals__, "sample_row", None)  # no logits in memory
    groups = sampled(make_sampler(policy), prompts, group_size=2, max_new_tokens=3)
    with torch.no_grad():
        expected = policy.logprobs(GroupLayout.from_groups(groups), prompts).logprob
    ours = torch.from_numpy(np.concatenate([c.logprobs for group in groups for c in group.completions]))
    assert (ours - expected).abs().max() < 0.1
    assert (ours - expected).abs().mean() < 0.02


def test_completions_do_not_depend_on_the_batch():
    """All at once, reversed with few slots (groups enter as others leave, batches change size), and one by one."""
    policy = Policy(make_lm("qwen2", lora=True))
    policy.model.generation_config.eos_token_id = [1, *range(60, 75)]
    prompts = make_prompts((5, 1, 17, 30, 2, 9))
    rollout = RolloutConfig(group_size=5, max_new_tokens=30)
    whole = make_sampler(policy, seed=3).sample(prompts, rollout)
    assert len({len(c.token_ids) for group in whole for c in group.completions}) > 5
    few = make_sampler(policy, seed=3, memory_budget=520_000)
    others = {
        "few slots": few.sample(prompts[::-1], rollout)[::-1],
        "alone": [make_sampler(policy, seed=3).sample([prompt], rollout)[0] for prompt in prompts],
    }
    assert 1 < few.timings["slots"] < len(prompts)
    for name, groups in others.items():
        assert token_ids(groups) == token_ids(whole), name
        for ours, theirs in zip(groups, whole, strict=True):
            for a, b in zip(ours.completions, theirs.completions, strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5, err_msg=name)


def test_penalty_forbidden_tokens_and_stop_strings_act_as_on_a_cpu():
    """Greedy, so that both paths draw the same tokens."""
    policy = Policy(make_lm())
    prompts = make_prompts((4, 9))
    options = dict(group_size=2, max_new_tokens=12, temperature=0.0, repetition_penalty=1.6)
    sampler = make_sampler(policy, forbidden_tokens=range(10, 30))
    free = token_ids(sampled(sampler, prompts, **options))
    assert not {t for group in free for c in group for t in c} & set(range(10, 30))
    stop = CharTokenizer().decode(free[0][0][4:6])
    groups = sampled(sampler, prompts, **options, stop_strings=(stop,))
    assert groups[0].completions[0].token_ids == free[0][0][:6]
    assert groups[0].completions[0].finish_reason == "stop"
    torch_sampler = GroupSampler(policy, CharTokenizer(), forbidden_tokens=range(10, 30))
    assert isinstance(torch_sampler.decoder, TorchDecoder)
    assert token_ids(sampled(torch_sampler, prompts, **options)) == free


@pytest.mark.usefixtures("kernels")
def test_a_layer_takes_six_launches_beside_its_gemms(monkeypatch):
    """Kernels of ours in the order of their launch, and torch's operations on rows, of one step of two layers."""
    policy = Policy(make_lm("qwen2").to(torch.bfloat16))  # with biases in QKV
    launched, step, steps = [], TritonDecoder._step, []

    def counting(self, *args, run=InterpretedFunction.run, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def watched(self):
        launched.clear()
        with pytest.MonkeyPatch.context() as patch, torch.profiler.profile() as profile:
            patch.setattr(InterpretedFunction, "run", counting)
            step(self)
        steps.append((list(launched), [event.name for event in profile.events()]))

    monkeypatch.setattr(TritonDecoder, "_step", watched)
    sampled(make_sampler(policy), make_prompts((4,)), group_size=2, max_new_tokens=2)
    ((names, operations),) = steps
    layer = ["rms_norm_kernel", "rope_append_kernel", "prefix_attention_kernel", "suffix_attention_kernel",
             "rms_norm_kernel", "silu_mul_kernel"]  # fmt: skip
    end = ["rms_norm_kernel", "sample_head_kernel", "combine_samples_kernel", "record_tokens_kernel"]
    assert names == 2 * layer + end
    assert operations.count("aten::mm") == 2 * 3
    assert operations.count("aten::addmm") == 2
    assert operations.count("aten::embedding") == 1


def test_caches_stay_where_they_are_between_rollouts_that_fit():
    policy = Policy(make_lm())
    sampler = make_sampler(policy)
    sampled(sampler, make_prompts((9, 20)), group_size=4, max_new_tokens=5)
    cache, graphs = sampler.decoder.cache, sampler.decoder.graphs
    assert sampler.decoder.held_bytes == cache.prefix.nbytes + cache.suffix.nbytes > 0
    again = sampled(sampler, make_prompts((3,)), group_size=8, max_new_tokens=7, temperature=0.0)
    assert sampler.decoder.cache is cache
    assert sampler.decoder.graphs is graphs
    assert token_ids(again)[0][0] == generated(policy, make_prompts((3,))[0], 7)
    sampled(sampler, make_prompts((3,)), group_size=1, max_new_tokens=20)
    assert sampler.decoder.cache is not cache  # longer than there is room for


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch):
    policy = Policy(make_lm())
    prompts = make_prompts((5, 1, 17, 9))
    expected = sampled(make_sampler(policy), prompts, group_size=3, max_new_tokens=9)
    sampler, calls = make_sampler(policy), []

    def failing(self, step=TritonDecoder._step):
        calls.append(self.cache)
        if sampler.timings["slots"] > 2 and len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(TritonDecoder, "_step", failing)
    groups = sampled(sampler, prompts, group_size=3, max_new_tokens=9)
    assert sampler.timings["slots"] == 2
    assert calls[-1] is not calls[0]
    assert token_ids(groups) == token_ids(expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_diverged_policy_is_told_apart(temperature, dtype):
    lm = make_lm().to(dtype)
    with torch.no_grad():
        lm.model.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(make_sampler(Policy(lm)), make_prompts((4,)), group_size=2, temperature=temperature)


def test_batches_come_in_few_sizes_with_little_filling():
    sizes = [batch_size(rows) for rows in range(1, 1025)]
    assert sorted(set(sizes)) == [8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(rows <= size for rows, size in zip(range(1, 1025), sizes, strict=True))
    assert max(size / rows for rows, size in zip(range(1, 1025), sizes, strict=True) if rows > 64) < 1.5
