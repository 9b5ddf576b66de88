"""Token sampling during decoding: which tokens may come, how one is drawn from logits, and when a completion ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core import rng
from grpo_core.config.options import RolloutConfig
from grpo_core.errors import InputError

PendingTokens = Callable[[], tuple[np.ndarray, np.ndarray]]
"""The result of some steps. Call it to wait for them: int64 tokens and float32 log-probs, `[steps, B]` each."""


@dataclass(frozen=True)
class SamplingParams:
    """What tokens may be sampled, and how.

    Attributes:
        rollout: temperature, truncation, repetition penalty, group size and longest completion.
        never_sampled: int64, sorted ids below the LM head's rows that are never sampled.
        end_tokens: bool, at least as long as the LM head: tokens that end a sequence.
    """

    rollout: RolloutConfig
    never_sampled: np.ndarray
    end_tokens: np.ndarray


class Tokenizer(Protocol):
    """What sampling needs of a tokenizer; transformers' have it."""

    @property
    def eos_token_id(self) -> Any: ...

    def __len__(self) -> int:
        """The number of token ids, special and added ones included."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> Any:
        """Turn token ids into a string."""

    def batch_decode(self, sequences: list[list[int]], /) -> Any:
        """Turn lists of token ids into a list of strings; needed for stop strings alone."""


def known_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer has, sorted. They may have holes, and end above the number of tokens.

    A tokenizer without `get_vocab` has the ids from 0 to its length.
    """
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return list(range(len(tokenizer))) if vocabulary is None else sorted(set(vocabulary().values()))


# <think>, </answer>, [THINK]: what a reward or a stop string may look for, unlike <|im_end|>
_TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]*)>|\[(/?)([A-Z][A-Z_]*)\]")
_REASONING = re.compile("think|thought|reason|answer", re.IGNORECASE)


def is_tag(token: str, vocabulary: Collection[str]) -> bool:
    """Whether a special token is a tag around a part of an answer: one with a partner, or one of reasoning."""
    found = _TAG.fullmatch(token)
    if found is None:
        return False
    slash, name = found[1] or found[3] or "", found[2] or found[4]
    partner = token.replace("/", "", 1) if slash else f"{token[0]}/{token[1:]}"
    return partner in vocabulary or bool(_REASONING.search(name))


class StopConditions:
    """End tokens and stop strings of a rollout.

    Decoding every sequence's text at every step would cost more than the model. So a table of the vocabulary says which
    tokens can complete a stop string at all: those whose text holds the last character of one.

    A completion's text is without special tokens, but for tags (`<think>`, which a tokenizer may hold as a special
    token) and those that stop strings are made of: rewards and stop strings look for these.

    Args:
        model: its generation config names end tokens.
        tokenizer: names one more, and decodes text.
        strings: stop strings.
        end_tokens: more ids that end a completion.

    Attributes:
        end_tokens: bool `[V]`, the end tokens.
        no_tokens: int64, sorted, rows of the LM head that are no token of the tokenizer.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, strings: Sequence[str], end_tokens: Collection[int] = ()
    ):
        if "" in strings:
            raise InputError("rollout.stop_strings holds an empty string, which would end every completion: remove it")
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        eos = getattr(model.generation_config, "eos_token_id", None)
        named = {*(eos if isinstance(eos, list | tuple) else [eos]), tokenizer.eos_token_id, *end_tokens}
        ends = sorted(token for token in named if token is not None)
        ids = known_token_ids(tokenizer)
        head_rows = model.get_output_embeddings().weight.shape[0]
        vocabulary = model.config.get_text_config().vocab_size  # of a composite config, the language model's
        # the largest of sizes that may all differ: heads are padded, tokenizers are extended, and their ids have holes
        size = max(vocabulary, head_rows, *(ids[-1:] or [0]), *(ends[-1:] or [0])) + 1
        self.no_tokens = np.setdiff1d(np.arange(head_rows), np.array(ids, dtype=np.int64))
        self.end_tokens = np.zeros(size, dtype=bool)
        self.end_tokens[ends] = True
        self._decode = _make_decode(tokenizer, strings, ends)
        self._may_complete = np.zeros(size, dtype=bool)
        if strings:
            # U+FFFD: a token may be only some bytes of a character, whose text shows when the last of them has come
            last_characters = {string[-1] for string in strings} | {"\ufffd"}
            for token, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True):
                self._may_complete[token] = not text or not last_characters.isdisjoint(text)

    def check(
        self, tokens: np.ndarray, completions: np.ndarray, completion_index: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Tell which of B sequences end with the token that they have just got.

        Args:
            tokens: `[B]`, the new tokens, which are already in `completions`.
            completions: `[M, max_new_tokens]` token ids.
            completion_index: `[B]`, which of the M completions each sequence is.
            lengths: `[M]` tokens of each completion.

        Returns:
            bool `[B]`.
        """
        stopped = self.end_tokens[tokens]
        # few sequences have such a token, so few texts are decoded
        for i in np.flatnonzero(self._may_complete[tokens] & ~stopped) if self.strings else ():
            # the whole text, not the last token's: a stop string may span tokens
            token_ids = completions[completion_index[i], : lengths[completion_index[i]]].tolist()
            text = self._decode(token_ids)
            stopped[i] = any(string in text for string in self.strings)
        return stopped

    def text(self, token_ids: list[int]) -> str:
        """Decode a completion's text, without special tokens but for tags, cut before the first stop string."""
        text = self._decode(token_ids)
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]


