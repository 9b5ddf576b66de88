"""RMS norm with and without the residual, against float64 and transformers' rounding."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from grpo_kernels import rms_norm

from .common import DTYPES, close, randn


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


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"need x \[R, H\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, residual=torch.zeros(8, 2).t())
