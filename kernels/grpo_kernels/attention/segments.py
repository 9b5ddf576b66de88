"""Pairs of row ranges of packed queries and keys, and how one batched call takes several of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_PADDED_LENGTH = 128
"""Longest segment that is padded to share a call. A longer one is worth a call of its own."""


class DeviceRows(NamedTuple):
    """Rows of segments on a device."""

    query_rows: slice | Tensor
    """In order; a slice if they are adjacent, else int64 indices."""
    key_rows: slice | Tensor
    query_ends: Tensor
    """int32 `[S + 1]`, cumulative lengths."""
    key_ends: Tensor


@dataclass(frozen=True)
class Batch:
    """`count` segments of one length as one `[count, heads, length, D]`, cut out of packed rows."""

    count: int
    query_rows: slice | Tensor
    query_length: int
    key_rows: slice | Tensor
    key_length: int
    valid: Tensor | None
    """bool `[count * length]` where shorter segments are padded at their end (by repeats of a row), else None."""


@dataclass(frozen=True)
class Segments:
    """S pairs of ranges: queries `[start, start + length)` attend to the keys of the paired range.

    Attributes:
        query_starts, query_lengths, key_starts, key_lengths: `[S]`, in order of query_starts; lengths ≥ 1.
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
    def longest(self) -> tuple[int, int]:
        """Longest query and key length. Never 1: at a query length of 1 the flash operators turn heads into rows."""
        return max(2, *self.query_lengths), max(2, *self.key_lengths)

    def on(self, device: torch.device) -> DeviceRows:
        """The rows on a device. Made once, so that the layers of a model share them without a synchronisation."""
        if device not in self._made:
            queries, keys = (self.query_starts, self.query_lengths), (self.key_starts, self.key_lengths)
            self._made[device] = DeviceRows(
                query_rows=_adjacent(*queries) or _indices(*queries).to(device),
                key_rows=_adjacent(*keys) or _indices(*keys).to(device),
                query_ends=_ends(self.query_lengths).to(device),
                key_ends=_ends(self.key_lengths).to(device),
            )
        return self._made[device]

    def batches(self, device: torch.device, causal: bool) -> tuple[tuple[Batch, ...], Tensor | None]:
        """The segments as few batched calls, and where each query row lies in their concatenated, padded rows.

        The second is None if they are in order. A run of adjacent segments of equal lengths is a view of the packed
        rows. Of causal ones over themselves, short lone ones share a padded call with those of a similar length: no row
        sees what follows it. Made once, as `on` is.
        """
        if (device, causal) not in self._made:
            self._made[device, causal] = self._batches(device, causal)
        return self._made[device, causal]

    @cached_property
    def _made(self) -> dict:
        """What `on` and `batches` have made, by their arguments."""
        return {}

    def _batches(self, device: torch.device, causal: bool) -> tuple[tuple[Batch, ...], Tensor | None]:
        views: list[list[int]] = []  # runs that need no padding
        lone: dict[int, list[tuple[int, int]]] = defaultdict(list)  # (start, length), by the length's power of two
        for run in self._runs():
            count, query, length, *keys = run
            if causal and count == 1 and [query, length] == keys and length <= _PADDED_LENGTH:
                lone[length.bit_length()].append((query, length))
            else:
                views.append(run)
        views += [[1, *similar[0], *similar[0]] for similar in lone.values() if len(similar) == 1]
        to_pad = [similar for similar in lone.values() if len(similar) > 1]
        if not to_pad:
            return tuple(_view(*run) for run in sorted(views, key=lambda run: run[1])), None
        covered = [torch.arange(query, query + count * length) for count, query, length, *_ in views]
        padded = []
        for similar in to_pad:
            starts, lengths = torch.tensor(similar).unbind(1)
            longest = int(lengths.max())
            column = torch.arange(longest)
            # past a segment's end its last row is repeated: some row has to be read, and its results are dropped
            rows = (starts[:, None] + torch.minimum(column, lengths[:, None] - 1)).flatten()
            valid = (column < lengths[:, None]).flatten()
            covered.append(rows.masked_fill(~valid, torch.iinfo(torch.int64).max))
            on_device = rows.to(device)
            padded.append(Batch(len(similar), on_device, longest, on_device, longest, valid.to(device)))
        # query rows in order, each with its place among the concatenated ones; padding sorts behind them all
        order = torch.cat(covered).argsort(stable=True)[: sum(self.query_lengths)]
        return (*(_view(*run) for run in views), *padded), order.to(device)

    def _runs(self) -> list[list[int]]:
        """Adjacent segments of equal lengths: [count, query start, query length, key start, key length]."""
        runs: list[list[int]] = []
        for segment in zip(self.query_starts, self.query_lengths, self.key_starts, self.key_lengths, strict=True):
            if runs:
                count, query, length, key, key_length = runs[-1]
                if segment == (query + count * length, length, key + count * key_length, key_length):
                    runs[-1][0] += 1
                    continue
            runs.append([1, *segment])
        return runs


def _view(count: int, query: int, length: int, key: int, key_length: int) -> Batch:
    """A run as a batch: adjacent rows, so that cutting it out copies nothing."""
    rows, key_rows = slice(query, query + count * length), slice(key, key + count * key_length)
    return Batch(count, rows, length, key_rows, key_length, None)


def _adjacent(starts: tuple[int, ...], lengths: tuple[int, ...]) -> slice | None:
    """The ranges as one slice, if each begins where the last one ends."""
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    return slice(starts[0], ends[-1]) if list(starts[1:]) == ends[:-1] else None


def _indices(starts: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
    """int64 rows of the ranges, in order."""
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])


def _ends(lengths: tuple[int, ...]) -> Tensor:
    """int32 `[S + 1]` cumulative lengths from 0, as the flash operators take them."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
