"""Attention of one decode step: every row over its group's prompt, cached once, and over its own tokens.

A row is one sequence's query. Its softmax over prompt and own keys is taken in parts o_i with base-2 log-sum-exps l_i,
merged as `o = Σ 2^(l_i − l)·o_i`, `l = log₂ Σ 2^(l_i)`.

    prefix   The queries of all members and of the R query heads of one key/value head see the same keys: `G·R` rows of
             one dense product, 112 for G = 16 and R = 7, where separate sequences make R. A prompt's keys are read once
             per group, in splits of the prompt when there are too few groups to fill the GPU.
    suffix   One program per row and key/value head over the row's own tokens; it then folds in the prompt's parts.

Bytes, with P prompt and L own tokens, D-wide heads and e bytes a number: `2·K·D·e·(N·P + B·L)` for the keys and values
of N groups and B rows, against `2·K·D·e·B·(P + L)` without sharing; and 8 bytes a number for each part of a row's
output, written once and read once. FLOPs: `4·Hq·D·B·(P + L)`.

Lengths and the rows' arrangement are read on the device, and the launch depends on sizes of the cache alone: a captured
CUDA graph stays valid while prompts differ and completions grow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, interpreted, refuse_gradient, tl, triton

LOG2E = 1.4426950408889634
"""log₂ e: scores are scaled by it once, so that kernels take exp2, which the hardware has."""
_MIN_SPLIT = 128
"""Fewest keys of a split: a shorter one writes more of its partial result than it reads."""


class GroupRows(NamedTuple):
    """B rows sorted by the group they belong to."""

    order: Tensor
    """int32 `[B]`, the rows without a group, those of group 0, then those of group 1, …"""
    starts: Tensor
    """int32 `[N + 1]`, where each group begins in `order`."""
    group_of_row: Tensor
    """int32 `[B]`; -1 for a row that sees its own tokens alone."""
    widest: int
    """Most rows that a group may have; a larger bound costs empty programs."""

    @classmethod
    def sort(cls, group_of_row: Tensor, groups: int, widest: int) -> GroupRows:
        """Arrange integer `[B]` in `[-1, groups)`, on its device and without synchronising."""
        ordered, order = group_of_row.sort(stable=True)
        bounds = torch.arange(groups + 1, device=ordered.device, dtype=ordered.dtype)
        return cls(order.int(), torch.searchsorted(ordered, bounds).int(), group_of_row.int(), widest)


def prefix_config(rows: int, width: int, itemsize: int) -> dict[str, int]:
    """Block sizes of the prefix kernel for this many query rows a group and key/value head, of D numbers each."""
    config = _tile(width, itemsize)
    # what registers hold beside keys and values of a block; 16 is the least that tensor cores take
    most = {64: 128, 32: 64, 16: 16}[config["BLOCK_K"]]
    block_q = min(max(triton.next_power_of_2(rows), 16), most)
    # accumulators of 64 · 128 numbers are 32 registers a thread of 8 warps, 64 of 4
    return config | dict(BLOCK_Q=block_q, num_warps=8 if block_q * config["BLOCK_D"] >= 64 * 128 else 4)


def suffix_config(heads_per_kv: int, width: int, itemsize: int) -> dict[str, int]:
    """Block sizes of the suffix kernel."""
    return _tile(width, itemsize) | dict(BLOCK_H=max(triton.next_power_of_2(heads_per_kv), 16), num_warps=4)


def _tile(width: int, itemsize: int) -> dict[str, int]:
    block_d = max(triton.next_power_of_2(width), 16)
    if itemsize == 4:  # exact float32 products run outside the tensor cores, from registers
        block_k = 16
    else:
        block_k = 64 if block_d <= 128 else 32
    return dict(BLOCK_D=block_d, BLOCK_K=block_k, num_stages=2)


@triton.jit
def prefix_attention_kernel(
    # data
    q,  # [B, K * R, D]
    k,  # [N, K, columns, D], prompts
    v,
    partial_out,  # [splits, B, K * R, D] float32
    partial_lse,  # [splits, B, K * R] float32, base 2
    order,  # [B] and [N + 1]: `GroupRows`
    starts,
    prefix_lengths,  # [N]
    # shapes and strides
    B,
    kv_heads,
    split,
    q_row,
    q_head,
    k_group,
    k_head,
    k_token,
    v_group,
    v_head,
    v_token,
    # numbers
    scale,
    # constants
    R: tl.constexpr,  # query heads of a key/value head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one group's queries of one key/value head over one split of its prompt."""
    split_index = tl.program_id(1)
    group = tl.program_id(2) // kv_heads
    kv = tl.program_id(2) % kv_heads
    first = tl.load(starts + group)
    rows = (tl.load(starts + group + 1) - first) * R
    length = tl.load(prefix_lengths + group).to(tl.int32)
    begin = split_index * split
    end = tl.minimum(begin + split, length)
    if (tl.program_id(0) * BLOCK_Q >= rows) | (begin >= end):
        return

    lane = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = lane < rows
    row = tl.load(order + first + lane // R, live, other=0).to(tl.int64)
    head = kv * R + lane % R
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    queries = tl.load(q + row[:, None] * q_row + head[:, None] * q_head + d[None, :], live[:, None] & inside, other=0.0)
    k += group.to(tl.int64) * k_group + kv * k_head
    v += group.to(tl.int64) * v_group + kv * v_head

    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        exists = token < end
        keys = tl.load(k + token[:, None] * k_token + d[None, :], exists[:, None] & inside, other=0.0)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * scale  # float32 operands: exact, not TF32
        scores = tl.where(exists[None, :], scores, -float("inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))  # finite: every block has a key
        weights = tl.exp2(scores - peak[:, None])
        shrink = tl.exp2(highest - peak)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + token[:, None] * v_token + d[None, :], exists[:, None] & inside, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        highest = peak
    at = (split_index.to(tl.int64) * B + row) * kv_heads * R + head
    tl.store(partial_lse + at, highest + tl.log2(total), live)
    tl.store(partial_out + at[:, None] * D + d[None, :], acc / total[:, None], live[:, None] & inside)


@triton.jit
def suffix_attention_kernel(
    # data
    q,  # [B, K * R, D]
    k,  # [B, K, columns, D], the rows' own tokens
    v,
    partial_out,  # [splits, B, K * R, D], of `prefix_attention_kernel`
    partial_lse,
    out,  # [B, K * R, D]
    group_of_row,  # [B]
    prefix_lengths,  # [N]
    suffix_lengths,  # [B]
    # shapes and strides
    B,
    split,
    q_row,
    q_head,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    out_row,
    out_head,
    # numbers
    scale,
    # constants
    R: tl.constexpr,  # query heads of a key/value head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row's queries of one key/value head over its own tokens, then merged with the parts of its prompt."""
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    lane = tl.arange(0, BLOCK_H)
    live = lane < R
    head = kv * R + lane
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    queries = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], live[:, None] & inside, other=0.0)
    k += row * k_row + kv * k_head
    v += row * v_row + kv * v_head
    length = tl.load(suffix_lengths + row).to(tl.int32)

    highest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        exists = token < length
        keys = tl.load(k + token[:, None] * k_token + d[None, :], exists[:, None] & inside, other=0.0)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
        scores = tl.where(exists[None, :], scores, -float("inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        shrink = tl.exp2(highest - peak)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + token[:, None] * v_token + d[None, :], exists[:, None] & inside, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        highest = peak

    group = tl.load(group_of_row + row)
    prefix = tl.load(prefix_lengths + group, group >= 0, other=0).to(tl.int32)
    for split_index in range(0, tl.cdiv(prefix, split)):
        at = (split_index * B + row) * kv_heads * R + head
        lse = tl.load(partial_lse + at, live, other=0.0)
        piece = tl.load(partial_out + at[:, None] * D + d[None, :], live[:, None] & inside, other=0.0)
        peak = tl.maximum(highest, lse)  # finite: a part's log-sum-exp is
        shrink = tl.exp2(highest - peak)
        weight = tl.exp2(lse - peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + piece * weight[:, None]
        highest = peak
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_row + head[:, None] * out_head + d[None, :], result, live[:, None] & inside)


def group_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    rows: GroupRows,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """One query per row over its group's prompt and its own tokens. Without gradient.

    Args:
        q: `[B, Hq, D]`.
        prefix_k, prefix_v: `[N, K, E, D]`, each prompt's keys and values in its first `prefix_lengths` columns.
        prefix_lengths: integer `[N]`, 1 ≤ length ≤ E.
        suffix_k, suffix_v: `[B, K, S, D]`, each row's own ones.
        suffix_lengths: integer `[B]`, 0 ≤ length ≤ S; at least 1 for a row without a group.
        rows: which group each row belongs to.
        scale: of the scores; `D^-0.5` unless given.
        backend: `triton`, `torch`, or None: Triton on CUDA.

    All may be views (a layer's slice of a cache) as long as their last stride is 1; what lies behind a length is not
    read. Lengths are not checked, since that would synchronise.

    Returns:
        `[B, Hq, D]` in q's dtype, contiguous.

    Raises:
        ValueError: shapes do not fit each other, a last stride is not 1, or a gradient is wanted of the kernel, which
            has none.
    """
    batch, query_heads, width = q.shape
    groups, kv_heads, columns, _ = prefix_k.shape
    _check(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, rows)
    scale = width**-0.5 if scale is None else scale
    if choose_backend(q.device, backend, q.dtype) == "torch":
        return group_decode_attention_reference(
            q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, rows, scale=scale
        )
    refuse_gradient("group_decode_attention", q, prefix_k, prefix_v, suffix_k, suffix_v)
    heads_per_kv = query_heads // kv_heads
    prefix = prefix_config(rows.widest * heads_per_kv, width, q.element_size())
    suffix = suffix_config(heads_per_kv, width, q.element_size())
    tiles = triton.cdiv(rows.widest * heads_per_kv, prefix["BLOCK_Q"])
    split = _split(columns, tiles * groups * kv_heads, q.device)
    splits = triton.cdiv(columns, split)
    # parts that no program writes (a short prompt, a row without a group) are never read either
    partial_out = torch.empty(splits, batch, query_heads, width, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(splits, batch, query_heads, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    prefix_attention_kernel[tiles, splits, groups * kv_heads](
        q=q,
        k=prefix_k,
        v=prefix_v,
        partial_out=partial_out,
        partial_lse=partial_lse,
        order=rows.order,
        starts=rows.starts,
        prefix_lengths=prefix_lengths,
        B=batch,
        kv_heads=kv_heads,
        split=split,
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_group=prefix_k.stride(0),
        k_head=prefix_k.stride(1),
        k_token=prefix_k.stride(2),
        v_group=prefix_v.stride(0),
        v_head=prefix_v.stride(1),
        v_token=prefix_v.stride(2),
        scale=scale * LOG2E,
        R=heads_per_kv,
        D=width,
        **prefix,
    )
    suffix_attention_kernel[batch, kv_heads](
        q=q,
        k=suffix_k,
        v=suffix_v,
        partial_out=partial_out,
        partial_lse=partial_lse,
        out=out,
        group_of_row=rows.group_of_row,
        prefix_lengths=prefix_lengths,
        suffix_lengths=suffix_lengths,
        B=batch,
        split=split,
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_row=suffix_k.stride(0),
        k_head=suffix_k.stride(1),
        k_token=suffix_k.stride(2),
        v_row=suffix_v.stride(0),
        v_head=suffix_v.stride(1),
        v_token=suffix_v.stride(2),
        out_row=out.stride(0),
        out_head=out.stride(1),
        scale=scale * LOG2E,
        R=heads_per_kv,
        D=width,
        **suffix,
    )
    return out


def group_decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    rows: GroupRows,
    *,
    scale: float | None = None,
) -> Tensor:
    """`group_decode_attention` in plain torch, row by row; scores in float32 (float64 for float64 queries)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, group in enumerate(rows.group_of_row.tolist()):
        prefix, suffix = int(prefix_lengths[group]) if group >= 0 else 0, int(suffix_lengths[row])
        k = torch.cat([prefix_k[group, :, :prefix], suffix_k[row, :, :suffix]], 1)  # [K, P + L, D]
        v = torch.cat([prefix_v[group, :, :prefix], suffix_v[row, :, :suffix]], 1)
        queries = q[row].view(k.shape[0], -1, q.shape[-1])  # [K, R, D]
        scores = (queries @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
        out[row] = (scores.softmax(-1).to(v.dtype) @ v).flatten(0, 1)
    return out


def _split(columns: int, programs: int, device: torch.device) -> int:
    """Keys of a split, so that there are some two programs for each of a GPU's processors.

    By the cache's columns, not by lengths: a captured graph must not depend on those.
    """
    processors = 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(max(2 * processors // programs, 1), triton.cdiv(columns, _MIN_SPLIT))
    return triton.cdiv(triton.cdiv(columns, splits), _MIN_SPLIT) * _MIN_SPLIT


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    rows: GroupRows,
) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        ValueError: shapes differ, or a last stride is not 1; the message says which.
    """
    batch, query_heads, width = q.shape
    groups, kv_heads = prefix_k.shape[:2]
    if prefix_k.shape != prefix_v.shape or suffix_k.shape != suffix_v.shape:
        raise ValueError("keys and values of a cache must have the same shape")
    if prefix_k.shape[3] != width or suffix_k.shape[:2] != (batch, kv_heads) or suffix_k.shape[3] != width:
        raise ValueError(
            f"q is {list(q.shape)}: need prefix [N, K, columns, {width}] and suffix [{batch}, K, columns, {width}], "
            f"got {list(prefix_k.shape)} and {list(suffix_k.shape)}"
        )
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads are not a multiple of {kv_heads} key/value heads")
    if prefix_lengths.shape != (groups,) or suffix_lengths.shape != (batch,) or rows.order.shape != (batch,):
        raise ValueError(
            f"need prefix_lengths [{groups}], suffix_lengths [{batch}] and {batch} rows, got "
            f"{list(prefix_lengths.shape)}, {list(suffix_lengths.shape)} and {len(rows.order)}"
        )
    if any(x.stride(-1) != 1 for x in (q, prefix_k, prefix_v, suffix_k, suffix_v)):
        raise ValueError("queries, keys and values must have a last stride of 1")
