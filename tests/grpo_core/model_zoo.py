"""Tiny random models of every type that transformers has as a causal LM, and the page about them, docs/models.md.

To compare all and write the page, in a minute: `python -m tests.grpo_core.model_zoo`; or some: `… phi3 opt`.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_core import families
from grpo_core.verify import TOLERANCE, Comparison, compare, verify_model

WINDOWED = ("sliding_attention", "full_attention")
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 32, 4, 97
# transformers' names of a size, and what it is here: a config takes those that it has
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48
    ),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "expert_dim"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_tokens"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_selected_experts"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    "rotary_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "index_topk": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "n_mamba_heads": 4,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": WIDTH,
    "first_k_dense_replace": 1,
    "global_head_dim": 8,
    "sliding_window": 40,
    "num_global_key_value_heads": 2,
}
# where sizes of one type do not go together
MEDIA_TOKENS = {"image_token_id": 90, "video_token_id": 91, "audio_token_id": 92}
MLA = {"num_key_value_heads": HEADS}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), MLA),
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WINDOWED}
    },
    "cwm": {"bos_token_id": 2},
    "modernbert-decoder": {"bos_token_id": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {
        "layer_types": [*WINDOWED, *WINDOWED],
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "deepseek_v2": MLA | {"num_experts_per_tok": 2},
    "gemma4": MEDIA_TOKENS,
    "gemma4_unified": MEDIA_TOKENS,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}
DOZEN = (
    *("qwen2_moe", "qwen3_moe", "gemma", "gemma3_text", "phi3", "granite", "cohere2", "olmo2", "smollm3", "mixtral"),
    *("deepseek_v3", "minicpm3", "gpt2", "opt"),
)
"""Types in common use, beside those that are known to be right, whose rows every run of the tests holds."""

PAGE = Path(__file__).parents[2] / "docs/models.md"
PAGE_TEXT = """# Models

Which causal LMs can be trained and sampled, which are refused, and how that is found out.

<!-- written by: python -m tests.grpo_core.model_zoo -->

The engine packs prompts and completions on one axis and lets completions share a prompt's cache. A model must compute
there what its own forward computes for one sequence alone. These are known to do so, with the config fields that
`grpo_core/families.py` lists, and are sampled by a fused decoder: {known}.

A model of any other type, or with a field that is not listed, is compared before it is trained or sampled.
`verify_model` in `grpo_core/verify.py` draws completions of random prompts and computes their log-probs three times, in
float32: in the draw, packed, and by the model's own forward. If the median difference of any group of tokens is above
{tolerance} nats, the run stops with a sentence that has type, folder and figure. This takes seconds: a model too large
to be copied whole is compared on its first layers, up to where one of each kind has come.

Lengths lie on both sides of every length that the config names, up to 8,192 tokens. Beyond a longer one, sequences are
refused, as they are beyond a sliding window and beyond the length at which rotations change for all tokens beside
(`dynamic`, `longrope`).

To compare a model yourself:

<!-- needs: models -->
```python
from transformers import AutoModelForCausalLM

from grpo_core import verify_model

print(verify_model(AutoModelForCausalLM.from_pretrained("path/to/model")))
```

What follows was found with tiny random models of every type in transformers {version}, with the type's default options.

## Right

<!-- right -->
{right}
<!-- end -->

Of these, every run of the tests compares, beside the four above:

{dozen}

Text prompts alone are meant. Prompts with images through `Policy(embed=…)` are right for `llava`, whose forward puts
image features in place of tokens and does nothing else; other models with an image or audio part are refused with them,
Qwen2.5-VL and Qwen3-VL because an image's tokens have positions of three dimensions there.

## Refused

<!-- refused -->
| because | types |
|---|---|
{refused}
<!-- end -->

Gemma 2 with a cap on its final logits alone (`attn_logit_softcapping: null`) is right, and so is a model of a hybrid
type whose layers are all attention (Granite 4 without Mamba).

## Not tried

