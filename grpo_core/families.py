"""The tables of model families: where each keeps the layers that are fused for sampling; what of a config changes what
a model computes; and which models are refused.

The fused decoders (`grpo_core.rollout.backends`) know one computation, Llama's: RMS norm before attention and MLP,
rotary halves, keys and values shared by groups of query heads, a gated MLP. A family is a set of models that compute
this, with or without biases and head norms; its entry says under which attribute names. To add one, register an entry
before the sampler is made:

    register_family(Family("my_llama", layers="blocks", q="attention.wq", k="attention.wk", v="attention.wv"))

Models of other families are trained through transformers' own forward and sampled by it, one group at a time. Those
that are not known to be right (`is_known_right`) are compared with it first, by `grpo_core.verify`.
Imports neither torch nor transformers: a config is read by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_core.errors import InputError

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
        InputError: another entry has its `model_type`.
    """
    if _FAMILIES.setdefault(family.model_type, family) != family:
        raise InputError(
            f"model family {family.model_type!r} is registered with other attribute names: give your config class a "
            "model_type of its own"
        )


def family_names() -> str:
    """The names of all families as a list in text, for help and error messages."""
    return ", ".join(_FAMILIES)


def get_family(model_type: str) -> Family:
    """Look up a family by its config's `model_type`.

    Raises:
        InputError: there is no such entry; the message lists those that there are.
    """
    if model_type not in _FAMILIES:
        raise InputError(
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
    if family is None or head_transform(config) != PLAIN_HEAD:
        return False
    rope_types = {rope.get("rope_type", "default") for rope in _ropes(config)}
    if any(rope.get("partial_rotary_factor", 1) != 1 or "mrope_section" in rope for rope in _ropes(config)):
        return False  # the fused decoders rotate whole heads, by one position a token
    return rope_types <= {*family.rope_types} and (
        family.activations is None or config.hidden_act in family.activations
    )


# --- what of a config changes the function -----------------------------------------------------------------------

KNOWN_RIGHT = ("qwen2", "qwen3", "llama", "mistral")
"""Model types whose log-probs are compared with transformers' in our tests, with the fields that `_FREE` names."""

MOST_COMPARED = 8192
"""The longest sequence, in tokens, that `grpo_core.verify` compares: its attention stores all scores of one."""

_FREE = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "name_or_path"),
        *("_name_or_path", "id2label", "label2id", "return_dict", "output_hidden_states", "use_cache"),
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
        *("hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "tie_word_embeddings", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "use_sliding_window", "max_window_layers"),
        "quantization_config",  # its layers are called, or read by their outputs
    )
)
"""Config keys that change sizes and names, or that Policy, sampler and fused decoders read themselves."""

_ROPES = (*STATIC_ROPES, "proportional", "dynamic", "longrope")  # all that transformers has

_ROPE_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"),
        *("high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    )
)


def is_known_right(config: Any) -> bool:
    """Whether models of this config are known to be trained and sampled right: by their type and all its fields.

    A field that differs from the type's default and is not known counts against it: comparing such a model with its own
    forward costs seconds, and not to compare it may cost a run.

    Args:
        config: a transformers `PretrainedConfig`.
    """
    if getattr(config, "model_type", None) not in KNOWN_RIGHT:
        return False
    ropes = _ropes(config)
    allowed = {
        "rope_parameters": all(
            rope.get("rope_type", "default") in STATIC_ROPES and rope.keys() <= _ROPE_KEYS for rope in ropes
        ),
        # windows are a limit on the sequences' length, see length_limit
        "layer_types": {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"},
    }
    return all(allowed.get(key, key in _FREE) for key in config.to_diff_dict())


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The config's rotary parameters: none, one set, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


class HeadTransform(NamedTuple):
    """What a model does to the product of hidden states and head before the softmax.

    `softcap · tanh(scale · hidden · weightᵀ / softcap)`, or without the cap where it is None.
    """

    scale: float
    softcap: float | None


PLAIN_HEAD = HeadTransform(1.0, None)

# One name is multiplied by one type and divided by another, so the table is by type. A type that is missing here and
# scales all the same is found by the comparison.
_SCALES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), lambda config: config.logit_scale),
    **dict.fromkeys(
        ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa", "granitemoe_swa", "minicpm3"),
        lambda config: 1 / config.logits_scaling,
    ),
    "hyperclovax": lambda config: config.logits_scaling,
}


def head_transform(config: Any) -> HeadTransform:
    """Read from a config how its model scales and caps its logits."""
    text = text_config(config)
    scale = _SCALES.get(text.model_type)
    return HeadTransform(1.0 if scale is None else scale(text), getattr(text, "final_logit_softcapping", None))


class Threshold(NamedTuple):
    """A number of tokens at which a model's function may change."""

    key: str
    """Where the config has it, such as `config.sliding_window`."""
    tokens: int


