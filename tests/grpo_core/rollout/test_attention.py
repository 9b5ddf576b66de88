"""Attention during sampling against dense attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.rollout.backends import torch as torch_backend
from grpo_core.rollout.backends.torch import SequencePlan, decode_attention
from grpo_core.rollout.cache import extent

CPU = torch.device("cpu")


@given(st.integers(0, 5000))
def test_extent_covers_with_little_waste(length):
    columns = extent(length)
    assert length <= columns < length + (16 if length <= 256 else 512) + (length == 0)
    assert columns % (16 if length <= 256 else 512) == 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    prefix=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 8)]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("path", ["flash", "reference"])
def test_decode_attention_equals_dense_attention_of_each_row(path, rows, prefix, heads, seed):
    """Rows of any groups in any order, groups without rows, own lengths from 1."""
    kv_heads, heads_per_kv = heads
    torch.manual_seed(seed)
    batch, width, groups = len(rows), 16, len(prefix)
    q = torch.randn(batch, kv_heads, heads_per_kv, width, dtype=torch.float64)
    prefix_k, prefix_v = torch.randn(2, groups, kv_heads, 48, width, dtype=torch.float64)
    suffix_k, suffix_v = torch.randn(2, batch, kv_heads, 16, width, dtype=torch.float64)
    own = torch.randint(1, 17, (batch,))
    mask = torch.zeros(batch, 1, 1, 16, dtype=torch.float64)
    mask.masked_fill_(torch.arange(16) >= own[:, None, None, None], -torch.inf)
    plan = SequencePlan.build(np.array(rows), prefix, torch.float64, CPU)
    with pytest.MonkeyPatch.context() as patch:
        if path == "reference":
            patch.setattr(torch_backend, "_attend", torch_backend._attend_reference)
        out = decode_attention(q.flatten(1, 2), prefix_k, prefix_v, suffix_k, suffix_v, mask, plan)
    for i, group in enumerate(rows):
        k = torch.cat((prefix_k[group, :, : prefix[group]], suffix_k[i, :, : own[i]]), dim=1)
        v = torch.cat((prefix_v[group, :, : prefix[group]], suffix_v[i, :, : own[i]]), dim=1)
        weights = torch.softmax(q[i] @ k.transpose(1, 2) * width**-0.5, -1)
        # scores of the reference path are float32 by design
        torch.testing.assert_close(out[i], (weights @ v).flatten(), rtol=0, atol=2e-6)
