"""Attention of segments of packed queries over segments of packed keys, with log-sum-exps; forward and backward apart.

The two directions are plain functions, so that several softmax parts over the same queries can be merged: given the
output and log-sum-exp of *all* parts, the backward of each part alone gives exactly its share of the gradients,

    P = exp(scale·QKᵀ − lse)    dV = PᵀdO    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))    dQ = scale·dS K    dK = scale·dSᵀQ,

which is also how ring attention (arXiv 2310.01889) adds up its blocks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MATMUL_SCORES = 2**26
"""Scores that the matmul fallback holds at once."""


@dataclass(frozen=True)
class Segments:
    """S pairs of row ranges: queries `[start, start + length)` attend to keys of the paired range.

    Attributes:
        query_starts, query_lengths, key_starts, key_lengths: `[S]`; lengths ≥ 1.
    """

    query_starts: tuple[int, ...]
    query_lengths: tuple[int, ...]
    key_starts: tuple[int, ...]
    key_lengths: tuple[int, ...]

    def __init__(self, *ranges: Sequence[int]):
        for name, values in zip(self.__dataclass_fields__, ranges, strict=True):
            object.__setattr__(self, name, tuple(values))

    def __len__(self) -> int:
        return len(self.query_starts)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Adjacent segments of equal lengths, as one batched call takes them:
        (segments, query start, query length, key start, key length)."""
        runs: list[list[int]] = []
        for segment in zip(self.query_starts, self.query_lengths, self.key_starts, self.key_lengths, strict=True):
            if runs:
                count, query, query_length, key, key_length = runs[-1]
                if segment == (query + count * query_length, query_length, key + count * key_length, key_length):
                    runs[-1][0] += 1
                    continue
            runs.append([1, *segment])
        return tuple(tuple(run) for run in runs)

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[slice | Tensor, slice | Tensor, Tensor, Tensor]]:
        return {}

    def on(self, device: torch.device) -> tuple[slice | Tensor, slice | Tensor, Tensor, Tensor]:
        """Query rows and key rows, in order, each a slice if they are adjacent, else int64 indices; and int32
        `[S + 1]` cumulative lengths of both. Made once per device, so that layers share them without a sync."""
        if device not in self._on_device:
            queries, keys = (self.query_starts, self.query_lengths), (self.key_starts, self.key_lengths)
            self._on_device[device] = (
                *(_rows(*ranges, device) for ranges in (queries, keys)),
                *(_cumulative(lengths, device) for _, lengths in (queries, keys)),
            )
        return self._on_device[device]

    @property
    def longest(self) -> tuple[int, int]:
        """Longest query and key length. Never 1: for that the flash operators swap heads into rows, and the order of
        their log-sum-exps."""
        return max(2, *self.query_lengths), max(2, *self.key_lengths)


