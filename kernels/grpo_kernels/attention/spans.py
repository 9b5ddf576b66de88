"""Where prompts and completions lie on a packed token axis, and which rows attend to which.

    [prompt₀ | c₀₀ | c₀₁ | … | prompt₁ | c₁₀ | …]

`GroupSpans` has the lengths and starts, and the two arrangements that group attention is made of, each a `Segments`:
pairs of row ranges, and the few calls that cover them on a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_PADDED_LENGTH = 128
"""Longest segment that is padded to share a call. A longer one is worth a call of its own."""

Range = tuple[int, int]
"""First row, and number of rows (≥ 1)."""


@dataclass(frozen=True, init=False)
class GroupSpans:
    """Lengths of N prompts and of each prompt's completions, in the order in which they are packed.

    Attributes:
        prompt_lengths: `[N]` tokens of each prompt, each ≥ 1.
        completion_lengths: `[N][G_n]` tokens of each completion; 0 is allowed, and G_n may differ by prompt.
        prompt_starts: `[N]` first row of each prompt.
        completion_starts: `[N][G_n]` first row of each completion (for an empty one, the row where it would begin).
        total: T, the rows of the packed axis.
        self_segments: every prompt and every non-empty completion over itself, in packed order: queries are all of T.
        prompt_segments: all completions of a group, together, over their prompt; None if no completion has a token.

    Raises:
        ValueError: the two lists of lengths differ in N, a prompt is empty, or a length is negative.
    """

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]
    prompt_starts: tuple[int, ...] = field(compare=False, repr=False)
    completion_starts: tuple[tuple[int, ...], ...] = field(compare=False, repr=False)
    total: int = field(compare=False, repr=False)
    self_segments: Segments = field(compare=False, repr=False)
    prompt_segments: Segments | None = field(compare=False, repr=False)

    def __init__(self, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]):
        prompts = tuple(int(length) for length in prompt_lengths)
        groups = tuple(tuple(int(length) for length in group) for group in completion_lengths)
        if len(prompts) != len(groups):
            raise ValueError(f"{len(prompts)} prompt lengths but completions of {len(groups)} groups")
        prompt_starts: list[int] = []
        completion_starts: list[tuple[int, ...]] = []
        ranges: list[Range] = []
        prompt_ranges: list[Range] = []  # of prompts that some completion token follows
        group_ranges: list[Range] = []  # their completions
        row = 0
        for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            if prompt < 1:
                raise ValueError(f"prompt {n} is empty: a completion needs at least one token to follow")
            if min(group, default=0) < 0:
                raise ValueError(f"group {n} has a negative completion length: {group}")
            prompt_starts.append(row)
            ranges.append((row, prompt))
            row += prompt
            if sum(group):
                prompt_ranges.append(ranges[-1])
                group_ranges.append((row, sum(group)))
            starts = []
            for length in group:
                starts.append(row)
                if length:  # an empty completion has no rows to attend from
                    ranges.append((row, length))
                row += length
            completion_starts.append(tuple(starts))
        # frozen, so that the rows made for a device stay true and equal lengths hash alike: set past __setattr__
        vars(self).update(
            prompt_lengths=prompts,
            completion_lengths=groups,
            prompt_starts=tuple(prompt_starts),
            completion_starts=tuple(completion_starts),
            total=row,
            self_segments=Segments(tuple(ranges), tuple(ranges), causal=True),
            prompt_segments=Segments(tuple(group_ranges), tuple(prompt_ranges), causal=False) if group_ranges else None,
        )


class DeviceRows(NamedTuple):
    """The rows of one side, queries or keys, of S segments on a device."""

    rows: slice | Tensor
    """In order; a slice if they are adjacent, so that taking them copies nothing, else int64 indices."""
    ends: Tensor
    """int32 `[S + 1]`, cumulative lengths from 0, as the flash operators take them."""
    longest: int
    """Longest segment. Never 1: at a query length of 1 the flash operators turn heads into rows."""


@dataclass(frozen=True)
class Batch:
    """Segments of one length that share a call, as `[count, heads, length, D]` cut out of packed rows."""

    count: int
    query_rows: slice | Tensor
    key_rows: slice | Tensor
    valid: Tensor | None
    """bool `[count · length]` where shorter segments are padded at their end (by repeats of a row), else None."""


@dataclass(frozen=True)
class Segments:
    """S ≥ 1 pairs of row ranges: the queries of a range attend to the keys of the paired one.

    Attributes:
        queries, keys: `[S]`, in order of the queries' starts.
        causal: the i-th query of a range sees its first i + 1 keys, and both ranges are the same; else it sees all.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    causal: bool
    # made once per device: the layers of a model share them, where making them anew would synchronise with the device
    _rows: dict[torch.device, tuple[DeviceRows, DeviceRows]] = field(default_factory=dict, compare=False, repr=False)
    _batches: dict[torch.device, tuple[list[Batch], Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def on(self, device: torch.device) -> tuple[DeviceRows, DeviceRows]:
        """Give the rows of queries and of keys on a device."""
        if device not in self._rows:
            sides = []
            for ranges in (self.queries, self.keys):
                first, lengths = ranges[0][0], [length for _, length in ranges]
                ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
                rows: slice | Tensor = slice(first, first + sum(lengths))
                if [first + end for end in ends[:-1].tolist()] != [start for start, _ in ranges]:
                    rows = torch.cat([torch.arange(start, start + length) for start, length in ranges]).to(device)
                sides.append(DeviceRows(rows, ends.to(device), max(2, *lengths)))
            self._rows[device] = sides[0], sides[1]
        return self._rows[device]

    def batches(self, device: torch.device) -> tuple[list[Batch], Tensor | None]:
        """Give the segments as few batched calls, for attention kernels that know no cumulative lengths.

        A run of adjacent segments of equal lengths is a view of the packed rows. Of causal ones, short lone ones share
        a padded call with those of a similar length: no row sees what follows it.

        Returns:
            The batches, and where each query row lies in their concatenated, padded rows; None if they are in order.
        """
        if device in self._batches:
            return self._batches[device]
        runs: list[list[int]] = []  # [count, query start, query length, key start, key length]
        for (query, length), (key, key_length) in zip(self.queries, self.keys, strict=True):
            count = runs[-1][0] if runs else 0
            if runs and runs[-1][1:] == [query - count * length, length, key - count * key_length, key_length]:
                runs[-1][0] += 1  # it begins where the last run ends
            else:
                runs.append([1, query, length, key, key_length])
        lone: dict[int, list[Range]] = defaultdict(list)  # short runs of one segment, by their length's power of two
        for count, query, length, *_ in runs:
            if self.causal and count == 1 and length <= _PADDED_LENGTH:
                lone[length.bit_length()].append((query, length))
        to_pad = [similar for similar in lone.values() if len(similar) > 1]
        padded = {query for similar in to_pad for query, _ in similar}
        views = [run for run in runs if run[1] not in padded]
        batches = [
            Batch(count, slice(query, query + count * length), slice(key, key + count * key_length), None)
            for count, query, length, key, key_length in views
        ]
        order = None
        if to_pad:
            covered = [torch.arange(query, query + count * length) for count, query, length, *_ in views]
            for similar in to_pad:
                starts, lengths = torch.tensor(similar).unbind(1)
                column = torch.arange(int(lengths.max()))
                # past a segment's end its last row is repeated: some row has to be read, and its results are dropped
                indices = (starts[:, None] + torch.minimum(column, lengths[:, None] - 1)).flatten()
                valid = (column < lengths[:, None]).flatten()
                covered.append(indices.masked_fill(~valid, torch.iinfo(torch.int64).max))
                indices = indices.to(device)
                batches.append(Batch(len(similar), indices, indices, valid.to(device)))
            # argsort inverts "which row lies where": a query row's place in the concatenation; padding sorts to the end
            rows = sum(length for _, length in self.queries)
            order = torch.cat(covered).argsort(stable=True)[:rows].to(device)
        self._batches[device] = batches, order
        return self._batches[device]
