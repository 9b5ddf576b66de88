"""silu(gate) · up against float64."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import silu_mul

from .common import DTYPES, close, randn


@DTYPES
def test_silu_mul(backend, dtype):
    wide = randn(3, 3000, dtype=dtype) * 4
    x = wide[:, :2500]  # 1250 numbers: one block and a part
    gate, up = x.double().chunk(2, -1)
    close(silu_mul(x, backend=backend), gate * torch.sigmoid(gate) * up)


def test_silu_of_large_numbers_of_either_sign(backend):
    x = torch.tensor([[1e4, -1e4, 0.0, 1.0, 1.0, 3.0]])
    assert silu_mul(x, backend=backend).tolist() == [[1e4, 0.0, 0.0]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"need \[R, 2I\]"):
        silu_mul(torch.zeros(2, 7))
