"""Which implementation a call runs on, Triton kernels or plain torch; and Triton itself, where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    # Triton exists for Linux alone. Elsewhere modules import too: their kernels stay functions, which nothing calls
    if not TYPE_CHECKING:
        triton = SimpleNamespace(jit=lambda kernel: kernel)
        tl = TensorDescriptor = None

__all__ = [
    "FLOAT_DTYPES",
    "GRAPH_BREAK",
    "HAS_TRITON",
    "SECOND_DERIVATIVE",
    "Backend",
    "TensorDescriptor",
    "accumulator_dtype",
    "choose_backend",
    "interpreted",
    "refuse_gradient",
    "tl",
    "triton",
]

HAS_TRITON = tl is not None
Backend = Literal["triton", "torch"]
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

GRAPH_BREAK = "grpo_kernels' heads run outside the graph: call them in a function compiled without fullgraph=True"
"""The reason `torch.compiler.disable` is given; torch prints it where `fullgraph=True` forbids a graph break."""

SECOND_DERIVATIVE = "grpo_kernels' losses and log-probs have no second derivative: call backward without create_graph"
"""What backward passes raise where gradients are recorded: they would be constants, and what needs them wrong."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 at Triton's import, or `testing.interpret()`."""
    return HAS_TRITON and triton.knobs.runtime.interpret


def choose_backend(device: torch.device, backend: Backend | None, dtype: torch.dtype) -> Backend:
    """Choose a call's backend: the argument if given, else Triton for CUDA tensors (or interpreted), else torch.

    float64, which is for oracles, runs on torch on every device.

    Raises:
        ValueError: an unknown name, or Triton asked for where it is not installed or on tensors it cannot take.
    """
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"unknown backend {backend!r}: choose 'triton', 'torch' or None")
    # float64 is for oracles: kernels accumulate in float32. CPU tensors run in the interpreter alone
    able = HAS_TRITON and dtype != torch.float64 and (device.type == "cuda" or triton.knobs.runtime.interpret)
    if backend is None:
        return "triton" if able else "torch"
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs Triton, which is not installed here: use backend='torch' or None")
    if backend == "triton" and not able:
        raise ValueError(
            f"backend='triton' takes float16 to float32 on CUDA, got {dtype} on {device}; "
            "on a CPU call it inside grpo_kernels.testing.interpreter.interpret(), or with TRITON_INTERPRET=1"
        )
    return backend


def refuse_gradient(operation: str, *inputs: Tensor | None) -> None:
    """Refuse inputs that autograd follows: a kernel without a backward would give it a constant, in silence.

    Raises:
        ValueError: gradients are recorded, and an input needs one.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError(
            f"{operation} has no gradient on Triton: call it under torch.no_grad(), or with backend='torch'"
        )


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """Precision that products of `tensors` are summed in: float64 if any of them is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
