"""What the LM-head operations share: argument checks, chunks of rows, and GEMMs that keep their fp32 accumulators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 32 << 20
"""Default size of the logits that exist at a time on a CPU: about a last-level cache, and still a good GEMM."""
CUDA_CHUNK_SHARE = 16
"""By default logits take at most 1/16 of a GPU's memory: one chunk up to T = 14,000 at V = 152,064 on an H200."""
LIVE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_targets(targets: Tensor, rows: int, vocabulary: int, device: torch.device, validate: bool) -> None:
    """Refuse targets of a wrong shape, dtype, device, or (where it costs no device synchronisation) range.

    Raises:
        ValueError, TypeError: as said; IndexError: a target outside `[0, V)`.
    """
    if targets.shape != (rows,):
        raise ValueError(f"targets must have shape [{rows}], one id per row, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the other tensors on {device}")
    if rows and (validate or device.type == "cpu"):
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"targets must lie in [0, {vocabulary}), got {low}..{high}; "
                "drop ignored rows, or give any valid id a weight of 0"
            )


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, reference_hidden: Tensor | None = None) -> None:
    """Refuse a hidden state and a head that do not fit each other.

    Raises:
        ValueError: shapes or devices differ. TypeError: dtypes that are not floating point.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}; "
            "flatten batch and sequence first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if reference_hidden is not None and reference_hidden.shape != hidden.shape:
        raise ValueError(
            f"reference_hidden must have hidden's shape {list(hidden.shape)}, got {list(reference_hidden.shape)}"
        )
    for name, tensor in (
        ("hidden", hidden),
        ("weight", weight),
        ("bias", bias),
        ("reference_hidden", reference_hidden),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in LIVE_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")


def check_softmax(temperature: float, softcap: float | None, chunk_bytes: int | None = None) -> None:
    """Refuse a temperature, softcap or chunk size that is not positive.

    Raises:
        ValueError: as said.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no distribution")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if chunk_bytes is not None and not chunk_bytes > 0:
        raise ValueError(f"chunk_bytes must be positive or None, got {chunk_bytes}")


def row_chunks(rows: int, row_bytes: int, device: torch.device, chunk_bytes: int | None) -> Iterator[slice]:
    """Split `rows` into the fewest near-equal slices of at most `chunk_bytes` (at least one row each)."""
    if chunk_bytes is None:
        if device.type == "cuda":
            chunk_bytes = torch.cuda.get_device_properties(device).total_memory // CUDA_CHUNK_SHARE
        else:
            chunk_bytes = CPU_CHUNK_BYTES
    most = max(1, chunk_bytes // max(1, row_bytes))
    count = -(-rows // most)
    size = -(-rows // max(1, count))
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


class Head:
    """The GEMMs of one LM head, `weight [V, H]`, with results in accumulator precision whatever the operands are.

    Three ways, one meaning. Operands already in accumulator precision: a plain `mm`. Half precision on CUDA: cuBLAS
    multiplies half-precision operands and exports its fp32 accumulators (`out_dtype`). Half precision on a CPU, which
    has no such export: float32 copies, a slab of the vocabulary at a time.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, slab_bytes: int = CPU_CHUNK_BYTES):
        self.accumulate = accumulator_dtype(hidden, weight)
        self.operand = torch.promote_types(hidden.dtype, weight.dtype)
        self.exports = weight.is_cuda and self.operand != self.accumulate
        self.weight = weight.detach()
        if self.exports:
            self.weight = self.weight.to(self.operand)
        vocabulary, width = weight.shape
        whole = self.exports or weight.dtype == self.accumulate
        size = vocabulary if whole else max(256, slab_bytes // max(1, width * self.accumulate.itemsize))
        self.slabs = [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, max(1, size))]

    def operand_rows(self, hidden: Tensor) -> Tensor:
        """`hidden` in the dtype that it is multiplied in."""
        return hidden.detach().to(self.operand if self.exports else self.accumulate)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """`out[r, V] = hidden[r, H] · weightᵀ`; `out` is contiguous, in accumulator precision."""
        rows = self.operand_rows(hidden)
        if self.exports:
            return torch.mm(rows, self.weight.t(), out_dtype=self.accumulate, out=out)
        for slab in self.slabs:
            torch.mm(rows, self.weight[slab].to(self.accumulate).t(), out=out[:, slab])
        return out

    def grad_hidden(self, grad: Tensor) -> Tensor:
        """`grad[r, V] · weight`: `[r, H]`, in accumulator precision."""
        if self.exports:
            return torch.mm(grad, self.weight, out_dtype=self.accumulate)
        result = grad.new_zeros(grad.shape[0], self.weight.shape[1])
        for slab in self.slabs:
            result.addmm_(grad[:, slab], self.weight[slab].to(self.accumulate))
        return result

    def add_grad_weight(self, total: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
        """`total[V, H] (+)= grad[r, V]ᵀ · hidden[r, H]`; `total` is in accumulator precision, garbage if `first`."""
        if self.exports:
            if first:
                torch.mm(grad.t(), hidden, out_dtype=self.accumulate, out=total)
            else:
                torch.addmm(total, grad.t(), hidden, out_dtype=self.accumulate, out=total)
        else:
            torch.addmm(total, grad.t(), hidden, beta=0 if first else 1, out=total)
