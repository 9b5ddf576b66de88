"""Which implementation a call runs on: Triton kernels, or plain torch."""

from __future__ import annotations

import os
from typing import Literal

import torch

Backend = Literal["triton", "torch"]


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (`TRITON_INTERPRET=1`, read by Triton at import)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def choose_backend(device: torch.device, backend: Backend | None = None) -> Backend:
    """The backend of a call on `device`: the argument if given, else Triton on CUDA (or interpreted), else torch.

    Raises:
        ValueError: an unknown name, or Triton asked for on tensors that it cannot reach.
    """
    if backend is None:
        return "triton" if device.type == "cuda" or interpreted() else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"unknown backend {backend!r}: choose 'triton', 'torch' or None")
    if backend == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"backend='triton' needs CUDA tensors, got {device}; on a CPU set TRITON_INTERPRET=1")
    return backend
