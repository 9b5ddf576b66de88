"""Shared by the tests of layers: seeded numbers, dtypes with their tolerances, and the comparison with float64."""

from __future__ import annotations

import pytest
import torch

TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 5e-3, torch.float16: 7e-4}


DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want):
    assert got.dtype in TOLERANCE
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[got.dtype]
