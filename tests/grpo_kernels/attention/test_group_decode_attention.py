"""One decode step over shared prompts: both backends against float64 softmax over each row's own copy of its keys."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_kernels import GroupRows, group_decode_attention, group_decode_attention_reference
from grpo_kernels.testing.interpreter import interpret

module = importlib.import_module("grpo_kernels.attention.group_decode_attention")


def make(heads=(6, 2), width=16, prefixes=(300, 1, 17), groups=(0, 2, 0, 1, 0, 0), dtype=torch.float32, room=(320, 70)):
    """A cache as the decoder keeps it (keys and values interleaved, one of two layers), NaN behind every length."""
    generator = torch.Generator().manual_seed(1)
    query_heads, kv_heads = heads
    suffixes = torch.tensor([0, 1, 70, 5, 64, 65][: len(groups)])
    prefixes = torch.tensor(prefixes)
    prefix = torch.randn(2, len(prefixes), 2, kv_heads, room[0], width, generator=generator).to(dtype)
    suffix = torch.randn(2, len(groups), 2, kv_heads, room[1], width, generator=generator).to(dtype)
    for cache, lengths in ((prefix, prefixes), (suffix, suffixes)):
        behind = torch.arange(cache.shape[4]) >= lengths[:, None]
        cache.masked_fill_(behind[None, :, None, None, :, None], torch.nan)
    qkv = torch.randn(len(groups), query_heads + 2 * kv_heads, width, generator=generator).to(dtype)
    rows = GroupRows.sort(torch.tensor(groups), len(prefixes), widest=max(map(groups.count, groups)))
    return (
        qkv[:, :query_heads],
        prefix[1, :, 0],
        prefix[1, :, 1],
        prefixes,
        suffix[1, :, 0],
        suffix[1, :, 1],
        suffixes,
        rows,
    )


def oracle(q, prefix_k, prefix_v, prefixes, suffix_k, suffix_v, suffixes, rows, scale=None):
    outputs = []
    for row, group in enumerate(rows.group_of_row):
        p, s = prefixes[group], suffixes[row]
        k, v = (
            torch.cat([a[group, :, :p], b[row, :, :s]], 1).double().repeat_interleave(q.shape[1] // a.shape[1], 0)
            for a, b in ((prefix_k, suffix_k), (prefix_v, suffix_v))
        )
        scores = (k @ q[row].double()[..., None])[..., 0] * (q.shape[2] ** -0.5 if scale is None else scale)
        outputs.append((scores.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(outputs)


def error(inputs, **options):
    got = group_decode_attention(*inputs, **options)
    assert got.dtype == inputs[0].dtype
    options.pop("backend", None)
    want = oracle(*inputs, **options)
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (7, 1)], ids=["gqa", "mha", "mqa"])
def test_rows_of_several_groups_of_different_length(backend, heads):
    assert error(make(heads), backend=backend) < 5e-7


@pytest.mark.parametrize("width", [8, 24, 64])
def test_head_sizes_that_are_no_power_of_two(backend, width):
    assert error(make(width=width), backend=backend, scale=0.3) < 5e-7


def test_bfloat16(backend):
    assert error(make(dtype=torch.bfloat16), backend=backend) < 4e-3


def test_float64_is_the_references():
    assert error(make(dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("processors", [1, 4, 100])
def test_a_prompt_may_be_split_at_any_place(monkeypatch, processors):
    splits = []

    def split(columns, programs, device):
        splits.append(max(16, columns // processors))
        return splits[-1]

    monkeypatch.setattr(module, "_split", split)
    with interpret():
        assert error(make(), backend="triton") < 5e-7
    assert splits == [max(16, 320 // processors)]


def test_splits_fill_the_processors_without_getting_short(monkeypatch):
    monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("", (), {"multi_processor_count": 132})
    )
    assert module._split(1024, 4, torch.device("cpu")) == 128  # one 7B group: 4 · 8 programs
    assert module._split(1024, 64, torch.device("cpu")) == 256  # 16 groups: 64 · 4
    assert module._split(1024, 4096, torch.device("cpu")) == 1024
    assert module._split(100, 4, torch.device("cpu")) == 128


def test_more_rows_than_a_tile_and_a_loose_bound_of_the_widest_group(backend):
    inputs = list(make(heads=(14, 2), prefixes=(40, 5), groups=(0,) * 5 + (1,), room=(64, 70)))
    assert error(inputs, backend=backend) < 5e-7
    inputs[-1] = inputs[-1]._replace(widest=40)  # 280 query rows: three tiles, two of them empty
    assert error(inputs, backend=backend) < 5e-7


def test_a_group_without_rows_is_skipped(backend):
    assert error(make(prefixes=(9, 20, 30), groups=(2, 0, 2)), backend=backend) < 5e-7


def test_a_row_does_not_depend_on_its_neighbours(backend):
    inputs = make()
    whole = group_decode_attention(*inputs, backend=backend)
    pick = torch.tensor([4, 1])
    q, pk, pv, pl, sk, sv, sl, rows = inputs
    some = GroupRows.sort(rows.group_of_row[pick], 3, 1)
    part = group_decode_attention(q[pick], pk, pv, pl, sk[pick], sv[pick], sl[pick], some, backend=backend)
    torch.testing.assert_close(part, whole[pick], rtol=1e-6, atol=1e-6)


def test_a_row_without_a_group_sees_its_own_tokens_alone(backend):
    """Rows that fill a batch up to the size a graph was captured for."""
    q, pk, pv, pl, sk, sv, sl, rows = make()
    rows = GroupRows.sort(torch.tensor([0, -1, -1, 1, 0, 0]), 3, widest=4)
    sl = sl.clamp(min=1)
    sk, sv = sk.nan_to_num(0.5), sv.nan_to_num(0.5)
    out = group_decode_attention(q, pk, pv, pl, sk, sv, sl, rows, backend=backend)
    k, v = (x[2].double().repeat_interleave(3, 0)[:, : sl[2]] for x in (sk, sv))
    weights = torch.softmax((k @ q[2].double()[..., None])[..., 0] * 16**-0.5, -1)
    torch.testing.assert_close(out[2].double(), (weights[:, None] @ v)[:, 0], rtol=1e-5, atol=1e-6)
    with_groups = [0, 3, 4, 5]
    want = oracle(q, pk, pv, pl, sk, sv, sl, rows)[with_groups]
    torch.testing.assert_close(out[with_groups].double(), want, rtol=1e-5, atol=1e-6)


def test_rows_are_sorted_by_group():
    rows = GroupRows.sort(torch.tensor([2, 0, 2, 3, 0]), 5, widest=2)
    assert rows.order.tolist() == [1, 4, 0, 2, 3]
    assert rows.starts.tolist() == [0, 2, 2, 4, 5, 5]
    rows = GroupRows.sort(torch.tensor([1, -1, 0, -1]), 2, widest=1)
    assert rows.order.tolist() == [1, 3, 2, 0]
    assert rows.starts.tolist() == [2, 3, 4]


def test_the_decoders_own_attention_agrees():
    """The engine's CPU path and this one read the same cache."""
    attention = pytest.importorskip("grpo_core.rollout.backends.torch")
    q, pk, pv, pl, sk, sv, sl, rows = make(heads=(6, 2), room=(512, 80))
    pk, pv, sk, sv = (x.nan_to_num(0.0) for x in (pk, pv, sk, sv))
    sl = sl.clamp(min=1)  # a step appends its own token first
    plan = attention.SequencePlan.build(rows.group_of_row.long().numpy(), pl.tolist(), q.dtype, q.device)
    mask = torch.zeros(6, 1, 1, 80).masked_fill_(torch.arange(80) >= sl[:, None, None, None], -torch.inf)
    theirs = attention.decode_attention(q, pk, pv, sk, sv, mask, plan).view(q.shape)
    mine = group_decode_attention_reference(q, pk, pv, pl, sk, sv, sl, rows)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused():
    q, pk, pv, pl, sk, sv, sl, rows = make()
    with pytest.raises(ValueError, match="not a multiple"):
        group_decode_attention(q[:, :5], pk, pv, pl, sk, sv, sl, rows)
    with pytest.raises(ValueError, match=r"need prefix_lengths \[3\]"):
        group_decode_attention(q, pk, pv, pl[:2], sk, sv, sl, rows)
    with pytest.raises(ValueError, match="suffix"):
        group_decode_attention(q, pk, pv, pl, sk[:2], sv[:2], sl, rows)
    with pytest.raises(ValueError, match="same shape"):
        group_decode_attention(q, pk, pv[:, :, :5], pl, sk, sv, sl, rows)
    with pytest.raises(ValueError, match="last stride"):
        group_decode_attention(q, pk, pv.transpose(2, 3).contiguous().transpose(2, 3), pl, sk, sv, sl, rows)