No small model of these could be made here; they are compared like any other when they are used.

<!-- not built -->
{not_built}
<!-- end -->
"""

PLAIN_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Make a small config of a type: its defaults, but for sizes."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    values = _small_values(default) | PLAIN_TOKENS | SPECIAL.get(model_type, {}) | overrides
    return config_class(**values)


def _small_values(default: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    names = default.to_dict()
    for key, small in SMALL.items():
        unset = key in names and names[key] is None and key in ("num_key_value_heads", "head_dim")
        if unset or (isinstance(names.get(key), int) and not isinstance(names[key], bool)):
            values[default.attribute_map.get(key, key)] = small
    layers = names.get("num_hidden_layers") or getattr(default, "num_hidden_layers", None)
    for key, value in names.items():
        if isinstance(value, list) and layers and len(value) == layers:
            kinds = list(dict.fromkeys(map(str, value)))
            # one of each kind at least
            first = [next(v for v in value if str(v) == kind) for kind in kinds]
            values[key] = (first * LAYERS)[:LAYERS]
    for key, sub_class in default.sub_configs.items():
        sub = getattr(default, key, None)
        if isinstance(sub, sub_class if inspect.isclass(sub_class) else object) and sub is not None:
            # placeholders and ends of a large vocabulary lie outside the small one
            tokens = {token: id_ for token, id_ in PLAIN_TOKENS.items() if token in sub.to_dict()}
            values[key] = sub.to_dict() | _small_values(sub) | tokens
            values[key].pop("per_layer_config", None)
    return values


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a small random model; initial weights give nearly uniform distributions, so they are spread."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def measure(model_type: str) -> tuple[str, Comparison | None]:
    """Compare a type, whatever is known of it: what became of it in a few words, and the differences."""
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return f"not built: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200], None
    if families.is_known_right(model.config):
        result = compare(model)
        return ("right" if max(result.packed + result.drawn) < TOLERANCE else "WRONG"), result
    try:
        result = verify_model(model)
    except families.ModelRefused as error:
        return f"refused: {error.reason}", None
    return "right", result


def names_of(kind: str, page: str) -> set[str]:
    """Read from the page's text which types are `right`, `refused` or `not built`."""
    _, _, section = page.partition(f"<!-- {kind} -->")
    return set(re.findall(r"`([\w-]+)`", section.partition("<!-- end -->")[0]))


def page_of(found: dict[str, str]) -> str:
    """Write the page, given what became of each type."""
    names = {kind: [name for name, what in found.items() if what.startswith(kind)] for kind in ("right", "not built")}
    reasons: dict[str, list[str]] = {}
    for name, what in found.items():
        if what.startswith("refused: "):
            reason = what.removeprefix("refused: ")
            # one row for a reason: without the class that it is about, and figures of tiny random models
            reason = re.sub(r"^[A-Z]\w+", "it", reason)
            reason = re.sub(r" by [\d.e-]+ nats.*", "", reason)
            reason = re.sub(r"its layers of kind [\w, ]+ carry", "its layers carry", reason)
            reasons.setdefault(reason.replace("|", "/"), []).append(name)
    rows = [
        f"| {reason} | {', '.join(f'`{name}`' for name in types)} |"
        for reason, types in sorted(reasons.items(), key=lambda row: -len(row[1]))
    ]
    return PAGE_TEXT.format(
        dozen=_listed(DOZEN),
        known=_listed(families.KNOWN_RIGHT),
        right=_listed(names["right"]),
        refused="\n".join(rows),
        not_built=_listed(names["not built"]),
        tolerance=f"{TOLERANCE:g}",
        version=transformers.__version__,
    )


def _listed(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 118, break_on_hyphens=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types to try and print; default all, which writes the page")
    types = parser.parse_args().types
    logging.disable(logging.WARNING)
    found = {}
    for name in types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[name], result = measure(name)
        print(f"{name:28} {found[name]}", "" if result is None else result, flush=True)
    if not types:
        PAGE.write_text(page_of(found))
