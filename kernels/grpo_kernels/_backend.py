"""Which implementation a call runs on: Triton kernels, or plain torch."""

from __future__ import annotations

from typing import Literal

import torch

from grpo_kernels.testing.interpreter import interpreted

Backend = Literal["triton", "torch"]


def choose_backend(device: torch.device, backend: Backend | None, dtype: torch.dtype) -> Backend:
    """The backend of a call: the argument if given, else Triton for CUDA tensors (or interpreted), else torch.

    float64, which is for oracles, is torch's on every device.

    Raises:
        ValueError: an unknown name, or Triton asked for on tensors that it cannot take.
    """
    able = dtype != torch.float64 and (device.type == "cuda" or interpreted())
    if backend is None:
        return "triton" if able else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"unknown backend {backend!r}: choose 'triton', 'torch' or None")
    if backend == "triton" and not able:
        raise ValueError(
            f"backend='triton' takes float16 to float32 on CUDA, got {dtype} on {device}; "
            "on a CPU set TRITON_INTERPRET=1 for the interpreter"
        )
    return backend
