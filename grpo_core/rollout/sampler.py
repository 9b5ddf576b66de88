"""Group sampling: every prompt prefilled once, its G completions decoded together; groups come in as others leave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from grpo_core import rng
from grpo_core.chat import turn_end
from grpo_core.config.options import RolloutConfig
from grpo_core.data import longest_sequence
from grpo_core.distributed.stopping import poll
from grpo_core.errors import InputError
from grpo_core.families import text_config
from grpo_core.policy import Policy
from grpo_core.rollout.backends import Decoder, make_decoder
from grpo_core.rollout.cache import fill_holes
from grpo_core.rollout.sampling import PendingTokens, SamplingBackend, SamplingParams, StopConditions, Tokenizer
from grpo_core.types import Completion, FinishReason, Group, Prompt
from grpo_core.verify import verify_model


class GroupSampler:
    """Samples G completions for each of N prompts from the policy as it is at the call.

    A completion depends on the seed, the step, its prompt and its index in the group alone: not on what else is in the
    batch, in which order, or on how many ranks. In fp32 on one thread of a CPU with AVX2 that holds bit for bit.
    Elsewhere rounding may depend on the batch, and a draw within rounding of two tokens may give either. Prompts with
    the same id get the same completions.

    Args:
        policy: gives the model and the prompts' embeddings.
        tokenizer: decodes completions and names the end-of-sequence token.
        seed: of the run.
        forbidden_tokens: ids that are never sampled, such as the placeholders of a multimodal prompt. Ids that the
            tokenizer does not have (spare rows of the head) never are.
        end_tokens: ids that end a completion, beside the end-of-sequence tokens of the tokenizer and the model's
            generation config: where prompts are written by a chat template, the token that ends its turns
            (`grpo_core.chat.turn_end`).
        memory_budget: bytes for caches and logits; None takes 80 % of the device's free memory (2 GiB on a CPU).

    Attributes:
        timings: of the last call: seconds of `refresh` (merging adapters), `embed`, `prefill`, `decode` and `text`, and
            the counts `prompt_tokens`, `completion_tokens`, `steps` and `slots` (groups decoded at a time).

    Raises:
        ModelRefused: the model would be sampled wrongly; see `grpo_core.verify`.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        forbidden_tokens: Collection[int] = (),
        end_tokens: Collection[int] = (),
        memory_budget: int | None = None,
    ):
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.forbidden_tokens, self.end_tokens = tuple(forbidden_tokens), tuple(end_tokens)
        self.memory_budget = memory_budget
        self.model = policy.causal_lm
        self.text_config = text_config(self.model.config)
        self.decoder: Decoder = make_decoder(self.model)
        verify_model(self.model)
        self.timings: dict[str, float] = {}
        # kept between calls: with stop strings, one is made by decoding the whole vocabulary
        self._stop_conditions: dict[tuple[str, ...], StopConditions] = {}

    def sample(
        self, prompts: Sequence[Prompt], rollout: RolloutConfig, *, step: int = 0, progress: bool = False
    ) -> list[Group]:
        """Sample one group per prompt, in the order of the prompts.

        Args:
            prompts: `[N]`.
            rollout: group size, lengths, temperature, truncation and stop strings.
            step: the optimiser step that the rollout belongs to; another step samples other completions.
            progress: show a bar.

        Raises:
            InputError: a prompt that is too long for the model.
            ValueError: the policy's embeddings do not fit the tokens.
            FloatingPointError: the policy's logits are not finite.
        """
        self.timings = dict.fromkeys(("refresh", "embed", "prefill", "decode", "text"), 0.0)
        self.timings |= dict.fromkeys(("prompt_tokens", "completion_tokens", "steps", "slots"), 0)
        if not prompts:
            return []
        strings = tuple(rollout.stop_strings)
        if strings not in self._stop_conditions:
            self._stop_conditions[strings] = StopConditions(self.model, self.tokenizer, strings, self.end_tokens)
        stop = self._stop_conditions[strings]
        # heads are padded, and ids have holes: rows that are no token of the tokenizer have no text
        head_rows = self.model.get_output_embeddings().weight.shape[0]
        forbidden = [token for token in self.forbidden_tokens if 0 <= token < head_rows]
        never_sampled = np.union1d(np.array(forbidden, dtype=np.int64), stop.no_tokens)
        params = SamplingParams(rollout, never_sampled, stop.end_tokens)
        # a random stream for every completion, so that nothing depends on when and beside what it is decoded
        prompt_keys = np.array([rng.prompt_key(prompt.id) for prompt in prompts], dtype=np.uint64)
        keys = rng.row_key(self.seed, step, prompt_keys[:, None], np.arange(rollout.group_size)).ravel()

        # no_grad, not inference_mode: a policy may cache what it embeds, and inference tensors cannot be in a backward
        with timed(self.timings, "embed"), torch.no_grad():
            embeds = self._embed(prompts, rollout.max_new_tokens)
        with torch.inference_mode(), tqdm(total=len(prompts), disable=not progress, desc="sample", leave=False) as bar:
            with timed(self.timings, "refresh"):
                self.decoder.refresh()
            budget = self.memory_budget
            if budget is None and self.policy.device.type == "cuda":
                # measured now, after the embeddings and fused weights have taken their memory: what the driver has
                # free, plus what torch's allocator holds unused, plus the last rollout's caches, which this one reuses
                # or frees; a fifth is left to activations and fragmentation
                device = self.policy.device
                unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                budget = int(0.8 * (torch.cuda.mem_get_info(device)[0] + unused + self.decoder.held_bytes))
            scheduler = Scheduler(self.decoder, embeds, keys, params, stop, self.timings, bar)
            scheduler.run(2 << 30 if budget is None else budget)  # on a CPU 2 GiB, whatever else runs there

        with timed(self.timings, "text"):
            completions = []
            for i, length in enumerate(scheduler.lengths):
                token_ids = scheduler.tokens[i, :length].tolist()
                # a copy, as a view would keep the whole rollout's array alive
                logprobs = scheduler.logprobs[i, :length].copy()
                reason: FinishReason = "stop" if scheduler.stopped[i] else "length"
                # a tag that the prompt ends with belongs to the answer, as rewards read it
                text = prompts[i // rollout.group_size].opened + stop.text(token_ids)
                completions.append(Completion(tuple(token_ids), logprobs, reason, text))
        self.timings["prompt_tokens"] = sum(map(len, embeds))
        self.timings["completion_tokens"] = int(scheduler.lengths.sum())
        size = rollout.group_size
        return [Group(prompt, completions[n * size : (n + 1) * size]) for n, prompt in enumerate(prompts)]

    def why_none_ends(self) -> str:
        """Say which tokens end a completion, for a warning where none did."""
        stop = StopConditions(self.model, self.tokenizer, (), self.end_tokens)
        never = {*self.forbidden_tokens, *stop.no_tokens.tolist()}
        head_rows = self.model.get_output_embeddings().weight.shape[0]
        ends = [i for i in np.flatnonzero(stop.end_tokens).tolist() if i < head_rows and i not in never]
        if not ends:
            return (
                "no token that can be drawn ends one: name an end-of-sequence token of the vocabulary in "
                "tokenizer_config.json (eos_token) or generation_config.json (eos_token_id)"
            )
        named = ", ".join(f"{self.tokenizer.decode([i])!r} ({i})" for i in ends)
        if getattr(self.tokenizer, "chat_template", None):
            turn = turn_end(cast(PreTrainedTokenizerBase, self.tokenizer))
            if turn is not None and turn not in ends:
                return (
                    f"completions end with {named}, but the chat template ends a turn with "
                    f"{self.tokenizer.decode([turn])!r} ({turn}): if the model learned that, give it as end_tokens of "
                    "GroupSampler"
                )
        return f"none ended with {named}: raise rollout.max_new_tokens, or start from a model that ends its answers"

    def _embed(self, prompts: Sequence[Prompt], new_tokens: int) -> list[Tensor]:
        """Embed prompts, `[P_n, H]` each, in the dtype and on the device of the model's own embeddings.

        Lengths are checked first: a prompt that is too long should not cost a rollout.

        Raises:
            InputError: the longest prompt and `new_tokens` are more than the model has positions for, or than it is
                right for (an attention window, a rotation that changes).
            ValueError: embeddings do not fit their prompt's tokens.
        """
        longest = max(len(prompt.token_ids) for prompt in prompts)
        total = longest + new_tokens
        limit = longest_sequence(self.model.config)
        if limit is not None and total > limit.tokens:
            raise InputError(
                f"the longest prompt has {longest} tokens and rollout.max_new_tokens is {new_tokens}: {total} is more "
                f"than config.{limit.key} {limit.tokens}; shorten the prompt or lower rollout.max_new_tokens"
            )
        embeds = list(self.policy.embed(prompts))
        if len(embeds) != len(prompts):
            raise ValueError(f"policy.embed gave {len(embeds)} tensors for {len(prompts)} prompts")
        for prompt, embed in zip(prompts, embeds, strict=True):
            if embed.ndim != 2 or len(embed) != len(prompt.token_ids):
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, but policy.embed gave "
                    f"{tuple(embed.shape)}: it must give one row per token"
                )
        table = cast(Tensor, self.model.get_input_embeddings().weight)
        return [embed.detach().to(table.device, table.dtype) for embed in embeds]


class Scheduler:
    """Samples G completions for each of N prompts by continuous batching.

    Groups enter the decoder as others leave; sequences leave it when they have ended.

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
            # a completion that starts again draws the same numbers, so it comes out as it would have. Groups that are
            # complete stay: what they hold is on the host
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
            poll()  # a signal may end a rollout between two blocks of decode steps
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
                # to drop sequences moves the cache entries of others into the holes, so it is not done for each: ended
                # sequences go once that makes steps cheaper, or once it frees a slot for a group that waits
                alive = ~self._ended[running]
                finished = int(self._ended_by_group.all(axis=1).sum())
                slot_wanted = len(waiting) > 0 and finished > self._groups_reported
                if slot_wanted or backend.worth_dropping(len(running), int(alive.sum())):
                    order = fill_holes(alive)
                    backend.keep(order)
                    running = running[order]
                self.bar.update(finished - self._groups_reported)
                self._groups_reported = finished

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


@contextmanager
def timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timings[phase]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] += time.perf_counter() - start
