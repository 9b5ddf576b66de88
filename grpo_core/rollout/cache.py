"""Keys and values of groups under way: each prompt's once per group, each row's own tokens beside them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_core.rollout.attention import RowPlan, extent


class CacheShape(NamedTuple):
    """Of one token's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class GroupCache:
    """Room for `slots` groups and `rows` rows; live groups and rows lie at the front of the buffers.

    Attributes:
        group_size: rows that a new group gets.
        prefix: `[layers, slots, 2 (keys, values), K, E, D]`, one prompt per slot.
        suffix: `[layers, rows, 2, K, S, D]`, a row's own tokens by index.
        prefix_lengths: tokens of each live group's prompt, `[N]`.
        group_of_row: int64 `[B]` on the host.
    """

    def __init__(
        self,
        shape: CacheShape,
        slots: int,
        rows: int,
        group_size: int,
        prompt_tokens: int,
        new_tokens: int,
        device: torch.device,
    ):
        self.group_size = group_size
        # zeros, not empty: masked columns get weight 0, and 0 times a stray NaN would still be NaN
        sizes = dict(dtype=shape.dtype, device=device)
        layers, kv_heads, head_dim, _ = shape
        self.prefix = torch.zeros(layers, slots, 2, kv_heads, extent(prompt_tokens), head_dim, **sizes)
        self.suffix = torch.zeros(layers, rows, 2, kv_heads, extent(new_tokens), head_dim, **sizes)
        self.prefix_lengths: list[int] = []
        self.group_of_row = np.zeros(0, dtype=np.int64)

    @staticmethod
    def bytes_per_group(shape: CacheShape, group_size: int, prompt_tokens: int, new_tokens: int) -> int:
        """Bytes that one more slot takes."""
        return shape.token_bytes * (extent(prompt_tokens) + group_size * extent(new_tokens))

    @property
    def rows(self) -> int:
        """B, the live rows."""
        return len(self.group_of_row)

    @property
    def groups(self) -> int:
        """N, the live groups."""
        return len(self.prefix_lengths)

    def add_groups(self, lengths: list[int]) -> None:
        """Open slots for prompts of these lengths, and `group_size` empty rows for each."""
        first = self.groups
        self.prefix_lengths += lengths
        self.group_of_row = np.r_[self.group_of_row, np.repeat(np.arange(first, self.groups), self.group_size)]

    def keep(self, rows: np.ndarray) -> None:
        """Make row `rows[i]` row i, drop the others and the groups without rows. Only what moves is copied."""
        move(self.suffix, rows, dim=1)
        group_of_row = self.group_of_row[rows]
        groups = fill_holes(np.isin(np.arange(self.groups), group_of_row))
        move(self.prefix, groups, dim=1)
        renumbered = np.full(self.groups, -1)
        renumbered[groups] = np.arange(len(groups))
        self.group_of_row = renumbered[group_of_row]
        self.prefix_lengths = [self.prefix_lengths[group] for group in groups]


class MaskedCache(GroupCache):
    """A cache for attention in plain torch, which masks what lies behind a length.

    Attributes:
        own_lengths: int64 `[rows]` on the device, tokens that each row has in the cache.
        longest: the host's upper bound of own_lengths.
        plan: the rows' arrangement for attention, remade whenever rows come or go.
    """

    def __init__(self, shape: CacheShape, slots: int, group_size: int, prompt_tokens: int, new_tokens: int,
                 device: torch.device):  # fmt: skip
        rows = slots * group_size
        super().__init__(shape, slots, rows, group_size, prompt_tokens, new_tokens, device)
        self.own_lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = np.zeros(0, dtype=np.int64)
        self._flat_heads = torch.arange(rows * 2 * shape.kv_heads, device=device).view(rows, -1) * self.suffix.shape[4]
        self._columns = torch.arange(self.suffix.shape[4], device=device)
        self._seen, self._behind = torch.tensor((0.0, -torch.inf), dtype=shape.dtype, device=device).unbind()
        self.plan: RowPlan | None = None

    def add_groups(self, lengths: list[int]) -> None:
        before = self.rows
        super().add_groups(lengths)
        self.longest = np.r_[self.longest, np.zeros(self.rows - before, dtype=np.int64)]
        self.own_lengths[before : self.rows] = 0
        self._arrange()

    def keep(self, rows: np.ndarray) -> None:
        super().keep(rows)
        move(self.own_lengths, rows, dim=0)
        self.longest = self.longest[rows]
        if len(rows):
            self._arrange()

    def positions(self) -> Tensor:
        """int64 `[B]`, the position of the token that each row appends next."""
        return self.plan.prompt_tokens + self.own_lengths[: self.rows]

    def append_index(self) -> Tensor:
        """int64 `[B * 2K]`, where the next token's keys and values go in a layer's flat suffix `[rows * 2K * S, D]`."""
        return (self._flat_heads[: self.rows] + self.own_lengths[: self.rows, None]).view(-1)

    def suffix_mask(self) -> Tensor:
        """`[B, 1, 1, S']`: 0 on a row's tokens, the one being appended included, -inf behind. S' covers all rows."""
        columns = min(extent(int(self.longest.max()) + 1), self.suffix.shape[4])
        behind = self._columns[:columns] > self.own_lengths[: self.rows, None]
        return torch.where(behind, self._behind, self._seen)[:, None, None]

    def advance(self) -> None:
        """Count the token that every row has just appended. A full row stays at its last column: only rows that have
        ended and wait to be dropped get there."""
        last = self.suffix.shape[4] - 1
        self.own_lengths[: self.rows].add_(1).clamp_(max=last)
        self.longest = np.minimum(self.longest + 1, last)

    def _arrange(self) -> None:
        dtype, device = self.suffix.dtype, self.suffix.device
        self.plan = RowPlan.build(self.group_of_row, self.prefix_lengths, dtype, device)


def fill_holes(alive: np.ndarray) -> np.ndarray:
    """An order of the living entries of bool `[n]` that moves the fewest: the last ones go where the dead ones lay."""
    count = int(alive.sum())
    order = np.arange(count)
    order[~alive[:count]] = count + np.flatnonzero(alive[count:])
    return order


def move(buffer: Tensor, order: np.ndarray, dim: int) -> None:
    """In place, make entry `order[i]` along `dim` entry i."""
    targets = np.flatnonzero(order != np.arange(len(order)))
    if len(targets):
        source, target = (torch.from_numpy(index).to(buffer.device) for index in (order[targets], targets))
        buffer.index_copy_(dim, target, buffer.index_select(dim, source))
