"""Decoding in plain torch: what must not change completions, and rotations and dtypes against the model's forward."""

import numpy as np
import pytest
import torch

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout import cache as cache_module
from grpo_core.rollout.backends import torch as torch_backend
from grpo_core.rollout.backends.torch import TorchDecoder
from grpo_core.rollout.sampler import GroupSampler, Scheduler
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import VOCABULARY, CharTokenizer, make_prompts


def sample(lm, lengths=(5, 1, 17, 9, 30, 2), memory_budget=None, **options):
    rollout = RolloutConfig(**({"group_size": 3, "max_new_tokens": 25} | options))
    sampler = GroupSampler(Policy(lm), CharTokenizer(), memory_budget=memory_budget)
    groups = sampler.sample(make_prompts(lengths), rollout)
    assert memory_budget is None or 1 < sampler.timings["slots"] < len(lengths)
    return [[completion.token_ids for completion in group.completions] for group in groups]


def test_reading_tokens_back_every_few_steps_changes_nothing(monkeypatch):
    lm = make_lm("qwen3")
    lm.generation_config.eos_token_id = [1, *range(60, 70)]
    expected = sample(lm, repetition_penalty=1.3)
    init = Scheduler.__init__

    def eight_steps(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.steps_per_read = 8

    monkeypatch.setattr(Scheduler, "__init__", eight_steps)
    assert sample(lm, repetition_penalty=1.3) == expected
    assert sample(lm, repetition_penalty=1.3, memory_budget=200_000) == expected


def test_prompts_prefilled_in_pieces_give_the_same_completions(monkeypatch):
    lm = make_lm("llama")
    expected = sample(lm)
    monkeypatch.setattr(cache_module, "PREFILL_TOKENS", 20)
    assert sample(lm) == expected


def test_attention_without_the_cpu_kernel_gives_the_same_completions(monkeypatch):
    lm = make_lm("mistral")
    expected = sample(lm)
    monkeypatch.setattr(torch_backend, "_attend", torch_backend._attend_reference)
    assert sample(lm) == expected


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn", "dynamic"])
def test_scaled_rotations_equal_generate(rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope != "linear":
        parameters |= {"original_max_position_embeddings": 64}
    lm = make_lm("llama", rope_parameters=parameters, max_position_embeddings=128)
    prompts = make_prompts((6, 20))
    sampler = GroupSampler(Policy(lm), CharTokenizer())
    assert isinstance(sampler.decoder, TorchDecoder) == (rope != "dynamic")
    groups = sampler.sample(prompts, RolloutConfig(group_size=1, max_new_tokens=20, temperature=0.0))
    for group in groups:
        ids = torch.tensor([group.prompt.token_ids])
        expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(group.completions[0].token_ids) == expected[0, ids.shape[1] :].tolist()


def test_bfloat16_log_probs_are_near_a_forward_of_the_same_model():
    lm = make_lm("qwen2").to(torch.bfloat16)
    prompts = make_prompts((5, 40))
    groups = GroupSampler(Policy(lm), CharTokenizer()).sample(prompts, RolloutConfig(group_size=2, max_new_tokens=20))
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logits = lm(ids).logits[0, -len(completion.token_ids) - 1 : -1].float()
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert np.abs(completion.logprobs - expected.numpy()).max() < 0.1
            assert max(completion.token_ids) < VOCABULARY
