"""What the sampler asks of a decoder, and which decoder serves which model."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedModel

from grpo_core.rollout.backends.torch import FlatDecoder
from grpo_core.rollout.backends.transformers import TransformersDecoder
from grpo_core.rollout.backends.triton import KernelDecoder
from grpo_core.rollout.sampling import Drawer, DrawRules


class Decoder(Protocol):
    """Holds the caches of groups that are decoded together.

    Attributes:
        held_bytes: of caches that it keeps between rollouts.
    """

    held_bytes: int

    def refresh(self) -> None:
        """Take over the model's present weights."""

    def plan(self, groups: int, group_size: int, prompt_tokens: int, new_tokens: int, budget: int) -> int:
        """How many of `groups` groups fit `budget` bytes together, at least 1; sizes are the longest ones."""

    def reserve(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Have empty caches for `slots` groups of `group_size` rows."""

    def drawer(self, rules: DrawRules) -> Drawer:
        """Begin a rollout over the reserved caches."""

    def release(self, reuse: bool = False) -> None:
        """Give the caches' memory back; with `reuse`, some may be kept for the next rollout."""


def make_decoder(model: PreTrainedModel) -> Decoder:
    """Kernels where they run, else flat weights in torch, for the families they know; transformers' forward for others.

    Raises:
        NotImplementedError: the model caps its attention scores, which neither training nor sampling does here.
    """
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(model.config, key, None) is not None:
            raise NotImplementedError(
                f"config.{key} is {getattr(model.config, key)}: models with capped logits cannot be sampled or "
                "trained; use one of the Qwen2, Qwen3, Llama or Mistral families"
            )
    for decoder in (KernelDecoder, FlatDecoder):
        if decoder.supports(model):
            return decoder(model)
    return TransformersDecoder(model)


def check_lengths(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse sequences that the model has no positions for, or that its attention window would cut.

    Raises:
        ValueError: names the config key, the longest prompt and what to change.
    """
    total = prompt_tokens + new_tokens
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(model.config, key, None)
        if limit is not None and total > limit:
            raise ValueError(
                f"the longest prompt has {prompt_tokens} tokens and rollout.max_new_tokens is {new_tokens}: {total} is "
                f"more than config.{key} {limit}; shorten the prompt or lower rollout.max_new_tokens"
            )
    window = getattr(model.config, "sliding_window", None)
    layers = getattr(model.config, "layer_types", None)
    if window is not None and total > window and (layers is None or "sliding_attention" in layers):
        raise ValueError(
            f"the longest prompt has {prompt_tokens} tokens and rollout.max_new_tokens is {new_tokens}: {total} is "
            f"more than config.sliding_window {window}, and group attention has no window; shorten the prompt, lower "
            "rollout.max_new_tokens, or set config.sliding_window to None"
        )
