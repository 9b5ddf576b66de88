"""Head norms, rotation and cache writes against float64 and transformers' rotation."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from grpo_kernels import rope_append
from grpo_kernels.testing.interpreter import interpret

from .common import DTYPES, close, randn


def make_rope(dtype, width, tokens=6, heads=4, kv_heads=2, rows=9, columns=11):
    qkv = randn(tokens, heads + 2 * kv_heads + 1, width, dtype=dtype)[:, :-1]
    angles = torch.arange(40)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
    cache = torch.full((2, rows, 2, kv_heads, columns, width), torch.nan, dtype=dtype)[1]
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), cache[:, 0], cache[:, 1]


@DTYPES
@pytest.mark.parametrize(("width", "norm"), [(16, False), (24, True)], ids=["rope", "head norm"])
@pytest.mark.parametrize("scatter", [False, True], ids=["own row", "given row"])
def test_rope_append(backend, dtype, width, norm, scatter):
    qkv, cos, sin, keys, values = make_rope(dtype, width)
    before = qkv.clone()
    positions = torch.tensor([0, 3, 39, 7, 7, 1])
    lengths = torch.tensor([1, 11, 5, 6, 2, 1], dtype=torch.int32)
    rows = torch.tensor([8, 0, 2, 2, 2, 5]) if scatter else torch.arange(6)
    weights = (randn(width, dtype=dtype, seed=3), randn(width, dtype=dtype, seed=4)) if norm else (None, None)
    q = rope_append(
        qkv, cos, sin, positions, keys, values, lengths,
        cache_rows=rows if scatter else None, q_norm=weights[0], k_norm=weights[1], eps=1e-5, backend=backend,
    )  # fmt: skip
    x = before.double()
    q_, k_, _ = x.split((4, 2, 2), 1)
    if norm:
        q_, k_ = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * w.double()
                  for y, w in zip((q_, k_), weights, strict=True))  # fmt: skip
    both = (torch.cat((table, table), -1).double()[positions] for table in (cos, sin))
    q_, k_ = (y[0] for y in apply_rotary_pos_emb(q_[None], k_[None], *(t[None] for t in both), unsqueeze_dim=2))
    close(q, q_)
    close(qkv[:, 4:6], k_)
    assert q.data_ptr() == qkv.data_ptr()
    assert torch.equal(qkv[:, 6:], before[:, 6:])
    assert torch.equal(keys[rows, :, lengths.long() - 1], qkv[:, 4:6])
    assert torch.equal(values[rows, :, lengths.long() - 1], qkv[:, 6:])
    assert int((~keys.isnan()).sum()) == int((~values.isnan()).sum()) == 6 * 2 * width  # and nowhere else


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (9, 3)])
def test_heads_of_any_number(backend, heads, kv_heads):
    qkv, cos, sin, keys, values = make_rope(torch.float32, 16, heads=heads, kv_heads=kv_heads)
    before, positions = qkv.clone(), torch.arange(6) * 5
    weights = randn(2, 16, seed=3).unbind()
    rope_append(
        qkv, cos, sin, positions, keys, values, positions.clamp(1, 9), q_norm=weights[0], k_norm=weights[1],
        backend=backend,
    )  # fmt: skip
    wide = before.double()
    both = torch.cat([weights[0].expand(heads, -1), weights[1].expand(kv_heads, -1)]).double()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    a, b = (wide[:, : heads + kv_heads] * both).chunk(2, -1)
    c, s = (table.double()[positions, None] for table in (cos, sin))
    close(qkv[:, : heads + kv_heads], torch.cat([a * c - b * s, b * c + a * s], -1))
    assert torch.equal(keys[torch.arange(6), :, positions.clamp(1, 9) - 1], qkv[:, heads : heads + kv_heads])
    assert torch.equal(values[torch.arange(6), :, positions.clamp(1, 9) - 1], before[:, heads + kv_heads :])


def test_rotation_rounds_as_transformers_does(backend):
    qkv, cos, sin, keys, values = make_rope(torch.bfloat16, 16)
    positions = torch.tensor([0, 3, 39, 7, 7, 1])
    tables = (torch.cat((table, table), -1)[positions][None] for table in (cos, sin))
    want = apply_rotary_pos_emb(qkv[None, :, :4].clone(), qkv[None, :, 4:6].clone(), *tables, unsqueeze_dim=2)
    rope_append(qkv, cos, sin, positions, keys, values, positions.clamp(1, 9), backend=backend)
    assert torch.equal(qkv[:, :4], want[0][0])
    assert torch.equal(qkv[:, 4:6], want[1][0])


def test_bad_input_is_refused():
    qkv, cos, sin, keys, values = make_rope(torch.float32, 16)
    index = torch.ones(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="keys and values"):
        rope_append(qkv, cos, sin, index, keys, values[..., :8], index)
    with pytest.raises(ValueError, match=r"positions and lengths \[6\]"):
        rope_append(qkv, cos, sin, index[:5], keys, values, index)
    with pytest.raises(ValueError, match="both head norms or none"):
        rope_append(qkv, cos, sin, index, keys, values, index, q_norm=torch.ones(16))
    with pytest.raises(ValueError, match="heads must be contiguous"):
        rope_append(qkv.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, index, keys, values, index)


def test_the_kernels_refuse_nothing_that_a_step_gives_them():
    """A step's own views: a cache of all layers, keys and values interleaved, rows beyond the batch."""
    cache = torch.zeros(2, 8, 2, 2, 16, 16)
    index = torch.ones(3, dtype=torch.int64)
    with interpret():
        qkv = randn(3, 8 * 16).view(3, 8, 16)
        before = qkv[:, 6:].clone()
        rope_append(qkv, *torch.ones(2, 4, 8), index, cache[1, :, 0], cache[1, :, 1], index, backend="triton")
    assert torch.equal(cache[1, :3, 1, :, 0], before)
    assert not cache[0].any()
