"""The table of model families: a registered one is sampled and trained like ours, and what is not known is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from grpo_core import families
from grpo_core.config.options import RolloutConfig
from grpo_core.families import Family, family_names, get_family, register_family
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.backends import make_decoder
from grpo_core.rollout.backends.torch import TorchDecoder
from grpo_core.rollout.backends.transformers import TransformersDecoder
from grpo_core.rollout.backends.triton import TritonDecoder
from grpo_core.rollout.sampler import GroupSampler
from grpo_kernels.testing.interpreter import interpret
from tests.grpo_core.conftest import SIZES, make_lm
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts, token_ids

NOVA = Family(
    "nova",
    layers="stack.blocks",
    final_norm="final",
    rotary="angles",
    input_norm="norm1",
    q="attend.wq",
    k="attend.wk",
    v="attend.wv",
    o="attend.wo",
    mlp_norm="norm2",
    gate="w1",
    up="w3",
    down="w2",
)
LLAMA_NAMES = {
    "trunk.stack.blocks": "model.layers",
    "trunk.table": "model.embed_tokens",
    "trunk.final": "model.norm",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attend.wq": "self_attn.q_proj",
    "attend.wk": "self_attn.k_proj",
    "attend.wv": "self_attn.v_proj",
    "attend.wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
    "unembed": "lm_head",
}


class NovaConfig(LlamaConfig):
    model_type = "nova"


class Attend(nn.Module):
    def __init__(self, config: NovaConfig):
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        self.wq, self.wo = (nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(2))
        kv_size = config.num_key_value_heads * self.head_dim
        self.wk, self.wv = (nn.Linear(config.hidden_size, kv_size, bias=False) for _ in range(2))

    def forward(self, x, rotations, mask, **kwargs):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_pos_emb(q, k, *rotations)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return self.wo(attention(self, q, k, v, mask, scaling=self.head_dim**-0.5, **kwargs)[0].flatten(2))


class Block(nn.Module):
    def __init__(self, config: NovaConfig):
        super().__init__()
        self.attend = Attend(config)
        self.norm1, self.norm2 = (LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, rotations, mask, **kwargs):
        x = x + self.attend(self.norm1(x), rotations, mask, **kwargs)
        y = self.norm2(x)
        return x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))


class NovaPreTrained(PreTrainedModel):
    config_class = NovaConfig
    base_model_prefix = "trunk"
    _supports_sdpa = _supports_attention_backend = True


class NovaModel(NovaPreTrained):
    def __init__(self, config: NovaConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.stack = nn.ModuleDict({"blocks": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))})
        self.final = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.angles = LlamaRotaryEmbedding(config=config)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, inputs_embeds, position_ids, attention_mask, use_cache, **kwargs):
        x, rotations = inputs_embeds, self.angles(inputs_embeds, position_ids=position_ids)
        for block in self.stack["blocks"]:
            x = block(x, rotations, attention_mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.final(x))


class NovaForCausalLM(NovaPreTrained):
    """Llama under other names: it has none of Llama's attributes, and its own forward has no cache to sample with."""

    def __init__(self, config: NovaConfig):
        super().__init__(config)
        self.trunk = NovaModel(config)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.unembed

    def forward(self, input_ids, use_cache=False):
        """One sequence alone: what the comparison needs."""
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.full((len(positions[0]), len(positions[0])), -torch.inf).triu(1)[None, None]
        x = self.trunk(self.trunk.table(input_ids), positions, mask, use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.unembed(x))


def llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def make_pair():
    """A Llama, and a Nova of the same weights."""
    llama = make_lm("llama")
    nova = NovaForCausalLM(NovaConfig(**SIZES)).eval()
    weights = llama.state_dict()
    nova.load_state_dict({name: weights[llama_name(name)] for name in nova.state_dict()})
    for lm in (llama, nova):
        lm.generation_config = None  # end tokens are the tokenizer's alone
    return llama, nova


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register_family(NOVA)


