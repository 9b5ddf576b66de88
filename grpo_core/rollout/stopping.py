"""When a completion ends: at an end token, or at a stop string in its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel


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


class StopConditions:
    """End tokens and stop strings of a rollout.

    Decoding every sequence's text at every step would cost more than the model. So a table of the vocabulary says which
    tokens can complete a stop string at all: those whose text holds the last character of one.

    Args:
        model: its generation config names end tokens.
        tokenizer: names one more, and decodes text.
        strings: stop strings.

    Attributes:
        end_tokens: bool `[V]`, the end tokens.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, strings: Sequence[str]):
        if "" in strings:
            raise ValueError("rollout.stop_strings holds an empty string, which would end every completion: remove it")
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # the largest of three sizes that may all differ: heads are padded, tokenizers are extended
        size = max(model.config.vocab_size, model.get_output_embeddings().weight.shape[0], len(tokenizer))
        self.end_tokens = np.zeros(size, dtype=bool)
        eos = getattr(model.generation_config, "eos_token_id", None)
        ends = {*(eos if isinstance(eos, list | tuple) else [eos]), tokenizer.eos_token_id}
        self.end_tokens[[token for token in ends if token is not None]] = True
        self._may_complete = np.zeros(size, dtype=bool)
        if strings:
            # U+FFFD: a token may be only some bytes of a character, whose text shows when the last of them has come
            last_characters = {string[-1] for string in strings} | {"\ufffd"}
            for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
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
        for i in np.flatnonzero(self._may_complete[tokens] & ~stopped) if self.strings else ():
            # the whole text, not the last token's: a stop string may span tokens
            token_ids = completions[completion_index[i], : lengths[completion_index[i]]].tolist()
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
            stopped[i] = any(string in text for string in self.strings)
        return stopped

    def text(self, token_ids: list[int]) -> str:
        """Decode a completion's text without special tokens, cut before the first stop string."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]
