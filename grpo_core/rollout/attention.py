"""Attention during sampling, in plain torch: causal over prompts; of new tokens to their prompt and completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def extent(length: int) -> int:
    """Round `length` keys up to the next size at which masked padding cannot change a result's bits.

    CPU kernels sum keys in SIMD lanes of 16 and split long sums into blocks, so a sequence's value would depend on how
    far its neighbours in the batch make it padded. With multiples of 16 up to 256, and of 512 above, it does not.
    """
    block = 16 if length <= 256 else 512
    return math.ceil(max(length, 1) / block) * block


@dataclass(frozen=True)
class SequencePlan:
    """Which group each of B sequences belongs to, and the sequences of N groups as a `[N, W]` grid.

    The grid lets one batched product serve all queries of a group: its prompt's keys are read once, not once per
    sequence. W is at least the number of sequences of any group.

    Attributes:
        prompt_tokens: int64 `[B]`, the length of each sequence's prompt.
        grid: int64 `[N * W]`, the sequence in each cell; unused cells hold 0 and are never read. None: sequences are
            already in the grid's order, without gaps.
        cells: int64 `[B]`, the cell of each sequence; None likewise.
        prefix_mask: `[N, 1, 1, E]`, 0 on the prompt's keys and -inf after them.
    """

    prompt_tokens: Tensor
    grid: Tensor | None
    cells: Tensor | None
    prefix_mask: Tensor

    @classmethod
    def build(
        cls, group_of_sequence: np.ndarray, prefix_lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> SequencePlan:
        """Arrange sequences, given the group of each `[B]` (in any order) and the groups' prompt lengths `[N]`."""
        groups = len(prefix_lengths)
        order = np.argsort(group_of_sequence, kind="stable")
        counts = np.bincount(group_of_sequence, minlength=groups)
        starts = np.r_[0, np.cumsum(counts)[:-1]]
        column = np.empty_like(group_of_sequence)
        column[order] = np.arange(len(group_of_sequence)) - np.repeat(starts, counts)
        # W in multiples of 8: matrix kernels treat a short remainder of rows differently, to the last bit
        width = math.ceil(int(counts.max(initial=1)) / 8) * 8
        cells = group_of_sequence * width + column
        grid = np.zeros(groups * width, dtype=np.int64)
        grid[cells] = np.arange(len(group_of_sequence))
        # full groups of a multiple of 8, as most rollouts begin: no gather in any layer
        aligned = np.array_equal(cells, np.arange(len(grid)))
        lengths = torch.tensor(prefix_lengths, device=device)
        keys = torch.arange(extent(max(prefix_lengths)), device=device)
        mask = torch.zeros(groups, 1, 1, len(keys), dtype=dtype, device=device)
        mask.masked_fill_(keys >= lengths[:, None, None, None], -torch.inf)
        return cls(
            prompt_tokens=lengths[torch.from_numpy(group_of_sequence).to(device)],
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
    plan: SequencePlan,
) -> Tensor:
    """Attend from each sequence's newest token to its group's prompt and its completion; merge by log-sum-exp.

    Args:
        q: `[B, H, D]`: B sequences, H query heads.
        prefix_k, prefix_v: `[N, K, ≥ E, D]` of the groups' prompts; H / K query heads share a key/value head.
        suffix_k, suffix_v: `[B, K, S, D]` of the completions.
        suffix_mask: `[B, 1, 1, S]`, 0 on a completion's tokens and -inf after them.
        plan: which sequences belong to which group.

    Returns:
        `[B, H * D]`.
    """
    groups, keys = plan.prefix_mask.shape[0], plan.prefix_mask.shape[-1]
    grid = q if plan.grid is None else q.index_select(0, plan.grid)
    grid = grid.unflatten(0, (groups, -1)).transpose(1, 2)
    prefix_out, prefix_lse = _attend(grid, prefix_k[:, :, :keys], prefix_v[:, :, :keys], plan.prefix_mask)
    suffix_out, suffix_lse = _attend(q.unsqueeze(2), suffix_k, suffix_v, suffix_mask)
    # [N, H, W, …] → [N * W, H, …]. The CPU kernel's output lies with W before H in memory, so this copies nothing
    prefix_out, prefix_lse, suffix_out, suffix_lse = (
        x.transpose(1, 2).flatten(0, 1) for x in (prefix_out, prefix_lse, suffix_out, suffix_lse)
    )
    if plan.cells is not None:
        prefix_out, prefix_lse = prefix_out.index_select(0, plan.cells), prefix_lse.index_select(0, plan.cells)
    # softmax over all keys = the two softmaxes weighted by exp(lse). A softmax of pairs and not a sigmoid of their
    # difference: element-wise functions round the last few elements of a tensor by other code than the rest
    share = torch.softmax(torch.stack((suffix_lse, prefix_lse), dim=-1), dim=-1)[..., 1:].to(q.dtype)
    return torch.lerp(suffix_out, prefix_out, share).flatten(1)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], last_only: bool) -> Tensor:
    """Attend causally within each of N packed prompts.

    Args:
        q: `[P, H, D]`, P the prompts' tokens together; `[N, H, D]` of each prompt's last token with `last_only`.
        k, v: `[P, K, D]`.
        lengths: `[N]`, P = their sum.

    Returns:
        `[P, H * D]`, or `[N, H * D]` with `last_only`.
    """
    outputs = []
    # one call per prompt: a packed call would need a dense [P, P] mask
    for qs, ks, vs in zip(q.split(1 if last_only else list(lengths)), k.split(lengths), v.split(lengths), strict=True):
        q_heads, k_heads, v_heads = (x.transpose(0, 1).unsqueeze(0) for x in (qs, ks, vs))
        out = F.scaled_dot_product_attention(
            q_heads, k_heads, v_heads, is_causal=not last_only, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and its log-sum-exp. q `[N, H, W, D]`, k and v `[N, K, S, D]`, mask `[N, 1, 1, S]`
    → `[N, H, W, D]`, float32 `[N, H, W]`."""
    if q.device.type == "cpu":
        # the operator behind scaled_dot_product_attention: the public function does not return the log-sum-exp
        mask = mask.expand(-1, -1, q.shape[2], -1)
        return torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    return _attend_reference(q, k, v, mask)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # query heads that share keys, as rows of one product
    scores = (heads @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + mask
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.unsqueeze(-1)).to(q.dtype) @ v
    return out.view(q.shape), lse.view(q.shape[:-1])
