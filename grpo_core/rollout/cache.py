"""Key-value cache of the groups being decoded: each prompt once per group, each sequence's completion beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PREFILL_TOKENS = 16384
"""Prompts are prefilled together up to this many tokens: enough to fill a GPU, and a bound on a layer's activations."""


class CacheShape(NamedTuple):
    """Sizes of one token's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class GroupCache:
    """Keys and values for up to `slots` groups of together up to `sequences` sequences.

    Live groups and sequences are kept at the front of the buffers, so that a batch is a slice.

    Attributes:
        group_size: sequences that a new group gets.
        prefix: `[layers, slots, 2 (keys, values), K, E, D]`, one prompt per slot.
        suffix: `[layers, sequences, 2, K, S, D]`, each completion's tokens by index.
        prefix_lengths: tokens of each live group's prompt, `[N]`.
        group_of_sequence: int64 `[B]` on the host.
        num_groups, num_sequences: N and B, those that are live.
    """

    def __init__(
        self,
        shape: CacheShape,
        slots: int,
        sequences: int,
        group_size: int,
        prompt_tokens: int,
        new_tokens: int,
        device: torch.device,
    ):
        self.group_size = group_size
        layers, kv_heads, head_dim, dtype = shape
        # heads before tokens, as attention reads them; keys beside values, so that one copy appends both
        prefix = (layers, slots, 2, kv_heads, extent(prompt_tokens), head_dim)
        suffix = (layers, sequences, 2, kv_heads, extent(new_tokens), head_dim)
        # zeros, not empty: masked columns get weight 0, and 0 times a stray NaN would still be NaN
        self.prefix = torch.zeros(prefix, dtype=dtype, device=device)
        self.suffix = torch.zeros(suffix, dtype=dtype, device=device)
        self.prefix_lengths: list[int] = []
        self.group_of_sequence = np.zeros(0, dtype=np.int64)
        self.num_groups = self.num_sequences = 0

    def add_groups(self, lengths: Sequence[int]) -> None:
        """Open slots for prompts of these lengths, with `group_size` empty sequences each."""
        new_groups = np.arange(self.num_groups, self.num_groups + len(lengths))
        self.prefix_lengths += lengths
        self.group_of_sequence = np.r_[self.group_of_sequence, np.repeat(new_groups, self.group_size)]
        self.num_groups, self.num_sequences = len(self.prefix_lengths), len(self.group_of_sequence)

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        # in place, so that attention goes on reading slices: a copy of the whole cache would double it for a moment
        move(self.suffix, sequences, dim=1)
        group_of_sequence = self.group_of_sequence[sequences]
        # groups move as sequences do: the last ones fill the holes
        groups = fill_holes(np.isin(np.arange(self.num_groups), group_of_sequence))
        move(self.prefix, groups, dim=1)
        # groups are named by their slot, so sequences follow theirs
        new_slot = np.full(self.num_groups, -1)
        new_slot[groups] = np.arange(len(groups))
        self.group_of_sequence = new_slot[group_of_sequence]
        self.prefix_lengths = [self.prefix_lengths[group] for group in groups]
        self.num_groups, self.num_sequences = len(groups), len(sequences)


def extent(length: int) -> int:
    """Round `length` keys up to the next size at which masked padding cannot change a result's bits.

    CPU kernels sum keys in SIMD lanes of 16 and split long sums into blocks, so a sequence's value would depend on how
    far its neighbours in the batch make it padded. With multiples of 16 up to 256, and of 512 above, it does not.
    """
    block = 16 if length <= 256 else 512
    return math.ceil(max(length, 1) / block) * block


def fill_holes(alive: np.ndarray) -> np.ndarray:
    """Compact live entries to the front with the fewest moves: fill each hole with an entry from the end.

    Args:
        alive: bool `[n]`.

    Returns:
        int64, the old index of each entry that stays.
    """
    count = int(alive.sum())
    order = np.arange(count)
    order[~alive[:count]] = count + np.flatnonzero(alive[count:])
    return order


def move(buffer: Tensor, order: np.ndarray, dim: int) -> None:
    """Make entry `order[i]` along `dim` entry i, in place: addresses stay, and only what moves is copied."""
    targets = np.flatnonzero(order != np.arange(len(order)))
    if len(targets):
        source, target = (torch.from_numpy(index).to(buffer.device) for index in (order[targets], targets))
        # index_select copies first, so a source may be another entry's target
        buffer.index_copy_(dim, target, buffer.index_select(dim, source))


def prefill_batches(lengths: Sequence[int]) -> Iterator[slice]:
    """Split prompts, in order, into batches of at most `PREFILL_TOKENS` tokens; a longer prompt is one by itself."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while end < len(lengths) and sum(lengths[start : end + 1]) <= PREFILL_TOKENS:
            end += 1
        yield slice(start, end)
        start = end
