"""The table of model families: where each keeps the layers that are fused for sampling; and which models are refused.

The fused decoders (`grpo_core.rollout.backends`) know one computation, Llama's: RMS norm before attention and MLP,
rotary halves, keys and values shared by groups of query heads, a gated MLP. A family is a set of models that compute
this, with or without biases and head norms; its entry says under which attribute names. To add one, register an entry
before the sampler is made:

    register_family(Family("my_llama", layers="blocks", q="attention.wq", k="attention.wk", v="attention.wv"))

Models of other families are trained through transformers' own forward and sampled by it, one group at a time.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary types whose angles depend on the position alone. `dynamic` and `longrope` also look at the longest sequence in
the batch, so a table of them made once would be wrong for shorter ones."""


@dataclass(frozen=True)
class Family:
    """Attribute names of one `model_type`; dotted paths, by default Llama's.

    Sizes are read from the config under transformers' standard names (`num_attention_heads`, `rms_norm_eps`, …), which
    a config class of other names maps by its `attribute_map`.
    """

    model_type: str
    """The config's `model_type`, the entry's name."""

    layers: str = "layers"
    """The decoder layers; this and the next two are attributes of the LM's `base_model`."""
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    """The module that turns positions into cosines and sines."""

    input_norm: str = "input_layernorm"
    """The norm before attention; this and all that follow are attributes of a decoder layer."""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    """The RMS norm over each query head, before its rotation. None: the family has none."""
    k_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    rope_types: tuple[str, ...] = STATIC_ROPES
    """Values of `config.rope_parameters["rope_type"]` for which the fused decoders are right."""
    activations: tuple[str, ...] | None = None
    """Likewise of `config.hidden_act`. None: any that transformers names. (On a GPU, silu alone is fused.)"""


_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2"),
        Family("qwen3", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
        Family("llama"),
        Family("mistral"),
    )
}


def register_family(family: Family) -> None:
    """Add a family to the table.

    Raises:
        ValueError: another entry has its `model_type`.
    """
    if _FAMILIES.setdefault(family.model_type, family) != family:
        raise ValueError(
            f"model family {family.model_type!r} is registered with other attribute names: give your config class a "
            "model_type of its own"
        )


def family_names() -> str:
    """The names of all families as a list in text, for help and error messages."""
    return ", ".join(_FAMILIES)


def get_family(model_type: str) -> Family:
    """Look up a family by its config's `model_type`.

    Raises:
        ValueError: there is no such entry; the message lists those that there are.
    """
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model family {model_type!r} is not known: use one of: {family_names()}; or add it with "
            "grpo_core.families.register_family"
        )
    return _FAMILIES[model_type]


def can_fuse(config: Any) -> bool:
    """Whether the fused decoders are right for models of this config; if not, transformers' own forward samples them.

    Args:
        config: a transformers `PretrainedConfig`.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        return False
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return rope_type in family.rope_types and (family.activations is None or config.hidden_act in family.activations)


def check_model(config: Any) -> None:
    """Refuse models whose logits or attention scores are more than products of hidden states and weights.

    Raises:
        NotImplementedError: names the config key, its value, and the families to use.
    """
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None) is not None:
            raise NotImplementedError(
                f"config.{key} is {getattr(config, key)}: models with capped logits cannot be sampled or trained; "
                f"use one of: {family_names()}"
            )
    # Cohere multiplies its logits by the first, Granite divides them by the second; the fused log-probs and samplers
    # read the head's weight as it is, so they would train and sample at another temperature
    for key in ("logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1):
            raise NotImplementedError(
                f"config.{key} is {getattr(config, key)}: models with scaled logits cannot be sampled or trained; "
                f"use one of: {family_names()}"
            )
