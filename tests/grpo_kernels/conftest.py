"""Fixtures of the kernel tests: the backend under test, Triton's in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grpo_kernels._backend import interpreted
from grpo_kernels.testing.interpreter import interpret, repair_bfloat16

if interpreted():  # TRITON_INTERPRET=1: `interpret` repairs it for the blocks it is used in
    repair_bfloat16()


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations, Triton in its interpreter."""
    if request.param == "torch":
        yield "torch"
    else:
        with interpret():
            yield "triton"
