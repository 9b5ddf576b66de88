"""Decoding of any causal LM by transformers' own forward, one group at a time over its cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo_core.rollout.sampling import DrawRules, LogitsDrawer


class TransformersDecoder:
    """`Decoder` for architectures that the flat one does not know. The prompt runs once; its cache is then expanded.

    Args:
        model: the causal LM without its outer PEFT wrapper.
    """

    held_bytes = 0

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.group_size = 0
        self.cache: DynamicCache | None = None
        self._in_training: list[nn.Module] = []

    def refresh(self) -> None:
        """The model's weights are read where they are."""

    def plan(self, groups: int, group_size: int, prompt_tokens: int, new_tokens: int, budget: int) -> int:
        return 1

    def reserve(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> None:
        self.group_size = group_size
        self._in_training = [module for module in self.model.modules() if module.training]
        self._set_training(False)  # without dropout

    def release(self, reuse: bool = False) -> None:
        self.cache = None
        self._set_training(True)

    def drawer(self, rules: DrawRules) -> LogitsDrawer:
        return LogitsDrawer(self, rules, self.model.device)

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        (embed,) = embeds
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(inputs_embeds=embed[None])
        self.cache.batch_repeat_interleave(self.group_size)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(input_ids=tokens[:, None])

    def keep(self, rows: np.ndarray) -> None:
        if len(rows):
            self.cache.batch_select_indices(torch.from_numpy(rows).to(self.model.device))

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Logits `[batch, V]` of the last position."""
        return self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _set_training(self, training: bool) -> None:
        for module in self._in_training:
            module.training = training
