"""Decoders: fused weights in plain torch (`torch`) or by kernels (`triton`), and any causal LM (`transformers`)."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.config.options import RolloutConfig
from grpo_core.families import can_fuse, check_model
from grpo_core.rollout.backends.torch import TorchDecoder
from grpo_core.rollout.backends.transformers import TransformersDecoder
from grpo_core.rollout.sampling import SamplingBackend, SamplingParams
from grpo_kernels import choose_backend


class Decoder(Protocol):
    """A model with caches for the groups that it decodes together.

    Attributes:
        held_bytes: bytes of caches that are kept between rollouts.
    """

    @property
    def held_bytes(self) -> int: ...

    def refresh(self) -> None:
        """Copy the model's present weights."""

    def plan(self, groups: int, prompt_tokens: int, rollout: RolloutConfig, budget: int) -> int:
        """Return how many of `groups` groups fit `budget` bytes at a time, at least 1.

        `prompt_tokens` is the longest prompt's length; group size and longest completion are the rollout's.
        """

    def start_sampling(self, slots: int, prompt_tokens: int, params: SamplingParams) -> SamplingBackend:
        """Allocate (or clear) caches for `slots` groups, and begin a rollout over them."""

    def release(self, reuse: bool = False) -> None:
        """Free the caches; with `reuse`, a decoder may keep them for the next rollout."""


def make_decoder(model: PreTrainedModel) -> Decoder:
    """Choose the decoder for a model: Triton kernels where they run, else torch; transformers for unknown families.

    Raises:
        ModelRefused: the model would be sampled wrongly; see `check_model`.
    """
    check_model(model.config)
    if not can_fuse(model.config):
        return TransformersDecoder(model)
    # the embedding has the hidden states' dtype even where linear layers are quantised; choose_backend also says
    # "triton" under Triton's interpreter, by which the GPU's code is tested on a CPU
    weight = cast(Tensor, model.get_input_embeddings().weight)
    if model.config.hidden_act == "silu" and choose_backend(weight.device, None, weight.dtype) == "triton":
        from grpo_core.rollout.backends.triton import TritonDecoder  # not imported where Triton is not used

        return TritonDecoder(model)
    return TorchDecoder(model)
