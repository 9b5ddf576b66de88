"""RMS norm of rows, with the addition to the residual stream that precedes it in a decoder layer.

    s = x + residual        y = round(s / √(mean(s²) + ε)) · weight

The sum is rounded to the rows' dtype, and the normalised row once more before the weight, as transformers' modules do:
a sampler then sees what the trainer sees. Bytes of one row: x, residual, weight (from cache) read, s and y written;
separate operations read and write s once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, refuse_gradient, tl, triton


def norm_config(width: int) -> dict[str, int]:
    """Block and warps for rows of H numbers, one row a program."""
    block = triton.next_power_of_2(width)
    # 512 numbers a warp are 16 a thread: two 16-byte loads of half precision
    return dict(BLOCK=block, num_warps=min(max(block // 512, 1), 16))


@triton.jit
def rms_norm_kernel(
    # data
    x,  # [R, H]
    residual,  # [R, H], contiguous as are the outputs; any pointer without ADD
    weight,  # [H]
    out,  # [R, H]
    summed,  # [R, H]: x + residual; not written without ADD
    # shapes and strides
    H,
    x_row,
    # numbers
    eps,
    # what to do, and the block
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < H
    s = tl.load(x + row * x_row + h, inside, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(residual + row * H + h, inside, other=0.0).to(tl.float32)
        s = s.to(summed.dtype.element_ty)  # rounded before the norm, which is to see what the next layer sees
        tl.store(summed + row * H + h, s, inside)
        s = s.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 0) / H + eps)
    y = (s * scale).to(out.dtype.element_ty).to(tl.float32)
    y *= tl.load(weight + h, inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + h, y.to(out.dtype.element_ty), inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise each row of `x + residual`. Without gradient.

    Args:
        x: `[R, H]`, last stride 1.
        weight: `[H]`.
        eps: added to the mean square.
        residual: `[R, H]`, contiguous; x alone is normalised without it.
        backend: `triton`, `torch`, or None: Triton on CUDA.

    Returns:
        The normalised rows, and the sum (x itself without residual), `[R, H]` each in x's dtype.

    Raises:
        ValueError: shapes or layouts do not fit, or a gradient is wanted of the kernel, which has none.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"need x [R, H], weight [H] and residual like x, got {list(x.shape)}, {list(weight.shape)} and "
            f"{None if residual is None else list(residual.shape)}"
        )
    if x.stride(1) != 1 or (residual is not None and not residual.is_contiguous()):
        raise ValueError("x must have a last stride of 1, and the residual be contiguous")
    if choose_backend(x.device, backend, x.dtype) == "torch":
        return rms_norm_reference(x, weight, eps, residual=residual)
    refuse_gradient("rms_norm", x, weight, residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    rms_norm_kernel[(x.shape[0],)](
        x=x,
        residual=x if residual is None else residual,
        weight=weight.contiguous(),
        out=out,
        summed=summed,
        H=x.shape[1],
        x_row=x.stride(0),
        eps=eps,
        ADD=residual is not None,
        **norm_config(x.shape[1]),
    )
    return out, summed


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch, of `[…, H]`."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    # vector_norm reads the row once, and what follows works in place on [.., 1]: half the operations of `F.rms_norm`
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    normed = wide * mean_square.add_(eps).rsqrt_()
    return normed.to(x.dtype) * weight.to(x.dtype), summed
