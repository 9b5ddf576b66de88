"""When a completion ends: an end token, or a stop string in its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel


class StopConditions:
    """End tokens and stop strings of a rollout.

    Decoding every row's text at every step would cost more than the model, so a table of the vocabulary tells which
    tokens can complete a stop string at all: those whose text holds the last character of one.

    Args:
        model: its generation config names end tokens.
        tokenizer: names one more, and decodes text.
        strings: stop strings; an empty one is an error.

    Attributes:
        end: bool `[V]`, the end tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, strings: Sequence[str]):
        if "" in strings:
            raise ValueError("rollout.stop_strings holds an empty string, which would end every completion: remove it")
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        size = max(model.config.vocab_size, model.get_output_embeddings().weight.shape[0], len(tokenizer))
        self.end = np.zeros(size, dtype=bool)
        of_model = getattr(model.generation_config, "eos_token_id", None)
        of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
        self.end[[token for token in {*of_model, tokenizer.eos_token_id} if token is not None]] = True
        self._may_complete = np.zeros(size, dtype=bool)
        if strings:
            lasts = {string[-1] for string in strings} | {
                "\ufffd"
            }  # part of a character: the text shows only when whole
            for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
                self._may_complete[token] = not text or not lasts.isdisjoint(text)

    def check(self, tokens: np.ndarray, completions: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which of B rows end with the token they have just got.

        Args:
            tokens: `[B]` the new tokens, which are already in `completions`.
            completions: `[M, max_new_tokens]` token ids.
            rows: `[B]` into M.
            lengths: `[M]` tokens of each completion.

        Returns:
            bool `[B]`.
        """
        stopped = self.end[tokens]
        for i in np.flatnonzero(self._may_complete[tokens] & ~stopped) if self.strings else ():
            text = self._decode(completions[rows[i], : lengths[rows[i]]].tolist())
            stopped[i] = any(string in text for string in self.strings)
        return stopped

    def text(self, token_ids: Sequence[int]) -> str:
        """A completion's text without special tokens, cut before the first stop string."""
        text = self._decode(token_ids)
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
