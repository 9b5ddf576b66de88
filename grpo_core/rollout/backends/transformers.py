"""Decoding of any causal LM by transformers' own forward, one group at a time over its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo_core.config.options import RolloutConfig
from grpo_core.rollout.sampling import LogitsSampling, SamplingParams


class TransformersDecoder:
    """`Decoder` for families that are not registered. A prompt runs once; its cache is then repeated per member.

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
        """Do nothing: the model's weights are read where they are."""

    def plan(self, groups: int, prompt_tokens: int, rollout: RolloutConfig, budget: int) -> int:
        """Return 1: transformers' cache pads nothing, so it holds sequences of one prompt."""
        return 1

    def start_sampling(self, slots: int, prompt_tokens: int, params: SamplingParams) -> LogitsSampling:
        """Begin a rollout: turn dropout off until `release`."""
        self.group_size = params.rollout.group_size
        # noted one by one: a trainer may have set only a part of the model to training
        self._in_training = [module for module in self.model.modules() if module.training]
        for module in self._in_training:
            module.training = False
        return LogitsSampling(self, params, self.model.device)

    def release(self, reuse: bool = False) -> None:
        """Free the cache and set the modules that were in training to training again."""
        self.cache = None
        for module in self._in_training:
            module.training = True

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        """Add the one group, with a prompt `[P, H]`; return the logits `[1, V]` after it."""
        (embed,) = embeds
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(inputs_embeds=embed[None])
        self.cache.batch_repeat_interleave(self.group_size)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token `[B]` to every sequence; return the logits `[B, V]` after it."""
        return self._forward(input_ids=tokens[:, None])

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others."""
        # a cache cannot be empty; the next prefill replaces it
        if len(sequences) and self.cache is not None:
            self.cache.batch_select_indices(torch.from_numpy(sequences).to(self.model.device))

    def _forward(self, **inputs: Any) -> Tensor:
        """Compute the logits `[batch, V]` of the last position."""
        # logits_to_keep: a prompt's other positions would take [P, V] floats
        return self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
