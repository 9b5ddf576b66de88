"""TRL's `GRPOTrainer` with the LM head of `grpo_kernels`: log-probs and entropies from float32 accumulators.

TRL (1.16) asks its model for log-probs by `model(..., labels=labels, fused_lm_head=True)`. The subclass here answers
that call itself and leaves the trainer's losses, metrics and options as they are. The model is entered through its own
forward, as with TRL's head, so wrappers such as DDP and PEFT see the same calls. Needs `trl==1.16.*`, which is no
dependency of this project.
"""

from __future__ import annotations

import functools
import types

from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from grpo_kernels import linear_logprob


class FusedHeadGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose policy and reference score completions with `grpo_kernels.lm_head.logprob`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None:
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                use_fused_head(base, self.temperature)


def use_fused_head(model: PreTrainedModel, temperature: float) -> None:
    """Answer `model(..., labels=labels, fused_lm_head=True)` from hidden states; every other call goes the way it went.

    Calls that want more than log-probs and entropy (a router's auxiliary loss, pre-shifted labels) keep TRL's head.
    """
    other = model.forward
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        plain = fused_lm_head and not kwargs.get("output_router_logits") and kwargs.get("shift_labels") is None
        if not plain:
            extra = {"fused_lm_head": True} if fused_lm_head else {}
            return other(*args, labels=labels, **extra, **kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        scored = labels != -100
        head = self.get_output_embeddings()
        result = linear_logprob(
            hidden[scored],
            head.weight,
            labels[scored],
            bias=head.bias,
            temperature=temperature,
            softcap=softcap,
            entropy=True,
        )
        # zeros where nothing is scored, still connected to the model when that is everywhere
        log_probs, entropy = (x.new_zeros(labels.shape).masked_scatter(scored, x) for x in result[:2])
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, label_mask=scored)

    model.forward = types.MethodType(forward, model)


if __name__ == "__main__":
    raise SystemExit("this file holds a trainer to copy: use FusedHeadGRPOTrainer where you use trl.GRPOTrainer")
