"""Gumbel noise: Philox words as the engine's random numbers have them, and the kernel's float32 beside float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_kernels._backend import tl
from grpo_kernels.sampling import gumbel
from grpo_kernels.sampling.gumbel import gumbel_noise_reference
from grpo_kernels.testing.interpreter import InterpretedFunction, interpret


def noise_kernel(out, key, token, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(out + column, gumbel.gumbel_noise(key, token, column))


def test_noise_is_that_of_the_engines_random_numbers():
    """Kernels keep their own Philox: the engine's is NumPy on the host."""
    rng = pytest.importorskip("grpo_core.rng")
    member = np.arange(5)
    keys = rng.row_key(7, 3, rng.prompt_key("a"), member)
    u = rng.uniform(7, 3, rng.prompt_key("a"), member[:, None], 9, np.arange(40))
    noise = gumbel_noise_reference(
        torch.from_numpy(keys.view(np.int64))[:, None], torch.full((5, 1), 9), torch.arange(40)
    )
    np.testing.assert_allclose(noise.numpy(), -np.log(-np.log(u)), rtol=1e-9, atol=1e-9)


def test_the_kernels_noise_is_the_references_up_to_float32():
    """Also near u = 1, where noise is large and rare: 2¹⁶ draws reach u within 2⁻¹⁵ of either end."""
    count, key = 1 << 16, (5 << 33) + 11
    out = torch.full((count,), torch.nan)
    with interpret():
        InterpretedFunction(noise_kernel)[(1,)](out=out, key=key, token=3, N=count)
    want = gumbel_noise_reference(torch.tensor(key), torch.tensor(3), torch.arange(count))
    assert want.max() > 10
    assert want.min() < -2
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
