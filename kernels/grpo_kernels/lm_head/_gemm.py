"""What the LM-head operations share: chunks of rows, and GEMMs that keep their fp32 accumulators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from grpo_kernels._backend import Backend
from grpo_kernels._checks import accumulator_dtype
from grpo_kernels.lm_head._rows import RowGradient, RowStatistics, Transform
from grpo_kernels.lm_head._softmax_rows import Rows, make_rows

CPU_CHUNK_BYTES = 32 << 20
"""Default size of the logits that exist at a time on a CPU: about a last-level cache, and still a good GEMM."""
CUDA_CHUNK_SHARE = 16
"""By default logits take at most 1/16 of a GPU's memory: one chunk up to T = 14,000 at V = 152,064 on an H200."""

EXPORTING = ("cuda",)
"""Devices whose GEMM takes half-precision operands and gives its float32 accumulators (`out_dtype`)."""


def default_chunk_bytes(device: torch.device) -> int:
    """How many bytes of logits may exist at a time on `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_CHUNK_SHARE
    return CPU_CHUNK_BYTES


def row_chunks(rows: int, row_bytes: int, device: torch.device, chunk_bytes: int | None) -> Iterator[slice]:
    """Split `rows` into the fewest near-equal slices of at most `chunk_bytes` (at least one row each)."""
    chunk_bytes = chunk_bytes or default_chunk_bytes(device)
    most = max(1, chunk_bytes // max(1, row_bytes))
    count = -(-rows // most)
    size = -(-rows // max(1, count))
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


def replicated(parameter: Tensor | None) -> Tensor | None:
    """A `DTensor` parameter (FSDP2, outside its module's forward) gathered; any other tensor as it is.

    Each rank is taken to hold different tokens, as in data parallelism: the gradient is averaged over the mesh on its
    way back to the shards, as FSDP2 does.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


@dataclass(frozen=True)
class HeadOptions:
    """What a pass over an LM head's rows needs to know besides tensors."""

    transform: Transform
    entropy: bool
    chunk_bytes: int | None
    backend: Backend
    grad: bool = True
    """Whether autograd was recording when the operation was called."""


class Head:
    """The GEMMs of one LM head, `weight [V, H]`, with fp32 accumulators whatever the operands are.

    Three ways, one meaning. Operands already in accumulator precision: a plain `mm`. Half precision on CUDA: cuBLAS
    multiplies half-precision operands and exports its accumulators (`out_dtype`); gradients of logits are such operands
    but for their large entries, or in float16 with a factor a row, beside float16 copies of the weight and the hidden
    states (|weight| < 65,504). Half precision on a CPU, which has no such export, or with plain torch asked for:
    float32 copies, a slab of the vocabulary at a time.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, backend: Backend | None = None):
        self.accumulator = accumulator_dtype(hidden, weight)
        half = hidden.dtype == weight.dtype != self.accumulator
        self.exports = half and weight.device.type in EXPORTING and backend != "torch"
        self.operand = weight.dtype if self.exports else self.accumulator
        self.weight = weight.detach()
        vocabulary, width = weight.shape
        size = vocabulary
        if self.operand != weight.dtype:
            size = max(256, CPU_CHUNK_BYTES // max(1, width * self.accumulator.itemsize))
        self.slabs = [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, max(1, size))]

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """`out[r, V] = hidden[r, H] · weightᵀ`, in accumulator precision."""
        hidden = hidden.to(self.operand)
        if self.exports:
            return torch.mm(hidden, self.weight.t(), out_dtype=self.accumulator, out=out)
        for slab in self.slabs:
            torch.mm(hidden, self.weight[slab].to(self.accumulator).t(), out=out[:, slab])
        return out

    def logits_and_drift(self, hidden: Tensor, reference_hidden: Tensor, out: Tensor) -> Tensor:
        """Logits over `out[:r]`, and over `out[r:]`, which is returned, how far they lie from the reference's.

        The drift is a product of the difference of hidden states, unless that would have to be rounded to half
        precision: then it is a difference of accumulators.
        """
        hidden, reference_hidden = hidden.to(self.operand), reference_hidden.to(self.operand)
        other = reference_hidden if self.exports else hidden - reference_hidden
        self.logits(torch.cat([hidden, other]), out)
        logits, drift = out.chunk(2)
        return torch.sub(logits, drift, out=drift) if self.exports else drift

    def grad_place(self, logits: Tensor) -> Tensor:
        """Where the gradient of logits `[r, V]` goes: over them, a narrower operand into the front of each row."""
        if self.operand == self.accumulator:
            return logits
        return logits.view(self.operand)[:, : logits.shape[1]]

    def grad_hidden(self, gradient: RowGradient, out: Tensor) -> None:
        """`out[r, H] = gradient[r, V] · weight`, rounded once to `out`'s precision."""
        dense, factor, large = gradient
        if self.exports:
            result = torch.mm(dense, self.weight.to(dense.dtype), out_dtype=self.accumulator)
        elif len(self.slabs) == 1:
            result = torch.mm(dense, self.weight.to(self.accumulator))
        else:
            result = dense.new_zeros(dense.shape[0], self.weight.shape[1])
            for slab in self.slabs:
                result.addmm_(dense[:, slab], self.weight[slab].to(self.accumulator))
        if large is not None:
            large.add_product(result, self.weight, out)
        else:
            out.copy_(result if factor is None else result.mul_(factor[:, None]))

    def add_grad_weight(self, gradient: RowGradient, hidden: Tensor, total: Tensor | None, only: bool) -> Tensor:
        """`total[V, H] + gradient[r, V]ᵀ · hidden[r, H]`, in place unless total is None.

        Totals are kept in accumulator precision over several chunks; the `only` chunk's is rounded as it is written.
        """
        dense, factor, large = gradient
        if factor is not None:
            hidden = hidden.to(self.accumulator) * factor[:, None]
        if self.exports and factor is not None:
            product, unit = self._half_product(dense, hidden)
            if total is None:
                return torch.mul(product, unit, out=torch.empty_like(self.weight) if only else product)
            return total.addcmul_(product, unit)
        hidden = hidden.to(self.operand)
        if self.exports:
            if total is not None:
                torch.addmm(total, dense.t(), hidden, out_dtype=self.accumulator, out=total)
            elif only:  # without the large entries there is little to round
                total = torch.mm(dense.t(), hidden)
            else:
                total = torch.mm(dense.t(), hidden, out_dtype=self.accumulator)
            large.add_transposed(hidden, total)
            return total
        return torch.mm(dense.t(), hidden) if total is None else total.addmm_(dense.t(), hidden)

    def add_grad_bias(self, gradient: RowGradient, total: Tensor) -> None:
        """`total[V] + Σ_r gradient[r, V]`, in place."""
        dense, factor, large = gradient
        if self.exports and factor is not None:
            product, unit = self._half_product(dense, factor[:, None])
            total.addcmul_(product[:, 0], unit)
        elif factor is not None:
            total.addmv_(dense.t(), factor)
        else:
            total.add_(dense.sum(0, dtype=total.dtype))
        if large is not None:
            large.add_transposed(dense.new_ones(dense.shape[0], 1), total[:, None])

    def _half_product(self, dense: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """float32 `denseᵀ · columns` as `(product [V, n], unit)`, to be multiplied: of float16 `dense [r, V]`, and
        float32 `columns [r, n]` that a power of two brings into float16's range."""
        peak = columns.abs().amax().clamp(min=1e-30)
        unit = peak / torch.frexp(peak).mantissa * 2.0**-14
        return torch.mm(dense.t(), (columns / unit).to(dense.dtype), out_dtype=self.accumulator), unit


class HeadGradients:
    """Gradients of an LM head's inputs, summed over chunks of rows. Those not needed are not computed."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        bias: Tensor | None,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ):
        self.head, self.hidden_input = head, hidden.detach()
        self.bias_dtype = None if bias is None else bias.dtype
        self.hidden = torch.empty_like(self.hidden_input) if need_hidden else None
        self.need_weight = need_weight
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=head.accumulator) if need_bias else None

    def add(self, rows: slice, gradient: RowGradient) -> None:
        """Take in the gradient in the logits of `rows`."""
        if self.bias is not None:
            self.head.add_grad_bias(gradient, self.bias)
        if self.hidden is not None:
            self.head.grad_hidden(gradient, out=self.hidden[rows])
        if self.need_weight:
            hidden = self.hidden_input[rows]
            only = hidden.shape[0] == self.hidden_input.shape[0]
            self.weight = self.head.add_grad_weight(gradient, hidden, self.weight, only)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias in their dtypes; zeros where no row came."""
        weight = self.weight
        if self.need_weight:
            weight = torch.zeros_like(self.head.weight) if weight is None else weight
            weight = weight.to(self.head.weight.dtype)
        return self.hidden, weight, None if self.bias is None else self.bias.to(self.bias_dtype)


def head_rows(
    head: Head,
    hidden: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: RowStatistics,
    options: HeadOptions,
    *,
    saved: bool = False,
    reference_hidden: Tensor | None = None,
) -> Iterator[tuple[slice, Rows]]:
    """Yield `(rows, chunk)`, each chunk's logits over the last one's; `chunk_bytes` bounds all that is `[r, V]`."""
    vocabulary = head.weight.shape[0]
    streams = 1 if reference_hidden is None else 2
    row_bytes = vocabulary * head.accumulator.itemsize * streams
    buffer = None
    for rows in row_chunks(hidden.shape[0], row_bytes, hidden.device, options.chunk_bytes):
        count = rows.stop - rows.start
        if buffer is None:
            buffer = hidden.new_empty(streams * count, vocabulary, dtype=head.accumulator)
        logits, drift = buffer[:count], None
        if reference_hidden is None:
            head.logits(hidden[rows], logits)
        else:
            drift = head.logits_and_drift(hidden[rows], reference_hidden[rows], buffer[: 2 * count])
        if bias is not None:
            logits.add_(bias)
        yield (
            rows,
            make_rows(
                options.backend,
                logits,
                targets[rows],
                options.transform,
                stats.rows(rows),
                saved=saved,
                drift=drift,
                out=head.grad_place(logits) if options.backend == "triton" else None,
            ),
        )
