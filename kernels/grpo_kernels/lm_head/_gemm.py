"""GEMMs of an LM head that keep their float32 accumulators: logits, and gradients of hidden states, weight and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_kernels._backend import FLOAT_DTYPES, Backend, accumulator_dtype

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial

if TYPE_CHECKING:  # sampling takes the logits alone, and needs no rows
    from grpo_kernels.lm_head._rows import RowGradient

OUT_DTYPE_DEVICES = ("cuda",)
"""Devices whose `torch.mm` takes half-precision operands and gives its float32 accumulators (`out_dtype`)."""
SLAB_BYTES = 32 << 20
"""Bytes of the head that are copied to float32 at a time, elsewhere: about a CPU's last-level cache."""
MIN_SLAB = 256
"""Fewest tokens of such a slab: a thinner product would not be a GEMM."""


def fits_descriptors(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can be made: 16-byte aligned rows of half precision or float32, equal in dtype."""
    return all(
        t.dtype == tensors[0].dtype
        and t.stride(1) == 1
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        for t in tensors
    )


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
        self.exports_accumulators = half and weight.device.type in OUT_DTYPE_DEVICES and backend != "torch"
        self.operand = weight.dtype if self.exports_accumulators else self.accumulator
        self.weight = weight.detach()  # gradients are ours to compute: no GEMM here is to be recorded
        vocabulary, width = weight.shape
        size = vocabulary
        if self.operand != weight.dtype:
            size = max(MIN_SLAB, SLAB_BYTES // max(1, width * self.accumulator.itemsize))
        self.slabs = [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, max(1, size))]

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """`out[r, V] = hidden[r, H] · weightᵀ`, in accumulator precision."""
        hidden = hidden.to(self.operand)
        if self.exports_accumulators:
            return torch.mm(hidden, self.weight.t(), out_dtype=self.accumulator, out=out)
        for slab in self.slabs:
            torch.mm(hidden, self.weight[slab].to(self.accumulator).t(), out=out[:, slab])
        return out

    def logits_and_drift(self, hidden: Tensor, reference_hidden: Tensor, out: Tensor) -> Tensor:
        """Write logits over `out[:r]`, and over `out[r:]`, which is returned, how far they lie from the reference's.

        The drift is a product of the difference of hidden states, unless that would have to be rounded to half
        precision: then it is a difference of accumulators.
        """
        hidden, reference_hidden = hidden.to(self.operand), reference_hidden.to(self.operand)
        other = reference_hidden if self.exports_accumulators else hidden - reference_hidden
        self.logits(torch.cat([hidden, other]), out)  # one GEMM of 2r rows reads the weight once
        logits, drift = out.chunk(2)
        return torch.sub(logits, drift, out=drift) if self.exports_accumulators else drift

    def grad_place(self, logits: Tensor) -> Tensor:
        """Where the gradient of logits `[r, V]` goes: over them, a narrower operand into the front of each row.

        cuBLAS reads the narrower one with a row stride of 2·V, so it needs no memory of its own.
        """
        if self.operand == self.accumulator:
            return logits
        return logits.view(self.operand)[:, : logits.shape[1]]

    def grad_hidden(self, gradient: RowGradient, out: Tensor) -> None:
        """`out[r, H] = gradient[r, V] · weight`, rounded once to `out`'s precision."""
        matrix, row_factor, large_entries = gradient
        if self.exports_accumulators:
            result = torch.mm(matrix, self.weight.to(matrix.dtype), out_dtype=self.accumulator)
        elif len(self.slabs) == 1:
            result = torch.mm(matrix, self.weight.to(self.accumulator))
        else:
            result = matrix.new_zeros(matrix.shape[0], self.weight.shape[1])
            for slab in self.slabs:
                result.addmm_(matrix[:, slab], self.weight[slab].to(self.accumulator))
        if large_entries is not None:
            large_entries.add_product(result, self.weight, out)
        else:
            out.copy_(result if row_factor is None else result.mul_(row_factor[:, None]))

    def add_grad_weight(
        self, gradient: RowGradient, hidden: Tensor, total: Tensor | None, *, single_chunk: bool
    ) -> Tensor:
        """`total[V, H] + gradient[r, V]ᵀ · hidden[r, H]`, in place unless total is None.

        Totals are kept in accumulator precision over several chunks; a single chunk's is rounded as it is written.
        """
        matrix, row_factor, large_entries = gradient
        if row_factor is not None:  # diag(factor) · hidden: [r, H] to multiply, where the gradient is [r, V]
            hidden = hidden.to(self.accumulator) * row_factor[:, None]
        if self.exports_accumulators and row_factor is not None:
            product, scale = self._half_product(matrix, hidden)
            if total is None:
                return torch.mul(product, scale, out=torch.empty_like(self.weight) if single_chunk else product)
            return total.addcmul_(product, scale)
        hidden = hidden.to(self.operand)
        if self.exports_accumulators:
            if total is not None:
                torch.addmm(total, matrix.t(), hidden, out_dtype=self.accumulator, out=total)
            elif single_chunk:  # without the large entries there is little to round
                total = torch.mm(matrix.t(), hidden)
            else:
                total = torch.mm(matrix.t(), hidden, out_dtype=self.accumulator)
            if large_entries is not None:
                large_entries.add_transposed(hidden, total)
            return total
        return torch.mm(matrix.t(), hidden) if total is None else total.addmm_(matrix.t(), hidden)

    def add_grad_bias(self, gradient: RowGradient, total: Tensor) -> None:
        """`total[V] + Σ_r gradient[r, V]`, in place."""
        matrix, row_factor, large_entries = gradient
        if self.exports_accumulators and row_factor is not None:
            product, scale = self._half_product(matrix, row_factor[:, None])
            total.addcmul_(product[:, 0], scale)
        elif row_factor is not None:
            total.addmv_(matrix.t(), row_factor)
        else:
            total.add_(matrix.sum(0, dtype=total.dtype))
        if large_entries is not None:
            large_entries.add_transposed(matrix.new_ones(matrix.shape[0], 1), total[:, None])

    def _half_product(self, matrix: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """float32 `matrixᵀ · columns` as `(product [V, n], scale)`, to be multiplied, by a GEMM of float16 operands.

        `matrix [r, V]` is float16; the power of two `scale` brings float32 `columns [r, n]` into float16's range.
        """
        peak = columns.abs().amax().clamp(min=1e-30)  # all zeros would give a scale of 0, and 0 / 0
        # peak / mantissa is the power of two above the peak: columns / scale stay below 2¹⁴, of 65,504
        scale = peak / torch.frexp(peak).mantissa * 2.0**-14
        return torch.mm(matrix.t(), (columns / scale).to(matrix.dtype), out_dtype=self.accumulator), scale


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
        self.hidden = torch.empty_like(self.hidden_input) if need_hidden else None
        self.need_weight = need_weight
        self.weight: Tensor | None = None
        self.bias_dtype = None if bias is None else bias.dtype
        self.bias = None
        if bias is not None and need_bias:
            self.bias = torch.zeros_like(bias, dtype=head.accumulator)

    def add(self, rows: slice, gradient: RowGradient) -> None:
        """Take in the gradient in the logits of `rows`."""
        if self.bias is not None:
            self.head.add_grad_bias(gradient, self.bias)
        if self.hidden is not None:
            self.head.grad_hidden(gradient, out=self.hidden[rows])
        if self.need_weight:
            hidden = self.hidden_input[rows]
            single_chunk = hidden.shape[0] == self.hidden_input.shape[0]
            self.weight = self.head.add_grad_weight(gradient, hidden, self.weight, single_chunk=single_chunk)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias in their dtypes; zeros where no row came."""
        weight = self.weight
        if self.need_weight:
            weight = torch.zeros_like(self.head.weight) if weight is None else weight
            weight = weight.to(self.head.weight.dtype)
        return self.hidden, weight, None if self.bias is None else self.bias.to(self.bias_dtype)


def gather_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reference_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Give a head's weight and bias whole, and refuse ones that do not fit the hidden states.

    A `DTensor` parameter (FSDP2, outside its module's forward) is gathered. Each rank is taken to hold different
    tokens, as in data parallelism: the gradient is averaged over the mesh on its way back to the shards, as FSDP2 does.

    Raises:
        ValueError: shapes or devices differ. TypeError: dtypes that are not floating point.
    """
    if torch.distributed.is_available():  # else torch has no DTensor
        if isinstance(weight, DTensor):
            weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
        if isinstance(bias, DTensor):
            bias = bias.full_tensor(grad_placements=[Partial("avg")] * bias.device_mesh.ndim)
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
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    return weight, bias
