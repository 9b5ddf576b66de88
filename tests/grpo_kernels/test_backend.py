"""Which backend a call runs on, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from grpo_kernels import choose_backend
from grpo_kernels._backend import accumulator_dtype
from grpo_kernels.testing.interpreter import interpret

CPU = torch.device("cpu")


def test_a_cpu_runs_torch_and_the_interpreter_runs_kernels():
    assert choose_backend(CPU, None, torch.float32) == "torch"
    assert choose_backend(torch.device("cuda"), None, torch.bfloat16) == "triton"
    with interpret():
        assert choose_backend(CPU, None, torch.float32) == "triton"
        assert choose_backend(CPU, "torch", torch.float32) == "torch"
        assert choose_backend(CPU, None, torch.float64) == "torch"


def test_a_backend_that_cannot_run_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        choose_backend(CPU, "cuda", torch.float32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose_backend(CPU, "triton", torch.float32)
    with pytest.raises(ValueError, match="float64 on cuda"):
        choose_backend(torch.device("cuda"), "triton", torch.float64)


def test_half_precision_is_summed_in_float32_and_float64_in_itself():
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert accumulator_dtype(half) == accumulator_dtype(half, single) == torch.float32
    assert accumulator_dtype(half, double) == torch.float64


def test_environment_variable_runs_kernels_in_the_interpreter():
    program = (
        "import torch, grpo_kernels as k\n"
        "from grpo_kernels._backend import interpreted\n"
        "from grpo_kernels.testing.interpreter import repair_bfloat16\n"
        "repair_bfloat16()\n"
        "h, w, y = torch.randn(3, 8).bfloat16(), torch.randn(70, 8).bfloat16(), torch.tensor([1, 2, 3])\n"
        "a, b = (k.linear_logprob(h, w, y, backend=n).logprob for n in ('triton', 'torch'))\n"
        "assert (a - b).abs().max() < 1e-5 and interpreted()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
