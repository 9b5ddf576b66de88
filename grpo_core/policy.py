"""The policy: a causal LM, and what the engine asks of it over a packed group layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_core.layout import GroupLayout
from grpo_core.types import Prompt
from grpo_kernels import group_attention, linear_logprob
from grpo_kernels.attention.spans import GroupSpans

ATTENTION = "grpo_group"
"""Name under which group attention is registered with transformers."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_spans: GroupSpans | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: group attention where the caller passes spans, plain SDPA elsewhere."""
    if group_spans is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise NotImplementedError(
                f"{type(module).__name__} does not hand keyword arguments to its attention, so it cannot run over "
                "packed groups: use a Qwen2, Qwen3, Llama or Mistral model"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("sliding_window") is not None and kwargs["sliding_window"] < max(
        prompt + max(lengths, default=0)
        for prompt, lengths in zip(group_spans.prompt_lengths, group_spans.completion_lengths, strict=True)
    ):
        raise NotImplementedError(
            f"config.sliding_window is {kwargs['sliding_window']} and a sequence is longer: "
            "group attention has no window, use shorter prompts and completions"
        )
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("config.attn_logit_softcapping is set: group attention has no soft cap")
    packed = group_attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), group_spans, scale=scaling
    )
    return packed[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class LogProbs(NamedTuple):
    """`Policy.logprobs`'s result."""

    logprob: Tensor
    """float32 `[R]`."""
    entropy: Tensor | None
    """float32 `[R]`, in nats."""
    kl: Tensor | None = None
    """float32 `[R]`, KL to the reference over the whole vocabulary, in nats."""


class Policy:
    """A Hugging Face causal LM (optionally with PEFT adapters) that reads prompts as embeddings.

    Args:
        model: the LM. Its attention is switched to the group interface, which is SDPA for ordinary calls.
        embed: gives `[P, H]` per prompt, differentiably; the LM's token embeddings unless given. Sampling and training
            go by it; a subclass passes it on instead of overriding the method.
        module: owns every trained parameter (the LM and what `embed` uses); the LM unless given.
        reference: which policy `reference=True` means; see `AlgorithmConfig.reference`. `frozen` copies the trained
            parameters now, in their own dtype (sharded ones, as FSDP2 makes them, stay sharded); `None` keeps no
            reference.
        offload: keep the frozen copy in host memory.

    Raises:
        ValueError: nothing is trainable, an adapter on the LM head, or `adapter_off` without PEFT adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        embed: Callable[[Sequence[Prompt]], list[Tensor]] | None = None,
        module: nn.Module | None = None,
        reference: Literal["frozen", "adapter_off"] | None = None,
        offload: bool = False,
    ):
        self.model = model
        self.causal_lm: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.causal_lm.set_attn_implementation(ATTENTION)
        self.module = model if module is None else module
        self._embed = embed
        if not self.named_parameters():
            raise ValueError("the policy has no trainable parameter: add an adapter or set requires_grad")
        if isinstance(self.causal_lm.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "the model has an adapter on its LM head, whose weight the fused log-probs read as it is: leave "
                "lm_head out of the adapter's target modules, or train it whole (modules_to_save)"
            )
        if reference == "adapter_off" and not isinstance(model, PeftModel):
            raise ValueError("algorithm.reference is adapter_off, but the model has no adapters: set it to frozen")
        self.reference = reference
        self._frozen = (
            {name: _copy(parameter.detach(), offload) for name, parameter in self.named_parameters().items()}
            if reference == "frozen"
            else {}
        )

    @property
    def device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal_lm.get_input_embeddings().weight.dtype

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """`[P_n, H]` of each prompt, on the policy's device, with gradient into whatever made them."""
        return self._embed_tokens(prompts) if self._embed is None else self._embed(prompts)

    def _embed_tokens(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=self.device)
        return list(self.causal_lm.get_input_embeddings()(ids).split([len(prompt.token_ids) for prompt in prompts]))

    def hidden_states(self, layout: GroupLayout, prompts: Sequence[Prompt]) -> Tensor:
        """Last hidden states `[R, H]` of the predictor rows, in one forward over the packed axis.

        Args:
            layout: the N prompts packed with their completions, on the policy's device.
            prompts: the N prompts.
        """
        packed = self._packed_embeds(layout, prompts)
        output = self.causal_lm.base_model(
            inputs_embeds=packed[None],
            position_ids=layout.position_ids[None],
            # a 4-D mask is taken as it is: transformers would build a dense [T, T] one from the positions
            attention_mask=packed.new_zeros(1, 1, 1, 1),
            use_cache=False,
            group_spans=layout.spans,
        )
        return output.last_hidden_state[0, layout.predictor_rows]

    def _packed_embeds(self, layout: GroupLayout, prompts: Sequence[Prompt]) -> Tensor:
        """`[T, H]`. One lookup where prompts are tokens: the gradient of each is as large as the whole table."""
        embedding = self.causal_lm.get_input_embeddings()
        if self._embed is None:
            return embedding(layout.token_ids)
        # completion tokens alone are looked up: a prompt's placeholders may lie outside the vocabulary
        completions = embedding(layout.target_ids).split([sum(lengths) for lengths in layout.spans.completion_lengths])
        pairs = zip(self.embed(prompts), completions, strict=True)
        return torch.cat([part for prompt, own in pairs for part in (prompt.to(own.dtype), own)])

    def logprobs(
        self,
        layout: GroupLayout,
        prompts: Sequence[Prompt],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        reference_hidden: Tensor | None = None,
    ) -> LogProbs:
        """Log-probability `[R]` of every completion token, and the entropy of its distribution, differentiably.

        Args:
            layout: the N prompts packed with their completions, on the policy's device.
            prompts: the N prompts.
            temperature: divides the logits, as it did in sampling.
            entropy: also give entropies.
            reference_hidden: `[R, H]` of `reference_hidden_states`: also give the KL to the reference.
        """
        hidden = self.hidden_states(layout, prompts)
        head = self.causal_lm.get_output_embeddings()
        return LogProbs(
            *linear_logprob(
                hidden,
                head.weight,
                layout.target_ids,
                bias=head.bias,
                temperature=temperature,
                entropy=entropy,
                reference_hidden=reference_hidden,
            )
        )

    @torch.no_grad()
    def reference_logprobs(self, layout: GroupLayout, prompts: Sequence[Prompt], *, temperature: float = 1.0) -> Tensor:
        """float32 `[R]` log-probabilities under the reference policy, without gradient.

        Raises:
            RuntimeError: the policy was made without a reference.
        """
        with self._as_reference():
            return self.logprobs(layout, prompts, temperature=temperature).logprob

    @torch.no_grad()
    def reference_hidden_states(self, layout: GroupLayout, prompts: Sequence[Prompt]) -> Tensor:
        """`[R, H]` last hidden states of the reference policy at the predictor rows, without gradient.

        Raises:
            RuntimeError: the policy was made without a reference.
            ValueError: the LM head is trained, so that policy and reference do not share it.
        """
        if self.causal_lm.get_output_embeddings().weight.requires_grad:
            raise ValueError(
                "algorithm.kl_estimator is full, which policy and reference need one LM head for, but the head is "
                "trained (or tied to trained embeddings): set kl_estimator to k3"
            )
        with self._as_reference():
            return self.hidden_states(layout, prompts)

    @torch.no_grad()
    def sync_reference(self, alpha: float = 1.0) -> None:
        """Move the frozen reference to `alpha · policy + (1 − alpha) · reference` (TR-DPO, arXiv 2404.09656)."""
        for name, parameter in self.named_parameters().items():
            self._frozen[name].lerp_(parameter.detach().to(self._frozen[name].device), alpha)

    def reference_tensors(self) -> dict[str, Tensor]:
        """The frozen reference's parameters, by name; empty without one."""
        return self._frozen

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.reference is None:
            raise RuntimeError("this policy keeps no reference: make it with reference='frozen' or 'adapter_off'")
        if self.reference == "adapter_off":
            with self.model.disable_adapter():
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the values of the trained parameters and the frozen ones. In place: addresses, shards and devices
        stay, whatever else refers to them."""
        for name, parameter in self.named_parameters().items():
            own = parameter.detach().clone()
            parameter.data.copy_(self._frozen[name])
            self._frozen[name].copy_(own)


def _copy(tensor: Tensor, offload: bool) -> Tensor:
    if not offload:
        return tensor.clone()
    host = tensor.to("cpu", copy=True)
    return host.pin_memory() if tensor.is_cuda and type(host) is Tensor else host


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout rate to 0: with dropout, a policy's ratio to itself would not be 1."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
