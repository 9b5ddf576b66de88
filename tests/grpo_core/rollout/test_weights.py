"""Fused weights against the layers that they are copies of."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_core.rollout.weights import FusedLinear, FusedModel
from tests.grpo_core.conftest import LORA_TARGETS, make_lm


def effective(module, width):
    """The matrix that a layer applies, `[in, out]`, and its bias."""
    zero = module(torch.zeros(1, width))
    return module(torch.eye(width)) - zero, zero[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "bias": "lora_only"},
        {"modules_to_save": ["lm_head", "down_proj"]},
        {"target_modules": ["lm_head", "q_proj", "gate_proj"]},
    ],
    ids=["lora", "rslora", "dora", "lora_bias", "modules_to_save", "head"],
)
def test_fused_weights_are_what_the_adapted_layers_apply(options):
    lm = make_lm("qwen2", num_hidden_layers=1)
    if "lora_bias" in options:  # an adapter's bias needs a layer that has one
        options = options | {"target_modules": ["q_proj", "v_proj"]}
    targets = [name for name in LORA_TARGETS if name not in options.get("modules_to_save", [])]
    peft = get_peft_model(lm, LoraConfig(**({"r": 4, "lora_dropout": 0.5, "target_modules": targets} | options)))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        weights, packed = FusedModel(peft.get_base_model()), FusedModel(peft.get_base_model(), packed=True)
        for disabled in (False, True):
            peft.train()
            with peft.disable_adapter() if disabled else torch.no_grad():
                weights.refresh()
                packed.refresh()
                assert all(module.training for module in peft.modules())
                peft.eval()
                layer, model = weights.layers[0], lm.model.layers[0]
                for fused, modules in {
                    layer.qkv: [model.self_attn.q_proj, model.self_attn.k_proj, model.self_attn.v_proj],
                    layer.out: [model.self_attn.o_proj],
                    layer.gate_up: [model.mlp.gate_proj, model.mlp.up_proj],
                    layer.down: [model.mlp.down_proj],
                    weights.head: [lm.get_output_embeddings()],
                }.items():
                    width = fused.weight.shape[0]
                    expected = [effective(module, width) for module in modules]
                    torch.testing.assert_close(fused.weight, torch.cat([w for w, _ in expected], 1), rtol=0, atol=2e-6)
                    bias = torch.cat([b for _, b in expected])
                    found = torch.zeros_like(bias) if fused.bias is None else fused.bias
                    torch.testing.assert_close(found, bias, rtol=0, atol=2e-6)
                for plain, other in zip(weights._linears, packed._linears, strict=True):
                    x, residual = torch.randn(5, plain.weight.shape[0]), torch.randn(5, plain.weight.shape[1])
                    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=2e-5)
                    torch.testing.assert_close(other(x, residual), plain(x, residual), rtol=0, atol=2e-5)


def test_packed_weights_follow_the_model_and_frozen_ones_are_packed_once():
    lm = make_lm("qwen2")
    lm.requires_grad_(False)
    linear = FusedLinear([lm.model.layers[0].mlp.gate_proj, lm.model.layers[0].mlp.up_proj], packed=True)
    linear.refresh()
    packed = linear._packed
    linear.refresh()
    assert linear._packed is packed
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight.zero_()
    linear.refresh()
    out = linear(torch.randn(3, 32))
    assert out[:, :48].all()
    assert not out[:, 48:].any()


def test_fused_weights_stay_at_their_addresses_and_leave_frozen_layers_alone():
    lm = make_lm("llama")
    lm.requires_grad_(False)
    weights = FusedModel(lm)
    weights.refresh()
    matrix = weights.layers[1].down.weight
    address = matrix.data_ptr()
    matrix.zero_()  # a copy would undo this
    weights.refresh()
    assert not matrix.any()
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.add_(1)
    weights.refresh()
    assert torch.equal(matrix, lm.model.layers[1].mlp.down_proj.weight.t())
    assert matrix.data_ptr() == address
