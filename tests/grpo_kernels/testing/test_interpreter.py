"""The repaired interpreter multiplies and rounds bfloat16 as a GPU does, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import torch

from grpo_kernels._backend import interpreted, tl
from grpo_kernels.layers import rms_norm
from grpo_kernels.testing.interpreter import (
    InterpretedFunction,
    bfloat16_to_float32,
    float32_to_bfloat16,
    interpret,
)


def dot_kernel(a, b, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + rows * N + columns), tl.load(b + rows * N + columns))
    tl.store(out + rows * N + columns, product.to(out.dtype.element_ty))


def test_products_of_bfloat16_are_those_of_its_values():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(16, 16, dtype=dtype)
        with interpret():
            InterpretedFunction(dot_kernel)[(1,)](a=a, b=b, out=out, N=16)
        torch.testing.assert_close(out, (a.float() @ b.float()).to(dtype))


def test_rounding_to_bfloat16_is_torchs():
    values = torch.cat([torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 0.0, -0.0, torch.inf, 3.4e38])])
    bits = float32_to_bfloat16(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), values.bfloat16())
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan], np.float32)))).all()


def test_kernels_are_compiled_again_after_the_block():
    kernel, cdiv = rms_norm.rms_norm_kernel, tl.cdiv
    with interpret():
        assert interpreted()
        assert isinstance(rms_norm.rms_norm_kernel, InterpretedFunction)
    assert not interpreted()
    assert rms_norm.rms_norm_kernel is kernel
    assert tl.cdiv is cdiv
