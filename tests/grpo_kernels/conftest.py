"""Fixtures of the kernel tests: the backend under test, and the float64 oracle's error measure."""

from __future__ import annotations

import pytest

from grpo_kernels.testing.interpreter import interpret


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Both implementations, Triton in its interpreter."""
    if request.param == "torch":
        yield "torch"
    else:
        with interpret():
            yield "triton"
