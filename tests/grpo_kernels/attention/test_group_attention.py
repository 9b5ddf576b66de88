"""Group attention equals one dense mask over the packed axis: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from grpo_kernels import GroupSpans, group_attention

from .dense import EVEN, LONG, ONES, UNEVEN, assert_equals_dense, dense_attention, make, owners

layouts = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([(2, 2), (4, 2), (3, 1)]))
@example([(1, [1])], (4, 2))
@example([(3, [0, 0])], (2, 2))
@example([(4, [])], (2, 2))
def test_any_layout_equals_a_dense_mask(layout, heads):
    assert_equals_dense(GroupSpans(*zip(*layout, strict=True)), heads)


@pytest.mark.parametrize("spans", [UNEVEN, EVEN, ONES, LONG], ids=["uneven", "even", "ones", "long"])
def test_float32_equals_float64(spans):
    assert_equals_dense(spans, tolerance=1e-5, dtype=torch.float32)
    assert_equals_dense(spans, tolerance=1e-5, dtype=torch.float32, scale=0.7)


def test_bfloat16_rounds_once():
    assert_equals_dense(UNEVEN, tolerance=3e-2, dtype=torch.bfloat16)


def test_flex_attention_under_the_same_rule_agrees():
    owner, member = owners(UNEVEN)

    def rule(batch, head, query, key):
        same = (owner[query] == owner[key]) & ((member[key] == -1) | (member[query] == member[key]))
        return same & (key <= query)

    qkv, _ = make(UNEVEN, dtype=torch.float32)
    q, k, v = (x.detach().transpose(0, 1)[None] for x in qkv)
    mask = create_block_mask(rule, None, None, UNEVEN.total, UNEVEN.total, device="cpu", BLOCK_SIZE=UNEVEN.total)
    flex = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(group_attention(*qkv, UNEVEN), flex, rtol=1e-5, atol=1e-5)


def test_a_strided_input_and_an_expanded_gradient_are_taken_as_they_are():
    qkv, _ = make(UNEVEN)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv]
    group_attention(*strided, UNEVEN).sum().backward()
    dense_attention(*qkv, UNEVEN).sum().backward()
    for mine, want in zip(strided, qkv, strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-10, atol=1e-10)


def test_large_scores_keep_weights_of_both_parts_finite():
    qkv, upstream = make(UNEVEN)
    with torch.no_grad():
        qkv[0] *= 400
    out, dense = group_attention(*qkv, UNEVEN), dense_attention(*qkv, UNEVEN)
    torch.testing.assert_close(out, dense, rtol=1e-9, atol=1e-9)
    for mine, want in zip(*(torch.autograd.grad(x, qkv, upstream) for x in (out, dense)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-7, atol=1e-7)


def test_no_tensor_of_tokens_squared_is_made():
    """The largest tensor that any operator returns, at T = 1,100."""
    spans = GroupSpans([300], [[100] * 8])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return result

    qkv, upstream = make(spans, heads=(2, 2), dtype=torch.float32)
    with Watch():
        torch.autograd.grad(group_attention(*qkv, spans), qkv, upstream)
    assert largest == spans.total * 2 * 8  # the size of q


def test_one_spans_object_serves_many_layers_without_remaking_its_rows():
    spans = GroupSpans([5, 3], [[3, 1], [2, 2]])
    qkv, _ = make(spans)
    group_attention(*qkv, spans)
    cpu = torch.device("cpu")
    batches, rows = spans.self_segments.batches(cpu), spans.prompt_segments.on(cpu)
    group_attention(*qkv, spans).sum().backward()
    assert spans.self_segments.batches(cpu) is batches
    assert spans.prompt_segments.on(cpu) is rows


def test_bad_input_is_refused():
    (q, k, v), _ = make(EVEN)
    with pytest.raises(ValueError, match="add up to 19"):
        group_attention(q[:-1], k[:-1], v[:-1], EVEN)
    with pytest.raises(ValueError, match="not a multiple of 2"):
        group_attention(q[:, :3], k, v, EVEN)
    with pytest.raises(ValueError, match="k and v must be"):
        group_attention(q, k, v[:, :, :4], EVEN)


def test_a_second_derivative_is_refused():
    """Its parts' backward takes the output and the log-sum-exp for constants: it would be silently wrong."""
    qkv, upstream = make(UNEVEN)
    out = group_attention(*qkv, UNEVEN)
    for differentiated in ((out * upstream).sum(), out.square().sum()):  # upstream gradients with and without a graph
        with pytest.raises(RuntimeError, match="group_attention has no second derivative: call backward without"):
            torch.autograd.grad(differentiated, qkv, create_graph=True)