def _make_decode(tokenizer: Tokenizer, strings: Sequence[str], ends: Collection[int]) -> Callable[[list[int]], str]:
    """Make the function that decodes a completion, for `StopConditions`."""
    special = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    named = {value for value in getattr(tokenizer, "special_tokens_map", {}).values() if isinstance(value, str)}
    kept = {
        i
        for i, text in special.items()
        # <s> and <unk> look like tags: what the tokenizer gives a role is none, and neither is an end token
        if (i not in ends and text not in named and is_tag(text, set(special.values())))
        or any(text in string for string in strings)
    }
    if not kept:
        return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=True))
    dropped = special.keys() - kept
    return lambda token_ids: str(tokenizer.decode([i for i in token_ids if i not in dropped]))


class SamplingBackend(Protocol):
    """Samples the tokens of B sequences, which are numbered in the order in which their groups were added.

    Attributes:
        steps_per_read: the number of steps to decode at a time.
        max_pending: how many `PendingTokens` may be open: with one, the device decodes while the host handles the
            tokens before.
    """

    @property
    def steps_per_read(self) -> int: ...

    @property
    def max_pending(self) -> int: ...

    def prefill(self, embeds: Sequence[Tensor], keys: np.ndarray) -> PendingTokens:
        """Add groups with prompts `[P_n, H]` and sample the first token of their new sequences.

        `keys` are the new sequences' random keys, uint64, group after group.
        """

    def decode(self, steps: int) -> PendingTokens:
        """Sample `steps` tokens for every sequence. Sequences that have ended may get any."""

    def worth_dropping(self, sequences: int, unfinished: int) -> bool:
        """Whether steps of the `unfinished` sequences alone are so much cheaper that the others should be dropped."""

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""


class LogitsDecoder(Protocol):
    """A decoder that returns logits."""

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        """Add N groups with prompts `[P_n, H]`; return the logits `[N, V]` after each prompt."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token `[B]` to every sequence; return the logits `[B, V]` after it."""

    def keep(self, sequences: np.ndarray) -> None:
        """As in `SamplingBackend`."""


