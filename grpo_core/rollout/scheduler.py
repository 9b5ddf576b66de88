"""One rollout: groups enter the decoder as others leave, rows leave it when they have ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grpo_core.rollout.backends.base import Decoder
from grpo_core.rollout.cache import fill_holes
from grpo_core.rollout.sampling import Drawer, Drawn, DrawRules
from grpo_core.rollout.stopping import StopConditions


@contextmanager
def timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timings[phase]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] += time.perf_counter() - start


class Rollout:
    """Draws G completions for each of N prompts.

    Completion n·G + g is member g of prompt n. Row i of the decoder draws completion `owner[i]`; random numbers go by
    (prompt, member, token), so the order of rows and what shares their batch leave no trace.

    Args:
        decoder: holds the caches.
        embeds: `[P_n, H]` of each prompt.
        keys: uint64 `[N * G]`, the completions' random keys (`rng.row_key`).
        rules: what tokens are drawn by.
        stop: when completions end.
        timings: `prefill`, `decode`, `steps` and `slots` are added here.
        bar: counts whole groups.

    Attributes:
        tokens: int64 `[N * G, max_new_tokens]`.
        logprobs: float32, the same shape.
        lengths: int64 `[N * G]`.
        stopped: bool `[N * G]`, ended by a stop condition and not by length.
        steps_per_read: how many steps are asked for at a time; unset, what the decoder likes.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeds: Sequence[Tensor],
        keys: np.ndarray,
        rules: DrawRules,
        stop: StopConditions,
        timings: dict[str, float],
        bar: tqdm,
    ):
        self.decoder, self.embeds, self.keys, self.rules, self.rollout = decoder, embeds, keys, rules, rules.rollout
        self.stop, self.timings, self.bar = stop, timings, bar
        self.steps_per_read: int | None = None
        total = len(embeds) * self.rollout.group_size
        self.tokens = np.zeros((total, self.rollout.max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((total, self.rollout.max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(total, dtype=np.int64)
        self.stopped = np.zeros(total, dtype=bool)
        self._ended = np.zeros(total, dtype=bool)
        self._drawn = np.zeros(total, dtype=np.int64)  # tokens asked for, those not yet read included
        self._groups_done = 0

    def run(self, budget: int) -> None:
        """Draw every completion within `budget` bytes of caches and logits. When memory runs out all the same, the
        groups that are not whole start again, half as many at a time."""
        sizes = (self.rollout.group_size, max(map(len, self.embeds)), self.rollout.max_new_tokens)
        slots = self.decoder.plan(len(self.embeds), *sizes, budget)
        while True:
            self.timings["slots"] = slots
            done = False
            try:
                self.decoder.reserve(slots, *sizes)
                self._draw_all(self.decoder.drawer(self.rules), slots)
                done = True
                return
            except RuntimeError as error:
                if slots == 1 or not _is_out_of_memory(error):
                    raise
            finally:
                self.decoder.release(reuse=done)
            self._restart_unfinished()
            slots //= 2

    def _draw_all(self, drawer: Drawer, slots: int) -> None:
        self.drawer = drawer
        self.owner = np.zeros(0, dtype=np.int64)
        self._unread: deque[tuple[np.ndarray, Drawn]] = deque()
        # long prompts first: prompts of like length share the cache, so little of it is padding
        waiting = np.argsort([-len(embed) for embed in self.embeds], kind="stable")
        waiting = waiting[~self._whole()[waiting]]
        while len(waiting) or len(self.owner):
            free = slots - len(np.unique(self.owner // self.rollout.group_size)) if len(waiting) else 0
            if free:
                with timed(self.timings, "prefill"):
                    self._admit(waiting[:free])
                waiting = waiting[free:]
            else:
                with timed(self.timings, "decode"):
                    self._advance()
            with timed(self.timings, "decode"):
                self._drop_ended(refill=len(waiting) > 0)

    def _admit(self, groups: np.ndarray) -> None:
        """Prefill groups and draw the first token of their rows."""
        size = self.rollout.group_size
        owner = (groups[:, None] * size + np.arange(size)).ravel()
        drawn = self.drawer.admit([self.embeds[n] for n in groups], self.keys[owner])
        self.owner = np.r_[self.owner, owner]
        self._drawn[owner] = 1
        self._read_later(owner, drawn)

    def _advance(self) -> None:
        """Decode a few tokens: reading each one back would stall a GPU."""
        going = self._drawn[self.owner[~self._ended[self.owner]]]
        steps = min(self.steps_per_read or self.drawer.steps_per_read, self.rollout.max_new_tokens - going.max())
        if steps == 0:  # the next row to end has all its tokens, still unread
            self._record(*self._unread.popleft())
            return
        self._drawn[self.owner] += steps
        self._read_later(self.owner, self.drawer.advance(int(steps)))
        self.timings["steps"] += int(steps)

    def _read_later(self, owner: np.ndarray, drawn: Drawn) -> None:
        """Note what rows draw, as soon as steps enough are under way to keep the device busy meanwhile."""
        self._unread.append((owner, drawn))
        while len(self._unread) > self.drawer.lag:
            self._record(*self._unread.popleft())

    def _record(self, owner: np.ndarray, drawn: Drawn) -> None:
        """Note the tokens and log-probs of the completions `owner`; what a row drew after its end is dropped."""
        for new_tokens, new_logprobs in zip(*drawn(), strict=True):
            alive = ~self._ended[owner]
            rows, fresh = owner[alive], new_tokens[alive]
            if not np.isfinite(new_logprobs[alive]).all():
                raise FloatingPointError("the policy's logits are not finite: its weights have diverged")
            self.tokens[rows, self.lengths[rows]] = fresh
            self.logprobs[rows, self.lengths[rows]] = new_logprobs[alive]
            self.lengths[rows] += 1
            self.stopped[rows] = self.stop.check(fresh, self.tokens, rows, self.lengths)
            self._ended[rows] = self.stopped[rows] | (self.lengths[rows] == self.rollout.max_new_tokens)

    def _drop_ended(self, refill: bool) -> None:
        """Take ended rows out of the decoder once that makes its steps cheaper, or a whole group's slot is wanted."""
        ended = self._ended[self.owner]
        whole = int(self._whole().sum())
        if (refill and whole > self._groups_done) or self.drawer.shrinks(len(ended), int((~ended).sum())):
            rows = fill_holes(~ended)
            self.drawer.keep(rows)
            self.owner = self.owner[rows]
        self.bar.update(whole - self._groups_done)
        self._groups_done = whole

    def _whole(self) -> np.ndarray:
        """Which groups have all their completions, bool `[N]`."""
        return self._ended.reshape(len(self.embeds), -1).all(axis=1)

    def _restart_unfinished(self) -> None:
        unfinished = np.repeat(~self._whole(), self.rollout.group_size)
        for state in (self.lengths, self.stopped, self._ended, self._drawn):
            state[unfinished] = 0


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU (for which torch has no exception class)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
