"""What group sampling refuses, and how it says so."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.types import Prompt
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import VOCABULARY, CharTokenizer, make_prompts, sampled


def test_capped_logits_are_refused_by_config_key():
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"config\.attn_logit_softcapping"):
        GroupSampler(Policy(Gemma2ForCausalLM(config)), CharTokenizer())


def test_sequences_beyond_the_window_are_refused_and_shorter_ones_are_right():
    lm = make_lm("mistral", sliding_window=24)
    sampler = GroupSampler(Policy(lm), CharTokenizer())
    prompts = make_prompts((8,))
    groups = sampled(sampler, prompts, group_size=1, max_new_tokens=16, temperature=0.0)
    ids = torch.tensor([prompts[0].token_ids])
    expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0, 8:]
    assert list(groups[0].completions[0].token_ids) == expected.tolist()
    with pytest.raises(ValueError, match=r"8 tokens.*config\.sliding_window 24"):
        sampled(sampler, prompts, group_size=1, max_new_tokens=17)


def test_a_prompt_beyond_the_models_positions_is_refused():
    sampler = GroupSampler(Policy(make_lm(max_position_embeddings=32)), CharTokenizer())
    sampled(sampler, make_prompts((24,)), group_size=1, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"25 tokens.*config\.max_position_embeddings 32.*rollout\.max_new_tokens"):
        sampled(sampler, make_prompts((5, 25)), group_size=1, max_new_tokens=8)


def test_embeddings_that_do_not_fit_the_prompt_are_refused():
    policy = Policy(make_lm(), embed=lambda prompts: [torch.zeros(3, 32) for _ in prompts])
    with pytest.raises(ValueError, match=r"'prompt-0-0' has 4 tokens.*\(3, 32\)"):
        sampled(GroupSampler(policy, CharTokenizer()), make_prompts((4,)), group_size=2)


def test_empty_prompts_groups_and_stop_strings_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Prompt("empty", ())
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        RolloutConfig(group_size=0)
    sampler = GroupSampler(Policy(make_lm()), CharTokenizer())
    with pytest.raises(ValueError, match=r"rollout\.stop_strings"):
        sampled(sampler, make_prompts((4,)), stop_strings=("",))
    assert sampled(sampler, []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_policy_is_told_apart(temperature):
    lm = make_lm()
    with torch.no_grad():
        lm.model.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(GroupSampler(Policy(lm), CharTokenizer()), make_prompts((4,)), temperature=temperature)
