"""Fixtures of the kernel tests: the backend under test, and the float64 oracle's error measure."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels.interpreter import interpret


@pytest.fixture(autouse=True)
def one_thread():
    """The suite runs in several processes, and its matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Both implementations, Triton in its interpreter."""
    if request.param == "torch":
        yield "torch"
    else:
        with interpret():
            yield "triton"
