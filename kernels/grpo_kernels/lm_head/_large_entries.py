"""The few large entries of a gradient `[r, V]`, exact in float32 beside a half-precision rest, and their products.

A GEMM takes the gradient of logits in half precision, 1.65e-3 from what it was. Most of that is the rounding of one or
two entries a row: the target's, g (1 − p), and that of another token, if it has most of the 1 − p. With those apart,

    dhidden = rest · weight + large · weight             rows of the weight, times a number each
    dweight = restᵀ · hidden + largeᵀ · hidden           runs of equal tokens: one program each, in order, no atomics

are as good as their own rounding. Beside two GEMMs of 2·r·H·V FLOP that is some 20·r·H bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 2
"""Large entries of a row, at most."""
BLOCK_ROWS, BLOCK_H = 16, 512
"""Tile of a run's rows; hidden features of a program."""


class LargeEntries(NamedTuple):
    """At most `SLOTS` entries of each of r rows, each `[r, SLOTS]`."""

    token: Tensor
    """int64, the column; −1 where there is no entry."""
    value: Tensor
    """float32; anything where there is no entry."""

    @classmethod
    def none(cls, rows: int, device: torch.device) -> LargeEntries:
        """Room for the entries of `rows` rows, none of which is there."""
        return cls(torch.full((rows, SLOTS), -1, device=device), torch.empty(rows, SLOTS, device=device))

    def add_product(self, total: Tensor, weight: Tensor, out: Tensor) -> None:
        """`out[r, H] = total + large · weight` from float32 totals and `weight [V, H]`, rounded once."""
        rows, width = total.shape
        add_product_kernel[(rows, triton.cdiv(width, BLOCK_H))](
            out,
            total,
            weight,
            *self,
            width,
            *out.stride(),
            *weight.stride(),
            SLOTS=SLOTS,
            BLOCK_H=BLOCK_H,
        )

    def add_transposed(self, hidden: Tensor, total: Tensor) -> None:
        """`total[V, H] += largeᵀ · hidden[r, H]`, a row with entries rounded once; the same bits each time."""
        width = total.shape[1]
        token, entry = self.token.flatten().sort(stable=True)
        end = torch.searchsorted(token, token, right=True)
        add_transposed_kernel[(token.shape[0], triton.cdiv(width, BLOCK_H))](
            total,
            hidden,
            token,
            entry,
            end,
            self.value,
            width,
            *total.stride(),
            *hidden.stride(),
            SLOTS=SLOTS,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_H=BLOCK_H,
        )


@triton.jit
def add_product_kernel(
    out,
    total,  # contiguous
    weight,
    token_ptr,
    value_ptr,
    H,
    out_stride,
    out_step,
    weight_stride,
    weight_step,
    SLOTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row of hidden states a program, BLOCK_H features of it."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.load(total + t * H + h, h < H, other=0.0)
    for slot in tl.static_range(SLOTS):
        token = tl.load(token_ptr + t * SLOTS + slot)
        value = tl.load(value_ptr + t * SLOTS + slot, token >= 0, other=0.0)
        w = tl.load(weight + token * weight_stride + h * weight_step, (h < H) & (token >= 0), other=0.0)
        x += value * w.to(tl.float32)
    tl.store(out + t * out_stride + h * out_step, x.to(out.dtype.element_ty), h < H)


@triton.jit
def add_transposed_kernel(
    total,
    hidden,
    token_ptr,  # in order
    entry_ptr,  # where each was before
    end_ptr,  # of its run of equal tokens
    value_ptr,
    H,
    total_stride,
    total_step,
    hidden_stride,
    hidden_step,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One run of equal tokens a program, BLOCK_H features of it; all but the first of a run have nothing to do."""
    first = tl.program_id(0)
    token = tl.load(token_ptr + first)
    if (token < 0) | (token == tl.load(token_ptr + first - 1, first > 0, other=-1)):
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.zeros((BLOCK_H,), tl.float32)
    end = tl.load(end_ptr + first)
    for start in range(first, end, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        entry = tl.load(entry_ptr + place, place < end, other=0)
        value = tl.load(value_ptr + entry, place < end, other=0.0)
        row = hidden + (entry // SLOTS)[:, None] * hidden_stride + h[None, :] * hidden_step
        states = tl.load(row, (place < end)[:, None] & (h < H)[None, :], other=0.0)
        x += tl.sum(value[:, None] * states.to(tl.float32), 0)
    row = total + token * total_stride + h * total_step
    x += tl.load(row, h < H, other=0.0).to(tl.float32)
    tl.store(row, x.to(total.dtype.element_ty), h < H)
