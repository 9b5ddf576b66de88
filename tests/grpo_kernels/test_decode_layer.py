"""The element-wise kernels of a decode step against float64, and record_tokens against plain bookkeeping."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from grpo_kernels import RowState, record_tokens, rms_norm, rope_append, silu_mul
from grpo_kernels.testing.interpreter import interpret

TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want):
    assert got.dtype in TOLERANCE
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[got.dtype]


@DTYPES
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add"])
def test_rms_norm(backend, dtype, add):
    wide = randn(5, 90, dtype=dtype) * 3
    x, weight, residual = wide[:, :37], randn(37, dtype=dtype, seed=1), randn(5, 37, dtype=dtype, seed=2)
    out, summed = rms_norm(x, weight, 1e-5, residual=residual if add else None, backend=backend)
    want = x.double() + residual.double() if add else x.double()
    close(summed, want)
    want = summed.double()
    close(out, want * torch.rsqrt(want.square().mean(-1, keepdim=True) + 1e-5) * weight.double())


def test_a_row_of_zeros_is_normalised_to_zeros(backend):
    out, _ = rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, backend=backend)
    assert torch.equal(out, torch.zeros(2, 8))


def test_rows_are_rounded_as_transformers_rounds_them(backend):
    """In bfloat16, bit for bit: what sampler and trainer see must not differ for want of a rounding."""
    norm = Qwen3RMSNorm(48, eps=1e-6)
    norm.weight.data = randn(48, dtype=torch.bfloat16, seed=1)
    x, residual = randn(9, 48, dtype=torch.bfloat16), randn(9, 48, dtype=torch.bfloat16, seed=2)
    out, summed = rms_norm(x, norm.weight.data, 1e-6, residual=residual, backend=backend)
    assert torch.equal(summed, x + residual)
    differ = (out != norm(x + residual)).float().mean()  # 1/√ is taken by other means: a rounding may tip
    assert differ < 0.01


@DTYPES
def test_silu_mul(backend, dtype):
    wide = randn(3, 3000, dtype=dtype) * 4
    x = wide[:, :2500]  # 1250 numbers: one block and a part
    gate, up = x.double().chunk(2, -1)
    close(silu_mul(x, backend=backend), gate * torch.sigmoid(gate) * up)


def test_silu_of_large_numbers_of_either_sign(backend):
    x = torch.tensor([[1e4, -1e4, 0.0, 1.0, 1.0, 3.0]])
    assert silu_mul(x, backend=backend).tolist() == [[1e4, 0.0, 0.0]]


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


def test_recording_advances_rows_that_go_on_and_leaves_the_others(backend):
    ended = [0, 0, 0, 1, 0]
    state = RowState(*(torch.tensor(x) for x in ([9] * 5, [0] * 5, [0, 4, 1, 2, 3], [7, 8, 9, 10, 11], ended)))
    end = torch.tensor([False, False, True, False])
    record, seen = torch.full((2, 8), -1, dtype=torch.int32), torch.zeros(5, 4, dtype=torch.bool)
    token = torch.tensor([1, 3, 2, 1, 77])  # a row of NaN draws anything
    logprob = torch.tensor([-0.5, -1.0, -2.0, -3.0, torch.nan])
    record_tokens(token, logprob, state, end, 5, record, seen=seen, backend=backend)
    assert state.last.tolist() == [1, 3, 2, 0, 3]
    assert state.drawn.tolist() == [1, 5, 2, 2, 4]
    assert state.position.tolist() == [8, 9, 10, 10, 12]
    assert state.ended.tolist() == [0, 1, 1, 1, 0]  # going on, length, end token, before, going on
    assert record[0].tolist() == [1, 3, 2, 1, 3, -1, -1, -1]
    torch.testing.assert_close(record[1, :5].view(torch.float32), logprob, equal_nan=True)
    assert seen.nonzero().tolist() == [[0, 1], [1, 3], [2, 2], [4, 3]]


def test_many_rows_are_recorded(backend):
    count = 600
    state = RowState(*torch.zeros(5, count, dtype=torch.int64).unbind())
    record, tokens = torch.zeros(2, count, dtype=torch.int32), torch.arange(count)
    end = torch.zeros(count, dtype=torch.bool)
    record_tokens(tokens, tokens.float(), state, end, 2, record, backend=backend)
    assert torch.equal(state.last, tokens)
    assert torch.equal(record[1].view(torch.float32), tokens.float())
    assert not state.ended.any()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"need x \[R, H\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, residual=torch.zeros(8, 2).t())
    with pytest.raises(ValueError, match=r"need \[R, 2I\]"):
        silu_mul(torch.zeros(2, 7))
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
