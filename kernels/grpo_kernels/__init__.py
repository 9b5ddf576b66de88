"""Fused operations for GRPO: LM-head log-prob and loss, group attention, decoding, sampling.

They need torch and triton alone. Names are loaded on first use: `import grpo_kernels` brings neither, and an operation
brings its own file and the few that it is made of. Where Triton is not installed everything imports, and runs on torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # setup.py reads this line

if TYPE_CHECKING:
    from grpo_kernels._backend import Backend, choose_backend
    from grpo_kernels.attention.group_attention import group_attention
    from grpo_kernels.attention.group_decode_attention import (
        GroupRows,
        group_decode_attention,
        group_decode_attention_reference,
    )
    from grpo_kernels.attention.spans import GroupSpans
    from grpo_kernels.layers.rms_norm import rms_norm, rms_norm_reference
    from grpo_kernels.layers.rope_append import rope_append, rope_append_reference
    from grpo_kernels.layers.silu_mul import silu_mul, silu_mul_reference
    from grpo_kernels.lm_head.from_logits import GRPOLoss, grpo_loss, grpo_loss_reference
    from grpo_kernels.lm_head.grpo_loss import linear_grpo_loss, linear_grpo_loss_reference
    from grpo_kernels.lm_head.logprob import LinearLogprob, linear_logprob, linear_logprob_reference
    from grpo_kernels.lm_head.selective_logprob import SelectiveLogprob, selective_logprob, selective_logprob_reference
    from grpo_kernels.lm_head.token_loss import (
        KLEstimator,
        cispo_surrogate,
        clipped_surrogate,
        importance_weight,
        kl_estimate,
        vespo_surrogate,
    )
    from grpo_kernels.sampling.record_tokens import RowState, record_tokens, record_tokens_reference
    from grpo_kernels.sampling.sample_head import sample_head, sample_head_reference
    from grpo_kernels.sampling.sample_row import SampledTokens, SampleOptions, sample_row, sample_row_reference

__all__ = [
    "Backend",
    "GRPOLoss",
    "GroupRows",
    "GroupSpans",
    "KLEstimator",
    "LinearLogprob",
    "RowState",
    "SampleOptions",
    "SampledTokens",
    "SelectiveLogprob",
    "__version__",
    "choose_backend",
    "cispo_surrogate",
    "clipped_surrogate",
    "group_attention",
    "group_decode_attention",
    "group_decode_attention_reference",
    "grpo_loss",
    "grpo_loss_reference",
    "importance_weight",
    "kl_estimate",
    "linear_grpo_loss",
    "linear_grpo_loss_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "record_tokens",
    "record_tokens_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_append",
    "rope_append_reference",
    "sample_head",
    "sample_head_reference",
    "sample_row",
    "sample_row_reference",
    "selective_logprob",
    "selective_logprob_reference",
    "silu_mul",
    "silu_mul_reference",
    "vespo_surrogate",
]

_MODULES = {
    "_backend": "Backend choose_backend",
    "attention.group_attention": "group_attention",
    "attention.group_decode_attention": "GroupRows group_decode_attention group_decode_attention_reference",
    "attention.spans": "GroupSpans",
    "layers.rms_norm": "rms_norm rms_norm_reference",
    "layers.rope_append": "rope_append rope_append_reference",
    "layers.silu_mul": "silu_mul silu_mul_reference",
    "lm_head.from_logits": "GRPOLoss grpo_loss grpo_loss_reference",
    "lm_head.grpo_loss": "linear_grpo_loss linear_grpo_loss_reference",
    "lm_head.logprob": "LinearLogprob linear_logprob linear_logprob_reference",
    "lm_head.selective_logprob": "SelectiveLogprob selective_logprob selective_logprob_reference",
    "lm_head.token_loss": (
        "KLEstimator cispo_surrogate clipped_surrogate importance_weight kl_estimate vespo_surrogate"
    ),
    "sampling.record_tokens": "RowState record_tokens record_tokens_reference",
    "sampling.sample_head": "sample_head sample_head_reference",
    "sampling.sample_row": "SampleOptions SampledTokens sample_row sample_row_reference",
}
"""Public names by the module that has them; the imports above say the same to type checkers."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `python -m` of a module that is no program would end with status 0, having done nothing
if getattr(sys, "argv", [""])[:1] == ["-m"]:
    from grpo_kernels._module_run import refuse_module_run

    refuse_module_run(__name__, __path__[0])
