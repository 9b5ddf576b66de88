"""Where prompts and completions lie on a packed token axis: `[prompt₀ | c₀₀ | c₀₁ | … | prompt₁ | c₁₀ | …]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from grpo_kernels.attention.segments import Segments


@dataclass(frozen=True)
class GroupSpans:
    """Lengths of N prompts and of each prompt's completions, in the order in which they are packed.

    Attributes:
        prompt_lengths: `[N]` tokens of each prompt, each ≥ 1.
        completion_lengths: `[N][G_n]` tokens of each completion; 0 is allowed, and G_n may differ by prompt.

    Raises:
        ValueError: the two differ in N, a prompt is empty, or a length is negative.
    """

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]

    def __init__(self, prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]):
        # the class is frozen, so that what is cached below stays true; tuples of int make it hashable
        object.__setattr__(self, "prompt_lengths", tuple(int(n) for n in prompt_lengths))
        object.__setattr__(
            self, "completion_lengths", tuple(tuple(int(n) for n in group) for group in completion_lengths)
        )
        if len(self.prompt_lengths) != len(self.completion_lengths):
            raise ValueError(
                f"{len(self.prompt_lengths)} prompt lengths but completions of {len(self.completion_lengths)} groups"
            )
        for n, (prompt, group) in enumerate(zip(self.prompt_lengths, self.completion_lengths, strict=True)):
            if prompt < 1:
                raise ValueError(f"prompt {n} is empty: a completion needs at least one token to follow")
            if min(group, default=0) < 0:
                raise ValueError(f"group {n} has a negative completion length: {group}")

    @cached_property
    def prompt_starts(self) -> tuple[int, ...]:
        """`[N]` first row of each prompt."""
        starts, row = [], 0
        for prompt, group in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            starts.append(row)
            row += prompt + sum(group)
        return tuple(starts)

    @cached_property
    def completion_starts(self) -> tuple[tuple[int, ...], ...]:
        """`[N][G_n]` first row of each completion (for an empty one, the row where it would begin)."""
        starts = []
        for start, prompt, group in zip(self.prompt_starts, self.prompt_lengths, self.completion_lengths, strict=True):
            row, members = start + prompt, []
            for length in group:
                members.append(row)
                row += length
            starts.append(tuple(members))
        return tuple(starts)

    @cached_property
    def total(self) -> int:
        """T, the rows of the packed axis."""
        return sum(self.prompt_lengths) + sum(map(sum, self.completion_lengths))

    @cached_property
    def self_segments(self) -> Segments:
        """Every prompt and every non-empty completion over itself, in packed order: query rows are all of T."""
        starts, lengths = [], []
        for row, prompt, group in zip(self.prompt_starts, self.prompt_lengths, self.completion_lengths, strict=True):
            for length in (prompt, *filter(None, group)):  # an empty completion has no rows, and no segment
                starts.append(row)
                lengths.append(length)
                row += length
        return Segments(starts, lengths, starts, lengths)

    @cached_property
    def prompt_segments(self) -> Segments:
        """All completions of a group, together, over their prompt; groups whose completions are all empty have none."""
        segments = [
            (start + prompt, sum(group), start, prompt)
            for start, prompt, group in zip(
                self.prompt_starts, self.prompt_lengths, self.completion_lengths, strict=True
            )
            if sum(group)
        ]
        return Segments(*(zip(*segments, strict=True) if segments else ((), (), (), ())))
