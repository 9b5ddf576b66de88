"""Every provider of a softmax part gives the same: flash_attn's and torch's operators (emulated), plain products."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels.attention import group_attention as module

from .dense import EVEN, ONES, UNEVEN, assert_equals_dense


@pytest.mark.parametrize("rows", [2**26, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("spans", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_plain_products_where_no_kernel_is(monkeypatch, spans, rows):
    calls = []

    def forward(q, k, v, dropout_p, causal, *, scale):
        calls.append("forward")
        return module._matmul_forward(q, k, v, causal, scale)

    def backward(grad, q, k, v, out, lse, dropout_p, causal, *, scale):
        calls.append("backward")
        return module._matmul_backward(grad, q, k, v, out, lse, causal, scale)

    # in place of the CPU's kernel, the call that other devices get
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", backward)
    monkeypatch.setattr(module, "_MATMUL_SCORES", rows)
    assert_equals_dense(spans)
    assert set(calls) == {"forward", "backward"}


def emulated_varlen(q, k, v, cu_q, cu_k, causal, scale, grad=None, out=None, lse=None):
    """The flash operators' contract on a CPU, segment by segment between cumulative lengths."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q)
    assert cu_k[-1] == len(k)
    pieces = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        if grad is None:
            o, l = module._matmul_forward(qs, ks, vs, causal, scale)
            pieces.append((o[0].transpose(0, 1), l[0].T))
        else:
            assert lse.is_contiguous()
            g, o = (x.transpose(0, 1)[None] for x in (grad[a:b], out[a:b]))
            parts = module._matmul_backward(g, qs, ks, vs, o, lse[None, :, a:b], causal, scale)
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
    monkeypatch.setattr(module, "_flash_takes", lambda q: True)
    monkeypatch.setattr(module, "_flash_package", emulated_package if package else lambda: None)
    if not package:
        emulate_aten(monkeypatch)
    assert_equals_dense(spans)
