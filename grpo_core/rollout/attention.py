"""Attention in decoding: prompts causally over themselves, rows over their group's prompt and their own tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK, _SHORT, _LONG_BLOCK = 16, 256, 512
_GRID_ROWS = 8


def extent(length: int) -> int:
    """Columns to attend to for `length` keys: the next size at which masked padding cannot change a result's bits.

    CPU kernels sum keys in SIMD lanes of 16 and split long sums into blocks, so a row's value would depend on how far
    its neighbours in the batch make it padded. With multiples of 16 up to 256, and of 512 above, it does not.
    """
    block = _BLOCK if length <= _SHORT else _LONG_BLOCK
    return math.ceil(max(length, 1) / block) * block


@dataclass(frozen=True)
class RowPlan:
    """Which group each of B rows belongs to, and the rows of N groups as a `[N, W]` grid (W ≥ the rows of any group).

    The grid lets one batched product serve all queries of a group: its prompt's keys are read once, not once per row.

    Attributes:
        prompt_tokens: int64 `[B]`, how many each row's prompt has.
        grid: int64 `[N * W]`, the row in each cell; unused cells take row 0 and are never read. None: rows lie as the
            grid does.
        cells: int64 `[B]`, the cell of each row; None likewise.
        prefix_mask: `[N, 1, 1, E]`, 0 on the prompt's keys and -inf behind them.
    """

    prompt_tokens: Tensor
    grid: Tensor | None
    cells: Tensor | None
    prefix_mask: Tensor

    @classmethod
    def build(
        cls,
        group_of_row: np.ndarray,
        prefix_lengths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> RowPlan:
        """Arrange rows of `group_of_row` `[B]` (any order) over groups with the given prompt lengths `[N]`."""
        groups = len(prefix_lengths)
        order = np.argsort(group_of_row, kind="stable")
        counts = np.bincount(group_of_row, minlength=groups)
        starts = np.r_[0, np.cumsum(counts)[:-1]]
        column = np.empty_like(group_of_row)
        column[order] = np.arange(len(group_of_row)) - np.repeat(starts, counts)
        # rows in multiples of 8: matrix kernels treat a short remainder differently, to the last bit
        width = math.ceil(int(counts.max(initial=1)) / _GRID_ROWS) * _GRID_ROWS
        cells = group_of_row * width + column
        grid = np.zeros(groups * width, dtype=np.int64)
        grid[cells] = np.arange(len(group_of_row))
        aligned = np.array_equal(cells, np.arange(len(grid)))
        lengths = torch.tensor(prefix_lengths, device=device)
        keys = torch.arange(extent(max(prefix_lengths)), device=device)
        mask = torch.zeros(groups, 1, 1, len(keys), dtype=dtype, device=device)
        mask.masked_fill_(keys >= lengths[:, None, None, None], -torch.inf)
        return cls(
            prompt_tokens=lengths[torch.from_numpy(group_of_row).to(device)],
            grid=None if aligned else torch.from_numpy(grid).to(device),
            cells=None if aligned else torch.from_numpy(cells).to(device),
            prefix_mask=mask,
        )


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_mask: Tensor,
    plan: RowPlan,
) -> Tensor:
    """One query per row over its group's prompt and its own tokens; the two parts merge by their log-sum-exps.

    Args:
        q: `[B, H, D]`: B rows, H query heads.
        prefix_k, prefix_v: `[N, K, ≥ E, D]` of the groups' prompts; H / K query heads share a key/value head.
        suffix_k, suffix_v: `[B, K, S, D]` of the rows' own tokens.
        suffix_mask: `[B, 1, 1, S]`, 0 on a row's own tokens and -inf behind them.
        plan: where rows lie.

    Returns:
        `[B, H * D]`.
    """
    groups, keys = plan.prefix_mask.shape[0], plan.prefix_mask.shape[-1]
    grid = q if plan.grid is None else q.index_select(0, plan.grid)
    grid = grid.unflatten(0, (groups, -1)).transpose(1, 2)
    parts = (
        _attend(grid, prefix_k[:, :, :keys], prefix_v[:, :, :keys], plan.prefix_mask),
        _attend(q.unsqueeze(2), suffix_k, suffix_v, suffix_mask),
    )
    # attention gives [N, H, W, …] with rows before heads in memory
    (prefix_out, prefix_lse), (suffix_out, suffix_lse) = (
        (x.transpose(1, 2).flatten(0, 1) for x in part) for part in parts
    )
    if plan.cells is not None:
        prefix_out, prefix_lse = prefix_out.index_select(0, plan.cells), prefix_lse.index_select(0, plan.cells)
    # softmax over both parts = their own softmaxes weighted by exp(lse). A softmax of pairs and not a sigmoid of their
    # difference: element-wise functions round the last few elements of a tensor by other code than the rest
    share = torch.softmax(torch.stack((suffix_lse, prefix_lse), dim=-1), dim=-1)[..., 1:].to(q.dtype)
    return torch.lerp(suffix_out, prefix_out, share).flatten(1)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], last_only: bool) -> Tensor:
    """Causal attention within each of N packed prompts.

    Args:
        q: `[T, H, D]`, or `[N, H, D]` (each prompt's last row) with `last_only`.
        k, v: `[T, K, D]`.
        lengths: `[N]`, T = their sum.

    Returns:
        `[T, H * D]`, or `[N, H * D]` with `last_only`.
    """
    pieces = []
    for qs, ks, vs in zip(q.split(1 if last_only else list(lengths)), k.split(lengths), v.split(lengths), strict=True):
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (qs, ks, vs))
        out = F.scaled_dot_product_attention(*heads, is_causal=not last_only, enable_gqa=q.shape[1] != k.shape[1])
        pieces.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(pieces)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp. q `[N, H, M, D]`, k and v `[N, K, S, D]`, mask `[N, 1, 1, S]`
    → `[N, H, M, D]`, float32 `[N, H, M]`."""
    if q.device.type == "cpu":
        mask = mask.expand(-1, -1, q.shape[2], -1)
        return torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    return _attend_reference(q, k, v, mask)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # those that share keys, as rows
    scores = (heads @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + mask
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.unsqueeze(-1)).to(q.dtype) @ v
    return out.view(q.shape), lse.view(q.shape[:-1])
