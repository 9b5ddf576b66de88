"""Group attention equals one dense mask over the packed axis: values and gradients, on every provider of its parts."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from grpo_kernels import GroupSpans, group_attention
from grpo_kernels.attention import varlen as varlen_attention

UNEVEN = GroupSpans([5, 1, 3, 1], [[3, 1, 0, 6], [2, 2], [], [0]])
EVEN = GroupSpans([7], [[4, 4, 4]])
ONES = GroupSpans([1, 1], [[1], [1]])
LONG = GroupSpans([150], [[140, 2, 2]])


def owners(spans: GroupSpans) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T]` group of each row, and its member (-1 in the prompt)."""
    owner, member = [], []
    for n, (prompt, lengths) in enumerate(zip(spans.prompt_lengths, spans.completion_lengths, strict=True)):
        owner += [n] * (prompt + sum(lengths))
        member += [-1] * prompt + [g for g, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(owner), torch.tensor(member)


def dense_attention(q, k, v, spans: GroupSpans, scale: float | None = None) -> torch.Tensor:
    owner, member = owners(spans)
    mask = (owner[:, None] == owner) & ((member == -1) | (member[:, None] == member))
    mask = mask.tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def make(spans: GroupSpans, heads=(4, 2), width=8, dtype=torch.float64):
    """q, k, v as leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(spans.total)
    shapes = [(spans.total, heads[0], width)] + 2 * [(spans.total, heads[1], width)]
    qkv = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
    return qkv, torch.randn(shapes[0], generator=generator, dtype=dtype)


def assert_equals_dense(spans: GroupSpans, heads=(4, 2), tolerance=1e-10, dtype=torch.float64, **options):
    qkv, upstream = make(spans, heads, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, dense = group_attention(*qkv, spans, **options), dense_attention(*wide, spans, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(out, qkv, upstream), torch.autograd.grad(dense, wide, upstream.double())
    for name, mine, want in zip("qkv", *gradients, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


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


def test_one_spans_object_serves_many_layers_without_remaking_its_rows(monkeypatch):
    spans = GroupSpans([5, 3], [[3, 1], [2, 2]])
    qkv, _ = make(spans)
    group_attention(*qkv, spans)
    made = (spans.own.batches(torch.device("cpu"), True), spans.over_prompt.on(torch.device("cpu")))
    group_attention(*qkv, spans).sum().backward()
    assert spans.own.batches(torch.device("cpu"), True) is made[0]
    assert spans.over_prompt.on(torch.device("cpu")) is made[1]


@pytest.mark.parametrize("rows", [2**26, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("spans", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_plain_products_where_no_kernel_is(monkeypatch, spans, rows):
    monkeypatch.setattr(varlen_attention, "_cpu_forward", varlen_attention._matmul_forward)
    monkeypatch.setattr(varlen_attention, "_cpu_backward", varlen_attention._matmul_backward)
    monkeypatch.setattr(varlen_attention, "_MATMUL_SCORES", rows)
    assert_equals_dense(spans)


def emulated_varlen(q, k, v, cu_q, cu_k, causal, scale, grad=None, out=None, lse=None):
    """The flash operators' contract on a CPU, segment by segment between cumulative lengths."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q)
    assert cu_k[-1] == len(k)
    pieces = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        if grad is None:
            o, l = varlen_attention._matmul_forward(qs, ks, vs, causal, scale)
            pieces.append((o[0].transpose(0, 1), l[0].T))
        else:
            assert lse.is_contiguous()
            g, o = (x.transpose(0, 1)[None] for x in (grad[a:b], out[a:b]))
            parts = varlen_attention._matmul_backward(g, qs, ks, vs, o, lse[None, :, a:b], causal, scale)
            pieces.append([x[0].transpose(0, 1) for x in parts])
    joined = [torch.cat(x) for x in zip(*pieces, strict=True)]
    return (joined[0], joined[1].T.contiguous()) if grad is None else joined


def emulated_package():
    """Functions with the signatures of flash_attn_interface (2.7 and 2.8)."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert dropout_p == 0
        out, lse = emulated_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)
        return out, lse, None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)
        for target, x in zip((dq, dk, dv), emulated_varlen(*arguments, dout, out, softmax_lse), strict=True):
            target.copy_(x)

    return SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)


def emulate_aten(monkeypatch):
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
        out, lse = emulated_varlen(q, k, v, cu_q, cu_k, is_causal, scale)
        return out, lse, None, None, None

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale):
        return tuple(emulated_varlen(q, k, v, cu_q, cu_k, is_causal, scale, grad, out, lse))

    for name, function in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward)):
        # the emulation takes a prefix of the operator's own arguments
        schema = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments if not a.kwarg_only]
        assert len(schema) == len([p for p in inspect.signature(function).parameters.values() if p.kind != 3])
        monkeypatch.setattr(torch.ops.aten, name, function)


@pytest.mark.parametrize("package", [True, False], ids=["flash_attn", "aten"])
@pytest.mark.parametrize("spans", [UNEVEN, EVEN, ONES], ids=["uneven", "even", "ones"])
def test_two_varlen_calls_are_all_that_a_flash_operator_is_asked_for(monkeypatch, spans, package):
    monkeypatch.setattr(varlen_attention, "_flash_takes", lambda q: True)
    monkeypatch.setattr(varlen_attention, "_flash_package", emulated_package if package else lambda: None)
    if not package:
        emulate_aten(monkeypatch)
    assert_equals_dense(spans)


@pytest.mark.gpu
@pytest.mark.parametrize("package", [True, False], ids=["flash_attn", "aten"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["mha", "gqa"])
def test_flash_operators_on_a_gpu_equal_a_dense_mask(monkeypatch, heads, package):
    if package and varlen_attention._flash_package() is None:
        pytest.skip("flash_attn is not installed")
    if not package:
        monkeypatch.setattr(varlen_attention, "_flash_package", lambda: None)
    for spans in (UNEVEN, EVEN, ONES, GroupSpans([300, 1], [[100, 7, 1, 0], [64] * 4])):
        qkv, upstream = make(spans, heads, width=64, dtype=torch.bfloat16)
        wide = [x.detach().double().requires_grad_() for x in qkv]
        cuda = [x.detach().cuda().requires_grad_() for x in qkv]
        out, dense = group_attention(*cuda, spans), dense_attention(*wide, spans)
        pairs = [(out, dense)]
        pairs += zip(
            torch.autograd.grad(out, cuda, upstream.cuda()),
            torch.autograd.grad(dense, wide, upstream.double()),
            strict=True,
        )
        for mine, want in pairs:
            assert (mine.detach().cpu().double() - want).norm() < 1e-2 * want.norm()


def test_bad_input_is_refused():
    (q, k, v), _ = make(EVEN)
    with pytest.raises(ValueError, match="add up to 19"):
        group_attention(q[:-1], k[:-1], v[:-1], EVEN)
    with pytest.raises(ValueError, match="no multiple of 2"):
        group_attention(q[:, :3], k, v, EVEN)
    with pytest.raises(ValueError, match="k and v must be"):
        group_attention(q, k, v[:, :, :4], EVEN)
