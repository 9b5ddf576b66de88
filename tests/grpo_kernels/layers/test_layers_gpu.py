"""On a GPU: the kernels of layers against float64 at the sizes of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import rms_norm, rope_append, silu_mul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


MODELS = pytest.mark.parametrize(
    ("width", "inner", "heads", "kv_heads", "head_dim"),
    [(896, 4864, 14, 2, 64), (3584, 18944, 28, 4, 128)],
    ids=["0.5B", "7B"],
)


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@MODELS
@pytest.mark.parametrize("rows", [1, 64, 513])
def test_norm_and_activation(width, inner, heads, kv_heads, head_dim, rows):
    x, residual, weight = randn(rows, width), randn(rows, width, seed=1), randn(width, seed=2)
    out, summed = rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(summed, x + residual)
    wide = summed.double()
    assert error(out, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()) < 5e-3
    gate_up = randn(rows, 2 * inner)
    gate, up = gate_up.double().chunk(2, -1)
    assert error(silu_mul(gate_up), gate * torch.sigmoid(gate) * up) < 5e-3


@MODELS
@pytest.mark.parametrize("norm", [False, True])
def test_rotation_and_append(width, inner, heads, kv_heads, head_dim, norm):
    rows, half = 96, head_dim // 2
    qkv = randn(rows, heads + 2 * kv_heads, head_dim)
    before = qkv.double()
    angles = torch.arange(2048, device="cuda")[:, None] / 1e4 ** (torch.arange(half, device="cuda") / half)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    cache = torch.full((128, 2, kv_heads, 64, head_dim), torch.nan, device="cuda", dtype=torch.bfloat16)
    positions, lengths = torch.arange(rows, device="cuda") * 20, torch.arange(rows, device="cuda") % 64 + 1
    weights = {"q_norm": randn(head_dim, seed=1), "k_norm": randn(head_dim, seed=2)} if norm else {}
    q = rope_append(qkv, cos, sin, positions, cache[:, 0], cache[:, 1], lengths, **weights)
    both = before[:, : heads + kv_heads]
    if norm:
        scales = torch.cat([weights["q_norm"].expand(heads, -1), weights["k_norm"].expand(kv_heads, -1)])
        both = both * torch.rsqrt(both.square().mean(-1, keepdim=True) + 1e-6) * scales.double()
    a, b = both.chunk(2, -1)
    c, s = (table.double()[positions, None] for table in (cos, sin))
    want = torch.cat([a * c - b * s, b * c + a * s], -1)
    assert error(q, want[:, :heads]) < 7e-3
    index = torch.arange(rows, device="cuda")
    assert torch.equal(cache[index, 0, :, lengths - 1], qkv[:, heads : heads + kv_heads])
    assert torch.equal(cache[index, 1, :, lengths - 1].double(), before[:, heads + kv_heads :])
    assert int((~cache.isnan()).sum()) == rows * 2 * kv_heads * head_dim
