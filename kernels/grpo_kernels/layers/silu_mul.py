"""The gated activation of a decoder's MLP: silu(gate) · up, both halves of one GEMM's output.

silu(g) = g / (1 + e⁻ᵍ) is rounded to the rows' dtype before the product, as transformers' modules do. Bytes: 2I numbers
of a row read, I written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, refuse_gradient, tl, triton

SILU = {"BLOCK": 1024, "num_warps": 4}
"""Launch of `silu_mul_kernel`: 8 numbers a thread, a 16-byte load of half precision from each half."""


@triton.jit
def silu_mul_kernel(
    gate_up,  # [R, 2I]
    out,  # [R, I], contiguous
    I,
    gate_up_row,  # stride
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + row * gate_up_row + i, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + I + i, inside, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * I + i, (active * up).to(out.dtype.element_ty), inside)


def silu_mul(gate_up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """`[R, 2I]` (gate, then up; last stride 1) → silu(gate) · up `[R, I]`. Without gradient.

    Raises:
        ValueError: not a matrix of an even number of columns, a last stride other than 1, or a gradient is wanted of
            the kernel, which has none.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"need [R, 2I] with a last stride of 1, got {list(gate_up.shape)} {list(gate_up.stride())}")
    if choose_backend(gate_up.device, backend, gate_up.dtype) == "torch":
        return silu_mul_reference(gate_up)
    refuse_gradient("silu_mul", gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_kernel[rows, triton.cdiv(width, SILU["BLOCK"])](
        gate_up=gate_up, out=out, I=width, gate_up_row=gate_up.stride(0), **SILU
    )
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