class LogitsSampling:
    """`SamplingBackend` on top of logits, with one random number per token from the host.

    Args:
        decoder: gives the logits.
        params: what tokens may be sampled, and how.
        device: where the logits are.
    """

    max_pending = 0

    def __init__(self, decoder: LogitsDecoder, params: SamplingParams, device: torch.device):
        self.decoder, self.params, self.device = decoder, params, device
        # on a CPU a read waits for nothing, and an ended sequence is dropped at once; a GPU would stall at every read
        self.steps_per_read = 1 if device.type == "cpu" else 8
        self._never_sampled = torch.from_numpy(params.never_sampled).to(device)
        # by sequence: its random key, the tokens it has sampled, the last of them
        self._keys = np.zeros(0, dtype=np.uint64)
        self._count = np.zeros(0, dtype=np.int64)
        self._last = torch.zeros(0, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None  # bool [B, V], tokens of each completion so far; for the repetition penalty

    def prefill(self, embeds: Sequence[Tensor], keys: np.ndarray) -> PendingTokens:
        """Add groups with prompts `[P_n, H]` and sample the first token of their new sequences."""
        # all members of a group sample their first token from one row of logits
        logits = self.decoder.prefill(embeds).repeat_interleave(self.params.rollout.group_size, dim=0)
        seen = None
        if self.params.rollout.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
        # float32 before the copy to a device: the running sums that the numbers are compared with have no more bits
        uniforms = torch.from_numpy(rng.row_uniform(keys, 0).astype(np.float32)).to(self.device)
        tokens, logprobs = sample_tokens(logits, uniforms, self.params.rollout, self._never_sampled, seen)
        # new sequences come last, in every array here as in the decoder
        self._keys = np.r_[self._keys, keys]
        self._count = np.r_[self._count, np.ones(len(keys), dtype=np.int64)]
        self._last = torch.cat((self._last, tokens))
        if seen is not None:
            self._seen = seen if self._seen is None else torch.cat((self._seen, seen))
        # read when it is called for, not here: on a GPU the copy waits for all steps before it
        return lambda: (tokens[None].cpu().numpy(), logprobs[None].cpu().numpy())

    def decode(self, steps: int) -> PendingTokens:
        """Sample `steps` tokens for every sequence."""
        # the numbers of all steps at once: Philox is some hundred NumPy calls, whatever it is asked for
        numbers = rng.row_uniform(self._keys[:, None], self._count[:, None] + np.arange(steps)).astype(np.float32)
        tokens, logprobs = [], []
        for uniforms in torch.from_numpy(numbers).to(self.device).unbind(1):
            logits = self.decoder.step(self._last)
            self._last, logprob = sample_tokens(logits, uniforms, self.params.rollout, self._never_sampled, self._seen)
            tokens.append(self._last)
            logprobs.append(logprob)
        self._count = self._count + steps
        step_tokens, step_logprobs = torch.stack(tokens), torch.stack(logprobs)
        return lambda: (step_tokens.cpu().numpy(), step_logprobs.cpu().numpy())

    def worth_dropping(self, sequences: int, unfinished: int) -> bool:
        """Whether at least a sixteenth of the sequences have ended: to drop them moves the others' cache entries."""
        return (sequences - unfinished) * 16 >= sequences

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others."""
        self.decoder.keep(sequences)
        self._keys, self._count = self._keys[sequences], self._count[sequences]
        index = torch.from_numpy(sequences).to(self.device)
        self._last = self._last[index]
        self._seen = None if self._seen is None else self._seen[index]


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    rollout: RolloutConfig,
    never_sampled: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token for each of B sequences by inverse CDF, or take the most probable one at temperature 0.

    The options apply in transformers' order: repetition penalty, temperature, top-k, top-p (of what top-k kept), min-p.

    Args:
        logits: `[B, V]`.
        uniforms: `[B]` in (0, 1); temperature 0 reads none.
        rollout: temperature, truncation and penalty.
        never_sampled: int64, ids that are never sampled.
        seen: bool `[B, V]`, tokens that the repetition penalty applies to; the sampled ones are added.

    Returns:
        int64 `[B]` tokens; float32 `[B]` their log-probabilities under softmax(logits / temperature) over the whole
        vocabulary, before penalty, truncation and forbidden tokens (temperature 1 when greedy).
    """
    logits = logits.float()  # half precision has too few bits for sums over a vocabulary
    if rollout.temperature not in (0.0, 1.0):
        logits = logits / rollout.temperature
    scores = logits  # what is drawn from; `logits` stay as they are for the log-probs
    if seen is not None:
        penalty = rollout.repetition_penalty
        scores = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if rollout.temperature == 0:
        if never_sampled is not None:
            scores = scores.index_fill(1, never_sampled, -torch.inf)
        tokens = scores.argmax(dim=-1)
    else:
        # probabilities first, truncation by writing zeros into them: the inverse CDF needs no other normalisation
        probabilities = torch.softmax(scores, dim=-1)
        # softmax on a CPU adds a row in one running float32 sum, which is off by up to 1e-5 of itself at V = 150,000;
        # torch.sum adds in pairs, so the sum of the quotients says by how much they are off
        totals = probabilities.sum(dim=-1, keepdim=True)
        if never_sampled is not None:
            probabilities.index_fill_(1, never_sampled, 0.0)
        weights = probabilities
        if rollout.top_k and rollout.top_k < weights.shape[1]:
            # tokens that tie with the last one stay too, as in transformers
            least = weights.topk(rollout.top_k, dim=-1).values[:, -1:]
            weights = weights.masked_fill(weights < least, 0.0)
        if rollout.top_p < 1:
            ordered, order = weights.sort(dim=-1, descending=True, stable=True)
            sums = ordered.cumsum(dim=-1)
            # a token is dropped if those before it reach top_p, so that the first one always stays
            beyond = sums - ordered >= rollout.top_p * sums[:, -1:]
            weights = torch.zeros_like(weights).scatter_(1, order, ordered.masked_fill_(beyond, 0.0))
        if rollout.min_p > 0:
            weights = weights.masked_fill(weights < rollout.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
        tokens = _inverse_cdf(weights, uniforms)
        if seen is None:
            # saves a second pass over [B, V]: a token that was sampled has a probability above 0, so its log is finite;
            # float64 for B numbers: the quotient would be rounded once more before its log is
            shares = probabilities.gather(1, tokens[:, None]).double() / totals
            return tokens, shares[:, 0].log_().float()
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    # not log_softmax, whose sum is as softmax's; a row's largest logit is finite, unless the policy's weights are not
    largest = logits.amax(dim=-1, keepdim=True)
    others = (logits - largest).exp_().sum(dim=-1, keepdim=True).double().log_()
    return tokens, ((logits.gather(1, tokens[:, None]) - largest).double() - others)[:, 0].float()


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Find the first index at which the running sum of weights `[B, V]` passes the share `uniforms` `[B]` of the total.

    First the block of 64 tokens, then the token in it: running sums over the whole row cost more than the softmax.
    """
    vocabulary, block_size = weights.shape[1], 64
    if vocabulary % block_size:
        weights = F.pad(weights, (0, -vocabulary % block_size))
    blocks = weights.unflatten(1, (-1, block_size))
    sums = blocks.sum(dim=-1).cumsum(dim=-1)
    # rounding may put an aim on its last sum, above which there is no token: hold it below by one unit, 2⁻²³ of it
    almost_one = 1 - torch.finfo(torch.float32).eps
    aim = torch.minimum(uniforms[:, None].to(sums.dtype) * sums[:, -1:], sums[:, -1:] * almost_one)
    # clamp: for a row of NaN, which the scheduler finds by its log-prob, no sum is above the aim
    block = torch.searchsorted(sums, aim, right=True).clamp_(max=sums.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, block_size))[:, 0].cumsum(dim=-1)
    # counted from the block's end: from its start, the first block would be a special case
    before_end = sums.gather(1, block) - aim
    aim = torch.minimum((inside[:, -1:] - before_end).clamp_(min=0), inside[:, -1:] * almost_one)
    token = block * block_size + torch.searchsorted(inside, aim, right=True)
    return token[:, 0].clamp_(max=vocabulary - 1)
