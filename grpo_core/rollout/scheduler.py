"""Continuous batching of a rollout: groups enter the decoder as others leave, sequences leave when they have ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grpo_core.rollout.backends import Decoder
from grpo_core.rollout.cache import fill_holes
from grpo_core.rollout.sampling import PendingTokens, SamplingBackend, SamplingParams, StopConditions


@contextmanager
def timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timings[phase]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] += time.perf_counter() - start


class Scheduler:
    """Samples G completions for each of N prompts.

    Completion n·G + g is member g of prompt n. Random numbers are keyed by (prompt, member, token), so neither the
    order of sequences nor what shares their batch changes a result.

    Args:
        decoder: holds the caches.
        embeds: `[P_n, H]` of each prompt.
        keys: uint64 `[N * G]`, the completions' random keys (`rng.row_key`).
        params: what tokens may be sampled, and how.
        stop: when completions end.
        timings: `prefill`, `decode`, `steps` and `slots` are added here.
        bar: counts finished groups.

    Attributes:
        tokens: int64 `[N * G, max_new_tokens]`.
        logprobs: float32, the same shape.
        lengths: int64 `[N * G]`.
        stopped: bool `[N * G]`, ended by a stop condition and not by length.
        steps_per_read: the number of steps to decode at a time; None takes the decoder's.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeds: Sequence[Tensor],
        keys: np.ndarray,
        params: SamplingParams,
        stop: StopConditions,
        timings: dict[str, float],
        bar: tqdm,
    ):
        self.decoder, self.embeds, self.keys, self.params = decoder, embeds, keys, params
        self.stop, self.timings, self.bar = stop, timings, bar
        self.group_size, self.max_new_tokens = params.rollout.group_size, params.rollout.max_new_tokens
        self.steps_per_read: int | None = None
        total = len(embeds) * self.group_size
        # by completion, not by the decoder's sequence: sequences are renumbered whenever some are dropped
        self.tokens = np.zeros((total, self.max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((total, self.max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(total, dtype=np.int64)
        self.stopped = np.zeros(total, dtype=bool)
        self._ended = np.zeros(total, dtype=bool)
        self._ended_by_group = self._ended.reshape(len(embeds), self.group_size)  # a view: the same flags, `[N, G]`
        # tokens asked of the decoder, with those not yet read: `lengths` lags behind by what is pending
        self._requested = np.zeros(total, dtype=np.int64)
        self._groups_reported = 0

    def run(self, budget: int) -> None:
        """Sample every completion within `budget` bytes of caches and logits.

        If memory runs out all the same, the groups that have not finished start again, half as many at a time.
        """
        prompt_tokens = max(map(len, self.embeds))
        slots = self.decoder.plan(len(self.embeds), prompt_tokens, self.params.rollout, budget)
        while True:
            self.timings["slots"] = slots
            done = False
            try:
                self._sample_all(self.decoder.start_sampling(slots, prompt_tokens, self.params), slots)
                done = True
                return
            except RuntimeError as error:
                # on a CPU a failed allocation is a plain RuntimeError, for which torch has no class
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if slots == 1 or not out_of_memory:
                    raise
            finally:
                # after a failure everything is freed: the next attempt allocates smaller caches
                self.decoder.release(reuse=done)
            # a completion that starts again draws the same numbers, so it comes out as it would have
            unfinished = np.repeat(~self._ended_by_group.all(axis=1), self.group_size)
            for state in (self.lengths, self.stopped, self._ended, self._requested):
                state[unfinished] = 0
            slots //= 2

    def _sample_all(self, backend: SamplingBackend, slots: int) -> None:
        """Sample all unfinished groups, at most `slots` at a time."""
        running = np.zeros(0, dtype=np.int64)  # the completion that each of the decoder's sequences is
        pending: deque[tuple[np.ndarray, PendingTokens]] = deque()
        # long prompts first: prompts of similar length share the cache, so little of it is padding
        waiting = np.argsort([-len(embed) for embed in self.embeds], kind="stable")
        waiting = waiting[~self._ended_by_group[waiting].all(axis=1)]
        while len(waiting) or len(running):
            # a slot is free once none of its group's sequences is in the decoder; refill before decoding on, since a
            # step over a full batch takes hardly longer than one over a half-empty batch
            free = slots - len(np.unique(running // self.group_size)) if len(waiting) else 0
            if free:
                with timed(self.timings, "prefill"):
                    groups, waiting = waiting[:free], waiting[free:]
                    completions = (groups[:, None] * self.group_size + np.arange(self.group_size)).ravel()
                    first_tokens = backend.prefill([self.embeds[n] for n in groups], self.keys[completions])
                    running = np.r_[running, completions]
                    self._requested[completions] = 1
                    pending.append((completions, first_tokens))
                    self._read(pending, backend.max_pending)
            else:
                with timed(self.timings, "decode"):
                    # several steps at a time, as each read would stall a GPU, but no further than the longest
                    # unfinished sequence can go: the cache has no columns after max_new_tokens (ended sequences may be
                    # asked for more, they overwrite their last column)
                    longest = int(self._requested[running[~self._ended[running]]].max())
                    steps = min(self.steps_per_read or backend.steps_per_read, self.max_new_tokens - longest)
                    if steps:
                        self._requested[running] += steps
                        pending.append((running, backend.decode(steps)))
                        self.timings["steps"] += steps
                        self._read(pending, backend.max_pending)
                    else:  # that sequence has all its tokens, but the last of them are still pending
                        self._read(pending, len(pending) - 1)
            with timed(self.timings, "decode"):
                running = self._drop_ended(backend, running, refill=len(waiting) > 0)

    def _read(self, pending: deque[tuple[np.ndarray, PendingTokens]], max_pending: int) -> None:
        """Read the oldest results until at most `max_pending` are left, which keep the device busy meanwhile."""
        while len(pending) > max_pending:
            running, wait = pending.popleft()
            for step_tokens, step_logprobs in zip(*wait(), strict=True):
                # a sequence may have ended in an earlier step of this read: what it sampled after its end is dropped
                alive = ~self._ended[running]
                completions, tokens, logprobs = running[alive], step_tokens[alive], step_logprobs[alive]
                # checked here, where numbers are on the host anyway: on the device it would be another wait
                if not np.isfinite(logprobs).all():
                    raise FloatingPointError("the policy's logits are not finite: its weights have diverged")
                self.tokens[completions, self.lengths[completions]] = tokens
                self.logprobs[completions, self.lengths[completions]] = logprobs
                self.lengths[completions] += 1  # before the check, which reads each completion up to its length
                self.stopped[completions] = self.stop.check(tokens, self.tokens, completions, self.lengths)
                at_limit = self.lengths[completions] == self.max_new_tokens
                self._ended[completions] = self.stopped[completions] | at_limit

    def _drop_ended(self, backend: SamplingBackend, running: np.ndarray, refill: bool) -> np.ndarray:
        """Remove ended sequences once that makes steps cheaper, or, to `refill`, once a group's slot can be reused.

        Returns:
            What `running` is afterwards.
        """
        ended = self._ended[running]
        finished = int(self._ended_by_group.all(axis=1).sum())
        slot_freed = finished > self._groups_reported
        self.bar.update(finished - self._groups_reported)
        self._groups_reported = finished
        if (refill and slot_freed) or backend.worth_dropping(len(ended), int((~ended).sum())):
            order = fill_holes(~ended)
            backend.keep(order)
            running = running[order]
        return running
