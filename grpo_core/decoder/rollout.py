"""One rollout: groups enter the decoder as others leave, rows leave it when they have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grpo_core.config import RolloutConfig
from grpo_core.decoder.base import Decoder
from grpo_core.decoder.cache import fill_holes
from grpo_core.decoder.choice import TokenChooser
from grpo_core.decoder.stopping import StopConditions

_DRAWN_AHEAD = 16
_STEPS_PER_READ = 8
_DROP_SHARE = 16


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

    Completion n·G + g is member g of prompt n. The decoder's row i draws completion `owner[i]`; random numbers go by
    (prompt, member, token), so the order of rows and what shares their batch leave no trace.

    Args:
        decoder: holds the caches.
        embeds: `[P_n, H]` of each prompt.
        keys: uint64 `[N]`, the prompts' random keys.
        draw: uniform numbers of (key, member, token), as `rng.uniform` with its seed and step bound.
        rollout: sizes and settings.
        choose, stop: how tokens are chosen and when rows end.
        timings: `prefill`, `decode`, `steps` and `slots` are added here.
        bar: counts whole groups.

    Attributes:
        tokens: int64 `[N * G, max_new_tokens]`.
        logprobs: float32, the same shape.
        lengths: int64 `[N * G]`.
        stopped: bool `[N * G]`, ended by a stop condition and not by length.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeds: Sequence[Tensor],
        keys: np.ndarray,
        draw: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
        rollout: RolloutConfig,
        choose: TokenChooser,
        stop: StopConditions,
        timings: dict[str, float],
        bar: tqdm,
    ):
        self.decoder, self.embeds, self.keys, self.draw, self.rollout = decoder, embeds, keys, draw, rollout
        self.choose, self.stop, self.timings, self.bar = choose, stop, timings, bar
        self.device = embeds[0].device
        self.steps_per_read = 1 if self.device.type == "cpu" else _STEPS_PER_READ
        total = len(embeds) * rollout.group_size
        self.tokens = np.zeros((total, rollout.max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((total, rollout.max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(total, dtype=np.int64)
        self.stopped = np.zeros(total, dtype=bool)
        self._ended = np.zeros(total, dtype=bool)
        self._groups_done = 0
        self._reset_rows()

    def run(self, budget: int) -> None:
        """Draw every completion within `budget` bytes of caches and logits. When memory runs out all the same, the
        groups that are not whole start again, half as many at a time."""
        sizes = (self.rollout.group_size, max(map(len, self.embeds)), self.rollout.max_new_tokens)
        slots = self.decoder.plan(len(self.embeds), *sizes, budget)
        while True:
            self.timings["slots"] = slots
            try:
                self.decoder.reserve(slots, *sizes)
                self._draw_all(slots)
                return
            except RuntimeError as error:
                if slots == 1 or not _is_out_of_memory(error):
                    raise
            finally:
                self.decoder.release()
            self._restart_unfinished()
            slots //= 2

    def _draw_all(self, slots: int) -> None:
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
        logits = self.decoder.prefill([self.embeds[n] for n in groups]).repeat_interleave(size, dim=0)
        owner = (groups[:, None] * size + np.arange(size)).ravel()
        first = len(self.owner)
        self.owner = np.r_[self.owner, owner]
        self._draws = np.r_[self._draws, self._draw_ahead(owner)]
        self._draws_from = np.r_[self._draws_from, self.lengths[owner]]
        if self.rollout.repetition_penalty != 1:
            blank = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            self._seen = blank if self._seen is None else torch.cat((self._seen, blank))
        tokens, logprobs = self._choose(logits, slice(first, None), ahead=0)
        self._last = torch.cat((self._last, tokens))
        self._record(owner, tokens[None].cpu().numpy(), logprobs[None].cpu().numpy())

    def _advance(self) -> None:
        """Decode a few tokens, then look at them: reading each one back would stall a GPU."""
        room = self.rollout.max_new_tokens - int(
            self.lengths[self.owner].max(where=~self._ended[self.owner], initial=0)
        )
        steps = min(self.steps_per_read, room)
        if (self.lengths[self.owner] - self._draws_from).max() + steps > _DRAWN_AHEAD:
            self._draws, self._draws_from = self._draw_ahead(self.owner), self.lengths[self.owner]
        chosen = []
        for ahead in range(steps):
            chosen.append(self._choose(self.decoder.step(self._last), slice(None), ahead))
            self._last = chosen[-1][0]
        tokens, logprobs = (torch.stack(column).cpu().numpy() for column in zip(*chosen, strict=True))
        self._record(self.owner, tokens, logprobs)
        self.timings["steps"] += steps

    def _choose(self, logits: Tensor, rows: slice, ahead: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs of `rows`, `ahead` tokens after the last one recorded."""
        uniforms = None
        if self.rollout.temperature > 0:
            index = self.lengths[self.owner[rows]] - self._draws_from[rows] + ahead
            drawn = self._draws[rows][np.arange(len(index)), index]
            uniforms = torch.from_numpy(drawn).to(self.device, torch.float32)
        seen = None if self._seen is None else self._seen[rows]
        tokens, logprobs = self.choose(logits, uniforms, seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens, logprobs

    def _draw_ahead(self, owner: np.ndarray) -> np.ndarray:
        """Uniform numbers `[rows, _DRAWN_AHEAD]` for the next tokens of completions `owner`."""
        if self.rollout.temperature == 0:
            return np.zeros((len(owner), 0))
        group, member = np.divmod(owner, self.rollout.group_size)
        token = self.lengths[owner, None] + np.arange(_DRAWN_AHEAD)
        return self.draw(self.keys[group, None], member[:, None], token)

    def _record(self, owner: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Note tokens and log-probs `[steps, rows]`; what a row drew after its end is dropped."""
        for new_tokens, new_logprobs in zip(tokens, logprobs, strict=True):
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
        """Take ended rows out of the decoder once they are 1/16 of its rows, or a whole group's slot is wanted."""
        ended = self._ended[self.owner]
        whole = int(self._whole().sum())
        if ended.sum() * _DROP_SHARE >= len(ended) or (refill and whole > self._groups_done):
            rows = fill_holes(~ended)
            self.decoder.keep(rows)
            self.owner, self._draws, self._draws_from = self.owner[rows], self._draws[rows], self._draws_from[rows]
            index = torch.from_numpy(rows).to(self.device)
            self._last = self._last[index]
            self._seen = None if self._seen is None else self._seen[index]
        self.bar.update(whole - self._groups_done)
        self._groups_done = whole

    def _whole(self) -> np.ndarray:
        """Which groups have all their completions, bool `[N]`."""
        return self._ended.reshape(len(self.embeds), -1).all(axis=1)

    def _restart_unfinished(self) -> None:
        unfinished = np.repeat(~self._whole(), self.rollout.group_size)
        for state in (self.lengths, self.stopped, self._ended):
            state[unfinished] = 0
        self._reset_rows()

    def _reset_rows(self) -> None:
        self.owner = np.zeros(0, dtype=np.int64)
        self._draws = self._draw_ahead(self.owner)
        self._draws_from = np.zeros(0, dtype=np.int64)
        self._last = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._seen: Tensor | None = None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU (for which torch has no exception class)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
