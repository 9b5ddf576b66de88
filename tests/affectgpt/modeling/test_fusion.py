"""Fusion: each branch against its formula in float64, batching, and numerics."""

import pytest
import torch

from affectgpt.modeling.fusion import Fusion, FusionInput

VISUAL, AUDIO, HIDDEN, STEPS = 7, 5, 11, 8


@pytest.fixture
def fusion() -> Fusion:
    torch.manual_seed(0)
    return Fusion(VISUAL, AUDIO, HIDDEN)


def visual(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(STEPS, VISUAL)


def audio() -> torch.Tensor:
    return torch.randn(STEPS, AUDIO)


def linear(fusion: Fusion, name: str, x: torch.Tensor) -> torch.Tensor:
    layer = getattr(fusion, name)
    return layer.weight.double() @ x.double() + layer.bias.double()


def attended(fusion: Fusion, layer: str, h: torch.Tensor) -> torch.Tensor:
    return sum(linear(fusion, layer, row) * row.double() for row in h)


def expected(fusion: Fusion, item: FusionInput) -> torch.Tensor:
    """The formulas one prompt and one time step at a time, in float64."""
    if item.branch == "image":
        return linear(fusion, "image_llama_proj", item.visual[0])
    if item.branch == "video":
        return linear(fusion, "affectgpt_proj", attended(fusion, "video_attention_mlp", item.visual))
    if item.branch == "audio":
        return linear(fusion, "audio_llama_proj", attended(fusion, "audio_attention_mlp", item.audio))
    seen = linear(fusion, "multi_video_embs", item.visual.double().mean(0))
    heard = linear(fusion, "multi_audio_embs", item.audio.double().mean(0))
    weights = linear(fusion, "fc_att", linear(fusion, "attention_mlp", torch.cat([seen, heard])))
    return linear(fusion, "multi_llama_proj", weights[0] * seen + weights[1] * heard)


def mixture() -> list[FusionInput]:
    return [
        FusionInput("multi", visual(), audio()),
        FusionInput("video", visual()),
        FusionInput("audio", audio=audio()),
        FusionInput("image", torch.randn(1, VISUAL)),
        FusionInput("video", visual()),
        FusionInput("multi", visual(), audio()),
    ]


def test_every_branch_follows_its_formula_in_any_mixture(fusion):
    inputs = mixture()
    out = fusion(inputs)
    reference = torch.stack([expected(fusion, item) for item in inputs])
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-6)


def test_weights_are_signed_and_do_not_sum_to_one(fusion):
    """Without softmax, doubling h quadruples what the attention adds (its bias aside)."""
    torch.nn.init.zeros_(fusion.video_attention_mlp.bias)
    torch.nn.init.zeros_(fusion.affectgpt_proj.bias)
    h = visual()
    one, two, negated = fusion([FusionInput("video", h), FusionInput("video", 2 * h), FusionInput("video", -h)])
    torch.testing.assert_close(two, 4 * one)
    torch.testing.assert_close(negated, one)


def test_multi_weighs_the_visual_side_first(fusion):
    with torch.no_grad():
        fusion.fc_att.weight.zero_()
        fusion.fc_att.bias.copy_(torch.tensor([1.0, 0.0]))
    seen = visual()
    out = fusion([FusionInput("multi", seen, audio()), FusionInput("multi", seen, audio())])
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0], fusion.multi_llama_proj(fusion.multi_video_embs(seen.mean(0))))


def test_gradients_reach_all_twenty_tensors(fusion):
    fusion(mixture()).square().sum().backward()
    gradients = {name: p.grad for name, p in fusion.named_parameters()}
    assert len(gradients) == 20
    assert all(g.abs().sum() > 0 for g in gradients.values())


def test_large_features_stay_exact_under_autocast_and_take_the_weights_dtype(fusion):
    item = FusionInput("video", visual(scale=300.0).half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion([item])
    assert out.dtype == torch.float32
    assert out.abs().max() > 1e4
    torch.testing.assert_close(out[0].double(), expected(fusion, item), rtol=1e-4, atol=1e-1)


def test_no_inputs_give_no_vectors(fusion):
    assert fusion([]).shape == (0, HIDDEN)
