"""Key-value caches of the groups being decoded: each prompt once per group, each sequence's completion beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_core.rollout.attention import SequencePlan, extent

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

    @staticmethod
    def bytes_per_group(shape: CacheShape, group_size: int, prompt_tokens: int, new_tokens: int) -> int:
        """Count the bytes that one more slot takes."""
        token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize  # 2: keys and values
        return token_bytes * (extent(prompt_tokens) + group_size * extent(new_tokens))

    @property
    def num_sequences(self) -> int:
        """B, the live sequences."""
        return len(self.group_of_sequence)

    @property
    def num_groups(self) -> int:
        """N, the live groups."""
        return len(self.prefix_lengths)

    def add_groups(self, lengths: Sequence[int]) -> None:
        """Open slots for prompts of these lengths, with `group_size` empty sequences each."""
        new_groups = np.arange(self.num_groups, self.num_groups + len(lengths))
        self.prefix_lengths += lengths
        self.group_of_sequence = np.r_[self.group_of_sequence, np.repeat(new_groups, self.group_size)]

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        move(self.suffix, sequences, dim=1)
        group_of_sequence = self.group_of_sequence[sequences]
        groups = fill_holes(np.isin(np.arange(self.num_groups), group_of_sequence))
        move(self.prefix, groups, dim=1)
        # groups move as sequences do: the last ones fill the holes
        new_slot = np.full(self.num_groups, -1)
        new_slot[groups] = np.arange(len(groups))
        self.group_of_sequence = new_slot[group_of_sequence]
        self.prefix_lengths = [self.prefix_lengths[group] for group in groups]


class MaskedCache(GroupCache):
    """A cache for attention in plain torch, which masks the columns after a sequence's length.

    Attributes:
        completion_lengths: int64 `[sequences]` on the device, the completion tokens of each sequence in the cache.
        longest: the host's upper bounds of completion_lengths, so that no step has to read them back.
        plan: the sequences' arrangement for attention, remade whenever sequences come or go.
    """

    plan: SequencePlan

    def __init__(
        self,
        shape: CacheShape,
        slots: int,
        group_size: int,
        prompt_tokens: int,
        new_tokens: int,
        device: torch.device,
    ):
        sequences = slots * group_size
        super().__init__(shape, slots, sequences, group_size, prompt_tokens, new_tokens, device)
        self.completion_lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.longest = np.zeros(0, dtype=np.int64)
        # index of column 0 of each sequence's 2 K heads in a layer's suffix, flat as [sequences * 2 K * S, D]
        self._head_starts = (
            torch.arange(sequences * 2 * shape.kv_heads, device=device).view(sequences, -1) * self.suffix.shape[4]
        )
        self._columns = torch.arange(self.suffix.shape[4], device=device)
        # two scalars on the device: torch.where with Python numbers would make float32 of a half-precision mask
        self._visible, self._hidden = torch.tensor((0.0, -torch.inf), dtype=shape.dtype, device=device).unbind()

    def add_groups(self, lengths: Sequence[int]) -> None:
        """Open slots for prompts of these lengths, with `group_size` empty sequences each."""
        before = self.num_sequences
        super().add_groups(lengths)
        self.longest = np.r_[self.longest, np.zeros(self.num_sequences - before, dtype=np.int64)]
        self.completion_lengths[before : self.num_sequences] = 0
        self.plan = SequencePlan.build(
            self.group_of_sequence, self.prefix_lengths, self.suffix.dtype, self.suffix.device
        )

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        super().keep(sequences)
        move(self.completion_lengths, sequences, dim=0)
        self.longest = self.longest[sequences]
        if len(sequences):  # an empty cache has no plan: there is no longest prompt
            self.plan = SequencePlan.build(
                self.group_of_sequence, self.prefix_lengths, self.suffix.dtype, self.suffix.device
            )

    def next_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Locate the token that every sequence appends next.

        Returns:
            int64 `[B]`, its position.
            int64 `[B * 2K]`, where its keys and values go in a layer's suffix, flat as `[sequences * 2K * S, D]`.
            `[B, 1, 1, S']`, a mask: 0 on the completion up to it, -inf after it. S' ≤ S covers all sequences.
        """
        lengths = self.completion_lengths[: self.num_sequences]
        index = (self._head_starts[: self.num_sequences] + lengths[:, None]).view(-1)
        columns = min(extent(int(self.longest.max()) + 1), self.suffix.shape[4])
        after = self._columns[:columns] > lengths[:, None]
        mask = torch.where(after, self._hidden, self._visible)[:, None, None]
        return self.plan.prompt_tokens + lengths, index, mask

    def advance(self) -> None:
        """Count the token that every sequence has just appended.

        A full sequence stays at its last column and overwrites it: only sequences that have ended, and wait to be
        dropped, get there.
        """
        # clamped on the device and on the host alike, without asking which sequences have ended: that would be a wait
        last = self.suffix.shape[4] - 1
        self.completion_lengths[: self.num_sequences].add_(1).clamp_(max=last)
        self.longest = np.minimum(self.longest + 1, last)


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
