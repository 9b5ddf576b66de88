"""On a GPU: captured steps against called ones, sampler against trainer, and nothing that stalls or moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_core.config.options import RolloutConfig
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.backends.triton import TritonDecoder
from grpo_core.rollout.cuda_graphs import StepGraphs
from grpo_core.rollout.sampler import GroupSampler
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts, sampled, token_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROLLOUTS = {
    "whole": {},
    "greedy": {"temperature": 0.0},
    "cut": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
}


def make_policy(family="qwen2", dtype=torch.bfloat16):
    lm = make_lm(
        family, lora=True, hidden_size=896, intermediate_size=2432, num_hidden_layers=4, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.div_(3)
    lm.generation_config.eos_token_id = [1, *range(60, 63)]
    return Policy(lm.to("cuda", dtype))


def make_sampler(policy, **options):
    sampler = GroupSampler(policy, CharTokenizer(), **options)
    assert isinstance(sampler.decoder, TritonDecoder)
    return sampler


def captured(decoder) -> int:
    """How many kinds of step are replayed."""
    return sum(graph is not None for graph in decoder.graphs._graphs.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_decoding_equals_generate_in_float32(family):
    policy = make_policy(family, torch.float32)
    prompts = make_prompts((5, 300, 17))
    groups = sampled(make_sampler(policy), prompts, group_size=2, max_new_tokens=24, temperature=0.0)
    expected = []
    for prompt in prompts:
        embeds = policy.embed([prompt])[0].detach()[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device="cuda")
        ids = policy.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=24, do_sample=False)
        expected.append([tuple(ids[0].tolist())] * 2)
    assert token_ids(groups) == expected


@pytest.mark.parametrize("options", ROLLOUTS.values(), ids=ROLLOUTS)
def test_captured_steps_equal_called_ones(options, monkeypatch):
    policy = make_policy()
    prompts = make_prompts((5, 300, 17, 64, 30, 2, 70, 9))
    rollout = RolloutConfig(group_size=16, max_new_tokens=48, **options)
    sampler = make_sampler(policy)
    replayed = [sampler.sample(prompts, rollout, step=step) for step in range(2)]
    assert captured(sampler.decoder) > 1
    monkeypatch.setattr(StepGraphs, "run", lambda self, key, step: step())
    called = [make_sampler(policy).sample(prompts, rollout, step=step) for step in range(2)]
    for a, b in zip(replayed, called, strict=True):
        assert token_ids(a) == token_ids(b)
        for x, y in zip(a, b, strict=True):
            for p, q in zip(x.completions, y.completions, strict=True):
                np.testing.assert_array_equal(p.logprobs, q.logprobs)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_log_probs_are_the_trainers(dtype, mean, record_property):
    policy = make_policy(dtype=dtype)
    prompts = make_prompts((5, 300, 17, 64))
    groups = sampled(make_sampler(policy), prompts, group_size=16, max_new_tokens=64)
    with torch.no_grad():
        expected = policy.logprobs(GroupLayout.from_groups(groups, "cuda"), prompts).logprob.cpu()
    ours = torch.from_numpy(np.concatenate([c.logprobs for group in groups for c in group.completions]))
    differences = (ours - expected).abs()
    record_property("mean", differences.mean().item())
    record_property("max", differences.max().item())
    print(f"sampler against trainer, {dtype}: mean {differences.mean():.2e}, max {differences.max():.2e}")
    assert differences.mean() < mean


def test_steps_do_not_wait_for_the_device(monkeypatch):
    sampler = make_sampler(make_policy())
    prompts, rollout = make_prompts((5, 300, 17, 64)), dict(group_size=16, max_new_tokens=48)
    for _ in range(2):  # every size of batch comes twice: called, then captured
        sampled(sampler, prompts, step=2, **rollout)
    decode, steps = TritonDecoder.decode, []

    def strict(self, count):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return decode(self, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.append(count)

    monkeypatch.setattr(TritonDecoder, "decode", strict)
    sampled(sampler, prompts, step=2, **rollout)
    assert sum(steps) > 20


def test_nothing_moves_between_rollouts_that_fit():
    sampler = make_sampler(make_policy())
    prompts, rollout = make_prompts((5, 300, 17, 64)), dict(group_size=16, max_new_tokens=48)
    for step in (0, 0, 0):
        sampled(sampler, prompts, step=step, **rollout)
    decoder = sampler.decoder
    before = (decoder.cache.prefix.data_ptr(), decoder.cache.suffix.data_ptr(), captured(decoder))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    sampled(sampler, prompts, step=0, **rollout)
    assert before == (decoder.cache.prefix.data_ptr(), decoder.cache.suffix.data_ptr(), captured(decoder))
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


def test_an_update_of_the_weights_reaches_captured_steps():
    policy = make_policy(dtype=torch.float32)
    sampler, prompts = make_sampler(policy), make_prompts((8,))
    options = dict(group_size=2, max_new_tokens=24, temperature=0.0)
    before = [token_ids(sampled(sampler, prompts, **options)) for _ in range(3)]
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    after = token_ids(sampled(sampler, prompts, **options))
    assert before[0] == before[1] == before[2] != after
    assert after == token_ids(sampled(make_sampler(policy), prompts, **options))