def _rows(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> slice | Tensor:
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    if list(starts[1:]) == ends[:-1]:
        return slice(starts[0], ends[-1])
    return torch.cat([torch.arange(*ends_of) for ends_of in zip(starts, ends, strict=True)]).to(device)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the segments' query rows.

    Args:
        q: `[T, Hq, D]`; k, v: `[U, Hkv, D]`, Hq a multiple of Hkv.
        segments: S ≥ 1 segments; with `causal` a segment's query and key lengths must agree.
        causal: the i-th query of a segment sees its first i + 1 keys, else all of them.
        scale: of the scores.

    Returns:
        Output `[R, Hq, D]` and natural log-sum-exp `[Hq, R]` (float32, or float64 for float64 q) of the R query rows.
    """
    query_rows, key_rows, cu_q, cu_k = segments.on(q.device)
    if not _flash_takes(q):
        return _forward_in_runs(q, k, v, segments, causal, scale)
    q, k, v = q[query_rows], k[key_rows], v[key_rows]
    if _has_flash_package():
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, *segments.longest, 0.0, scale, causal=causal)
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, *segments.longest, 0.0, causal, False, scale=scale
        )
    return out, lse


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one softmax part, from the output and log-sum-exp of all parts.

    Args:
        grad, q, out: `[T, Hq, D]`; k, v: `[U, Hkv, D]`; lse: `[Hq, T]`.
        segments, causal, scale: as in `varlen_forward`.

    Returns:
        Gradients of the query rows `[R, Hq, D]`, and of the key rows `[K, Hkv, D]` as keys and as values.
    """
    query_rows, key_rows, cu_q, cu_k = segments.on(q.device)
    if not _flash_takes(q):
        return _backward_in_runs(grad, q, k, v, out, lse, segments, causal, scale)
    grad, q, out = (x[query_rows].contiguous() for x in (grad, q, out))
    k, v, lse = k[key_rows], v[key_rows], lse[:, query_rows].contiguous()
    if _has_flash_package():
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        _flash_attn_varlen_backward(
            grad,
            *(q, k, v, out, lse),
            *gradients,
            *(cu_q, cu_k),
            *segments.longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's state
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, *segments.longest, 0.0, causal, unused, unused, scale=scale
    )


def _flash_takes(q: Tensor) -> bool:
    """Whether the CUDA flash operators take these queries."""
    return (
        q.is_cuda
        and q.dtype in _FLASH_DTYPES
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _has_flash_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


# Elsewhere: one call per run of equal segments. Rows lie in order, so a run is a view.


def _forward_in_runs(q, k, v, segments: Segments, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    forward = _cpu_forward if q.device.type == "cpu" else _matmul_forward
    outs, lses = [], []
    for queries, keys in _batches(segments):
        out, lse = forward(queries(q), keys(k), keys(v), causal, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    return _cat(outs, 0), _cat(lses, 1)


def _backward_in_runs(grad, q, k, v, out, lse, segments: Segments, causal: bool, scale: float):
    backward = _cpu_backward if q.device.type == "cpu" else _matmul_backward
    lse = lse.transpose(0, 1)[..., None]  # [T, Hq, 1]
    gradients = []
    for queries, keys in _batches(segments):
        inputs = (queries(grad), queries(q), keys(k), keys(v), queries(out), queries(lse)[..., 0])
        gradients.append([x.transpose(1, 2).flatten(0, 1) for x in backward(*inputs, causal, scale)])
    return tuple(_cat(pieces, 0) for pieces in zip(*gradients, strict=True))


def _batches(segments: Segments) -> Iterator:
    """Per run, two functions that cut `[n, H, L, D]` out of packed rows `[T, H, D]`."""

    def cut(start: int, count: int, length: int):
        return lambda x: x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)

    for count, query, query_length, key, key_length in segments.runs:
        yield cut(query, count, query_length), cut(key, count, key_length)


def _cat(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _cpu_forward(q, k, v, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(grad, q, k, v, out, lse, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _matmul_forward(q, k, v, causal, scale):
    """`[n, Hq, L, D]` and log-sum-exp `[n, Hq, L]` by plain products, for dtypes and head sizes without a kernel."""
    k, v = _expand_heads(k, q), _expand_heads(v, q)
    outs, lses = [], []
    for rows in _row_chunks(q, k):
        scores = _scores(q, k, rows, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse[..., None]).exp().to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _matmul_backward(grad, q, k, v, out, lse, causal, scale):
    wide_k, wide_v = _expand_heads(k, q), _expand_heads(v, q)
    dq = []
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for rows in _row_chunks(q, k):
        p = (_scores(q, wide_k, rows, causal, scale) - lse[:, :, rows, None]).exp()
        g = grad[:, :, rows]
        delta = (g * out[:, :, rows]).sum(-1, keepdim=True, dtype=p.dtype)
        ds = (p * (g @ wide_v.transpose(-1, -2) - delta) * scale).to(q.dtype)
        dq.append(ds @ wide_k)
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
        dv += p.to(q.dtype).transpose(-1, -2) @ g
    return torch.cat(dq, 2), *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _row_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, _MATMUL_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[2], step))


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    scores = (q[:, :, rows] @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        query = torch.arange(q.shape[2], device=q.device)[rows]
        key = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(key > query[:, None], -torch.inf)
    return scores