def both(rollout: RolloutConfig, decoder_class: type):
    """Token ids of a rollout of each, before and after a training step, and the gradients of that step."""
    found = []
    for lm in make_pair():
        policy, prompts = Policy(lm), make_prompts((5, 1, 17))
        sampler = GroupSampler(policy, CharTokenizer())
        assert type(sampler.decoder) is decoder_class
        groups = sampler.sample(prompts, rollout)
        policy.logprobs(GroupLayout.from_groups(groups), prompts).logprob.mean().backward()
        gradients = {llama_name(name): p.grad for name, p in policy.named_parameters().items()}
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(parameter.grad, alpha=0.5)
        found.append((token_ids(groups), gradients, token_ids(sampler.sample(prompts, rollout))))
    return found


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_registered_family_is_sampled_and_trained_as_the_same_llama(temperature):
    rollout = RolloutConfig(group_size=3, max_new_tokens=20, temperature=temperature)
    (tokens, gradients, trained), (nova_tokens, nova_gradients, nova_trained) = both(rollout, TorchDecoder)
    assert nova_tokens == tokens
    assert nova_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (nova_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert nova_trained == trained != tokens


@pytest.mark.usefixtures("registered")
def test_a_registered_family_is_sampled_by_kernels_as_the_same_llama():
    with interpret():
        found = [
            GroupSampler(Policy(lm), CharTokenizer()).sample(
                make_prompts((5,)), RolloutConfig(group_size=2, max_new_tokens=3)
            )
            for lm in make_pair()
        ]
        assert isinstance(GroupSampler(Policy(make_pair()[1]), CharTokenizer()).decoder, TritonDecoder)
    assert token_ids(found[0]) == token_ids(found[1])


def test_a_family_that_is_not_registered_is_left_to_transformers_and_refused_by_the_fused_decoders():
    _, nova = make_pair()
    assert isinstance(make_decoder(nova), TransformersDecoder)
    with pytest.raises(ValueError, match=r"'nova' is not known: use one of: qwen2, qwen3, llama, mistral; or add it"):
        TorchDecoder(nova)


@pytest.mark.usefixtures("registered")
def test_messages_list_what_is_registered():
    assert family_names() == "qwen2, qwen3, llama, mistral, nova"
    with pytest.raises(ValueError, match="use one of: qwen2, qwen3, llama, mistral, nova"):
        get_family("supernova")
    config = Gemma2Config(**SIZES | {"num_hidden_layers": 1}, head_dim=8)
    with pytest.raises(NotImplementedError, match=r"config\.attn_logit_softcapping is 50.*use one of: .*mistral, nova"):
        Policy(Gemma2ForCausalLM(config))


@pytest.mark.usefixtures("registered")
def test_an_entry_cannot_be_replaced():
    register_family(NOVA)  # again: a plug-in may be imported twice
    with pytest.raises(ValueError, match="'llama' is registered with other attribute names"):
        register_family(Family("llama", layers="blocks"))


@pytest.mark.usefixtures("registered")
def test_rotations_and_activations_that_an_entry_does_not_name_are_not_fused():
    assert families.can_fuse(NovaConfig(**SIZES))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not families.can_fuse(NovaConfig(**SIZES, rope_parameters=dynamic))
    register_family(Family("silu_only", activations=("silu",)))
    for activation, fused in (("silu", True), ("gelu", False)):
        config = LlamaConfig(**SIZES, hidden_act=activation)
        config.model_type = "silu_only"
        assert families.can_fuse(config) == fused


def test_a_layer_that_keeps_the_groups_from_its_attention_is_refused():
    """Without its spans a layer would run plain attention over the packed axis and mix the groups."""

    class Deaf(Block):
        def forward(self, x, rotations, mask, **kwargs):
            return super().forward(x, rotations, mask)

    _, nova = make_pair()
    nova.trunk.stack["blocks"][1].__class__ = Deaf
    prompts = make_prompts((4,))
    layout = GroupLayout.pack([prompts[0].token_ids], [[[4, 5], [6]]])
    with pytest.raises(NotImplementedError, match=r"Attend does not hand .*; use one of: qwen2, qwen3, llama, mistral"):
        Policy(nova).logprobs(layout, prompts)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("grpo_core.families", ("torch", "transformers", "numpy")),
        ("grpo_core.rollout.sampler", ("grpo_core.rollout.backends.triton",)),
    ],
)
def test_imports_are_light(imported, absent):
    code = f"import sys, {imported}; sys.exit(' '.join(set({absent!r}) & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_policy_registers_nothing_with_transformers():
    code = (
        "import grpo_core.policy as policy; from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a; "
        "assert policy.ATTENTION not in a"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    Policy(make_lm())
    Policy(make_lm())
    assert "grpo_group" in ALL_ATTENTION_FUNCTIONS
