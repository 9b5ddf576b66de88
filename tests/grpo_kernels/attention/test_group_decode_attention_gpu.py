"""On a GPU: attention of a decode step against float64 at the head sizes of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import GroupRows, group_decode_attention

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
@pytest.mark.parametrize(("groups", "members"), [(1, 16), (5, 16), (3, 40)])
def test_attention(width, inner, heads, kv_heads, head_dim, groups, members):
    rows = groups * members
    q = randn(rows, heads, head_dim)
    prefix, suffix = randn(groups, 2, kv_heads, 1024, head_dim), randn(rows, 2, kv_heads, 256, head_dim, seed=1)
    prefixes = torch.tensor([1024, 1, 700, 513, 128], device="cuda")[:groups]
    suffixes = torch.arange(rows, device="cuda") * 7 % 256 + 1
    group_of_row = torch.arange(rows, device="cuda") % groups
    group_of_row[-1] = -1
    arrangement = GroupRows.sort(group_of_row, groups, members)
    out = group_decode_attention(
        q, prefix[:, 0], prefix[:, 1], prefixes, suffix[:, 0], suffix[:, 1], suffixes, arrangement
    )
    for row in range(rows):
        group, own = int(group_of_row[row]), int(suffixes[row])
        parts = [suffix[row, :, :, :own]] + ([prefix[group, :, :, : prefixes[group]]] if group >= 0 else [])
        k, v = torch.cat(parts, 2).double().repeat_interleave(heads // kv_heads, 1)
        weights = torch.softmax((k @ q[row].double()[..., None])[..., 0] * head_dim**-0.5, -1)
        assert error(out[row], (weights[:, None] @ v)[:, 0]) < 8e-3