def length_limit(config: Any) -> Threshold | None:
    """Find the longest sequence for which a model is right; None if nothing but its positions limits it.

    Beyond it, a window would hide keys that group attention sees, or the rotation of all tokens would change with the
    longest sequence beside them.
    """
    limits = [*_limits(config)]
    if not is_known_right(config):
        limits += [threshold for threshold in _others(config) if threshold.tokens > MOST_COMPARED]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def thresholds(config: Any) -> list[Threshold]:
    """List the thresholds of a config that `grpo_core.verify` has to compare on both sides, shortest first."""
    limit = length_limit(config)
    within = [t for t in _others(config) if t.tokens <= MOST_COMPARED and (limit is None or t.tokens < limit.tokens)]
    return sorted(within, key=lambda threshold: threshold.tokens)


def _limits(config: Any) -> list[Threshold]:
    text = text_config(config)
    kinds = getattr(text, "layer_types", None)
    found = []
    for key, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        # Qwen2 configs name a window that no layer uses; a config without layer_types means it for all layers
        tokens = getattr(text, key, None)
        if tokens is not None and (kinds is None or kind in kinds):
            found.append(Threshold(f"config.{key}", tokens))
    for rope in _ropes(text):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            key = "original_max_position_embeddings"
            lengths = (rope.get(key), getattr(text, key, None), text.max_position_embeddings)
            found.append(Threshold(f"config.{key} ({rope['rope_type']} rotations)", min(filter(None, lengths))))
    return found


def _others(config: Any) -> list[Threshold]:
    """Numbers in a config whose names suggest that they are lengths, and that are neither a limit nor the positions."""
    text = text_config(config)
    known = {limit.key for limit in _limits(config)}
    # rotations of a name that transformers does not have: they may change there, as longrope does
    original = "original_max_position_embeddings"
    unknown = [rope for rope in _ropes(text) if rope.get("rope_type", "default") not in _ROPES and original in rope]
    names = ("window_size", "window", "chunk_size", "block_size", "index_topk", "local_attention", "attn_chunk_length")
    found = [Threshold(f"config.rope_parameters.{original}", rope[original]) for rope in unknown]
    return found + [
        Threshold(f"config.{key}", value)
        for key, value in (text.to_dict() if hasattr(text, "to_dict") else vars(text)).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value > 1
        and key.endswith(names)
        and f"config.{key}" not in known
        and key != "sliding_window"  # no layer uses it, or it would be a limit
    ]


def text_config(config: Any) -> Any:
    """The language model's part of a composite config (LLaVA's, Gemma 3's); any other config as it is."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# --- refusals ----------------------------------------------------------------------------------------------------

STATEFUL_LAYERS = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"})
"""Values of `config.layer_types` whose layers pass a state from token to token, beside attention."""

SPLICED_MEDIA = ("llava",)
"""Types of composite models that do nothing with an image but put its embeddings in place of tokens, at consecutive
positions under a causal mask, as `Policy(embed=…)` does; each is compared with its own forward in our tests."""


class ModelRefused(NotImplementedError):
    """A model cannot be trained or sampled: one sentence with its type, its folder, the reason, and what can be used.

    Args:
        config: the model's.
        reason: why, as the rest of the sentence.
    """

    def __init__(self, config: Any, reason: str):
        self.reason = reason
        folder = getattr(config, "_name_or_path", "")
        name = f"model type {config.model_type!r}" + (f" ({folder})" if folder else "")
        super().__init__(
            f"{name} cannot be trained or sampled: {reason}; use one of: {family_names()}; or another that "
            "docs/models.md lists"
        )


def check_model(config: Any, media: bool = False) -> None:
    """Refuse models that packed groups or the fused log-probs are known to be wrong for.

    Args:
        config: a transformers `PretrainedConfig`.
        media: prompts have rows that are not token embeddings (`Policy(embed=…)`).

    Raises:
        ModelRefused: names the type, the folder, the reason, and the families to use.
    """
    text = text_config(config)
    stateful = STATEFUL_LAYERS.intersection(getattr(text, "layer_types", None) or ())
    if stateful:
        raise ModelRefused(
            config,
            f"its layers of kind {', '.join(sorted(stateful))} carry a recurrent or convolutional state along the "
            "sequence, which would leak from one packed sequence into the next",
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ModelRefused(
            config,
            f"config.attn_logit_softcapping is {text.attn_logit_softcapping}, and group attention has no soft cap",
        )
    scale, softcap = head_transform(config)
    if softcap is not None and scale != 1:
        raise ModelRefused(config, f"it both scales its logits (by {scale}) and caps them (at {softcap})")
    if not media:
        return
    for rope in _ropes(text):
        if "mrope_section" in rope:
            raise ModelRefused(
                config,
                "config.rope_parameters has mrope_section, so an image's tokens have positions of three dimensions, "
                "which prompts with features do not carry",
            )
    if text is not config and config.model_type not in SPLICED_MEDIA:
        raise ModelRefused(
            config,
            "prompts have features, and of models with an image or audio part only "
            f"{', '.join(SPLICED_MEDIA)} are known to read them as plain embeddings",
        )
