"""Refusal of arguments that do not fit each other, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

GRAPH_BREAK = "grpo_kernels' heads run outside the graph: call them in a function compiled without fullgraph=True"
"""What torch.compile is told of the public functions, and says itself where `fullgraph=True` forbids a break."""


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_targets(targets: Tensor, rows: int, vocabulary: int, device: torch.device, validate: bool) -> None:
    """Refuse targets of a wrong shape, dtype, device, or (where it costs no device synchronisation) range.

    Raises:
        ValueError, TypeError: as said; IndexError: a target outside `[0, V)`, or any target where V = 0.
    """
    if targets.shape != (rows,):
        raise ValueError(f"targets must have shape [{rows}], one id per row, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the other tensors on {device}")
    if rows and not vocabulary:
        raise IndexError(
            f"a vocabulary of 0 (V = 0) holds no target, but there are {rows} rows; only T = 0 goes with it"
        )
    if rows and (validate or device.type == "cpu"):
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"targets must lie in [0, {vocabulary}), got {low}..{high}; "
                "drop ignored rows, or give any valid id a weight of 0"
            )


def check_per_token(tensors: dict[str, Tensor | None], rows: int, device: torch.device) -> None:
    """Refuse per-token tensors that are not `[rows]` on `device`.

    Raises:
        ValueError: as said; the message names the argument.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (rows,):
            raise ValueError(f"{name} must have shape [{rows}], one value per row, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {device}")


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
        if tensor.dtype not in FLOAT_DTYPES:
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
