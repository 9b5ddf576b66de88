"""The policy: a causal LM that computes log-probabilities over packed groups, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_core.errors import InputError
from grpo_core.families import ModelRefused, check_model, head_transform, length_limit
from grpo_core.layout import GroupLayout
from grpo_core.types import Prompt
from grpo_kernels import GroupSpans, group_attention, linear_logprob

ATTENTION = "grpo_group"
"""Name under which group attention is registered with transformers."""

_CHANGES_SCORES = {
    "softcap": "a soft cap",
    "s_aux": "sinks",
    "position_bias": "a bias of positions",
    "indices": "chosen keys",
    "block_indices": "chosen blocks of keys",
}
"""Arguments of transformers' attention interface that change the scores, beside mask, scale and window."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_spans: GroupSpans | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: group attention where the caller passes spans, plain SDPA elsewhere."""
    # what a layer hands over beside the usual (GPT-OSS: its sinks, s_aux; others: a bias, chosen keys) changes the
    # scores; plain SDPA and group attention would both leave it out without a word, and then agree with each other
    kind = type(module).__name__
    changes = [f"{what} ({name})" for name, what in _CHANGES_SCORES.items() if kwargs.get(name) is not None]
    if changes:
        raise ModelRefused(module.config, f"{kind} has {', '.join(changes)}, and group attention has not")
    if group_spans is None:
        # the dummy mask of hidden_states without its spans: this layer has lost them, and SDPA would mix the groups. (A
        # single query also has a mask of this shape, in ordinary decoding.)
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise ModelRefused(
                module.config,
                f"{kind} does not hand keyword arguments to its attention, so it cannot run over packed groups",
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # a window that the layer asks for here would be left out without a word
    window = kwargs.get("sliding_window")
    sequences = zip(group_spans.prompt_lengths, group_spans.completion_lengths, strict=True)
    if window is not None and window < max(prompt + max(lengths, default=0) for prompt, lengths in sequences):
        raise NotImplementedError(
            f"config.sliding_window is {window} and a sequence is longer: "
            "group attention has no window, use shorter prompts and completions"
        )
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ModelRefused(module.config, f"{kind} sees later tokens, and group attention is causal")
    # values narrower than keys (latent attention, as DeepSeek's): zeros add columns of zeros, which are cut off again
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    packed = group_attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), group_spans, scale=scaling
    )
    return packed[None, ..., :width], None


class LogProbs(NamedTuple):
    """The result of `Policy.logprobs`."""

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
        embed: returns `[P, H]` per prompt, differentiably; by default the LM's token embeddings. Sampling and training
            both call it; a subclass passes it here instead of overriding the method.
        module: owns every trained parameter (the LM's and those that `embed` uses); by default the LM.
        reference: which policy the `reference_*` methods use; see `AlgorithmConfig.reference`. `frozen` copies the
            trained parameters now, in their own dtype (sharded ones, as FSDP2 makes them, stay sharded); `None` keeps
            no reference.
        offload: keep the frozen copy in host memory.

    Raises:
        InputError: nothing is trainable, an adapter on the LM head, or `adapter_off` without PEFT adapters.
        ModelRefused: the model would be trained wrongly; see `grpo_core.families.check_model`.
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
        self.causal_lm = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        config = self.causal_lm.config
        check_model(config, media=embed is not None)
        # the model's class says so only where no kind of layer does (Granite 4 has models of attention alone)
        if getattr(self.causal_lm, "_is_stateful", False) and not getattr(config, "layer_types", None):
            raise ModelRefused(
                config, "its layers carry a state along the sequence, which would leak between sequences"
            )
        if self.causal_lm.base_model is self.causal_lm:
            raise ModelRefused(config, f"{type(self.causal_lm).__name__} does not name its layers without the head")
        self.head_transform, self.length_limit = head_transform(config), length_limit(config)
        # here and not at import, which should have no effect on others; to register again changes nothing
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        # once for all: calls without spans (generate, an encoder's) go to SDPA as before
        self.causal_lm.set_attn_implementation(ATTENTION)
        if config._attn_implementation != ATTENTION:
            raise ModelRefused(
                config,
                f"{type(self.causal_lm).__name__} does not use transformers' attention interface, so packed sequences "
                "would see each other",
            )
        self.module: nn.Module = model if module is None else module
        self._embed = embed
        if not self.named_parameters():
            raise InputError("the policy has no trainable parameter: add an adapter or set requires_grad")
        if isinstance(self.causal_lm.get_output_embeddings(), BaseTunerLayer):
            raise InputError(
                "the model has an adapter on its LM head, whose weight the fused log-probs read as it is: leave "
                "lm_head out of the adapter's target modules, or train it whole (modules_to_save)"
            )
        if reference == "adapter_off" and not isinstance(model, PeftModel):
            raise InputError("algorithm.reference is adapter_off, but the model has no adapters: set it to frozen")
        self.reference = reference
        self._frozen: dict[str, Tensor] = {}
        if reference == "frozen":
            for name, parameter in self.named_parameters().items():
                frozen = parameter.detach().to("cpu", copy=True) if offload else parameter.detach().clone()
                # pinned, so that an exchange runs at the bus's speed; torch cannot pin sharded tensors
                if offload and parameter.is_cuda and type(frozen) is Tensor:
                    frozen = frozen.pin_memory()
                self._frozen[name] = frozen

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.causal_lm.get_input_embeddings().weight).device

    @property
    def dtype(self) -> torch.dtype:
        # the embedding's, not the first parameter's: linear layers may be quantised, adapters in float32
        return cast(Tensor, self.causal_lm.get_input_embeddings().weight).dtype

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Embed prompts: `[P_n, H]` each, on the policy's device, with gradient into whatever made them."""
        if self._embed is not None:
            return self._embed(prompts)
        # one lookup for all: the gradient of each is as large as the whole table
        ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=self.device)
        return list(self.causal_lm.get_input_embeddings()(ids).split([len(prompt.token_ids) for prompt in prompts]))

    def check_token_ids(self, prompts: Iterable[Prompt], targets: Iterable[Sequence[int]] = ()) -> None:
        """Refuse token ids for which the model has no embedding, as those of another model's tokenizer.

        Prompts whose embeddings a function of its own makes are left to it: their placeholders may lie outside.

        Raises:
            InputError: naming the prompt and the id.
        """
        rows = len(cast(Tensor, self.causal_lm.get_input_embeddings().weight))
        for prompt in prompts if self._embed is None else ():
            if (largest := max(prompt.token_ids)) >= rows:
                raise InputError(
                    f"prompt {prompt.id!r} has token id {largest}, but the model has {rows} embeddings: use the "
                    "model's own tokenizer, without tokens added to it"
                )
        for target in targets:
            if (largest := max(target, default=0)) >= rows:
                raise InputError(
                    f"a target has token id {largest}, but the model has {rows} embeddings: use the model's own "
                    "tokenizer, without tokens added to it"
                )

    def hidden_states(self, layout: GroupLayout, prompts: Sequence[Prompt]) -> Tensor:
        """Compute the last hidden states `[R, H]` of the predictor rows, in one forward over the packed axis.

        Args:
            layout: the N prompts packed with their completions, on the policy's device.
            prompts: the N prompts.
        """
        if self.length_limit is not None:
            key, limit = self.length_limit
            for n, group in enumerate(layout.spans.completion_lengths):
                tokens = layout.spans.prompt_lengths[n] + max(group, default=0)
                if tokens > limit:
                    raise NotImplementedError(
                        f"{key} is {limit}, and prompt {prompts[n].id!r} and its completion have {tokens} tokens: "
                        "beyond it the model computes something else, use shorter prompts and completions"
                    )
        embedding = self.causal_lm.get_input_embeddings()
        if self._embed is None:
            # one lookup for prompts and completions: the gradient of each lookup is as large as the whole table
            packed = embedding(layout.token_ids)  # [T, H]
        else:
            # only completion tokens are looked up: a prompt's placeholders may lie outside the vocabulary
            lengths = [sum(group) for group in layout.spans.completion_lengths]
            completions = embedding(layout.target_ids).split(lengths)
            pieces: list[Tensor] = []
            for prompt, completion in zip(self.embed(prompts), completions, strict=True):
                pieces += [prompt.to(completion.dtype), completion]
            packed = torch.cat(pieces)
        output = self.causal_lm.base_model(
            inputs_embeds=packed[None],
            position_ids=layout.position_ids[None],
            # a 4-D mask is used as it is: transformers would build a dense [T, T] one from the positions
            attention_mask=packed.new_zeros(1, 1, 1, 1),
            use_cache=False,
            group_spans=layout.spans,
        )
        # before the head: prompt rows predict nothing, and logits of the whole axis are never stored
        return output.last_hidden_state[0, layout.predictor_rows]

    def logprobs(
        self,
        layout: GroupLayout,
        prompts: Sequence[Prompt],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        reference_hidden: Tensor | None = None,
    ) -> LogProbs:
        """Compute the log-probability `[R]` of every completion token, and more on request, differentiably.

        Args:
            layout: the N prompts packed with their completions, on the policy's device.
            prompts: the N prompts.
            temperature: divides the logits, as it did in sampling.
            entropy: also compute the entropy of each token's distribution.
            reference_hidden: `[R, H]` of `reference_hidden_states`: also compute the KL to the reference.
        """
        hidden = self.hidden_states(layout, prompts)
        # hidden states and the head's weight, not logits: [R, V] is never stored, forward or backward
        head = self.causal_lm.get_output_embeddings()
        return LogProbs(
            *linear_logprob(
                hidden,
                head.weight,
                layout.target_ids,
                bias=head.bias,
                # a scale of the logits, in float32: hidden states times the scale would be rounded once more. (No known
                # model has both a scale and a cap, which would come between the two.)
                temperature=temperature / self.head_transform.scale,
                softcap=self.head_transform.softcap,
                entropy=entropy,
                reference_hidden=reference_hidden,
            )
        )

    @torch.no_grad()
    def reference_logprobs(self, layout: GroupLayout, prompts: Sequence[Prompt], *, temperature: float = 1.0) -> Tensor:
        """Compute log-probabilities under the reference policy, float32 `[R]`, without gradient.

        Raises:
            RuntimeError: the policy was made without a reference.
        """
        with self._as_reference():
            return self.logprobs(layout, prompts, temperature=temperature).logprob

    @torch.no_grad()
    def reference_hidden_states(self, layout: GroupLayout, prompts: Sequence[Prompt]) -> Tensor:
        """Compute the reference policy's last hidden states at the predictor rows, `[R, H]`, without gradient.

        Raises:
            RuntimeError: the policy was made without a reference.
            InputError: the LM head is trained, so that policy and reference do not share it.
        """
        # the full KL reads one head for both hidden states, and it is computed after the parameters are exchanged back
        if self.causal_lm.get_output_embeddings().weight.requires_grad:
            raise InputError(
                "algorithm.kl_estimator is full, for which policy and reference must share the LM head, but the head "
                "is trained (or tied to trained embeddings): set kl_estimator to k3"
            )
        with self._as_reference():
            return self.hidden_states(layout, prompts)

    @torch.no_grad()
    def sync_reference(self, alpha: float = 1.0) -> None:
        """Move the frozen reference to `alpha · policy + (1 − alpha) · reference` (TR-DPO, arXiv 2404.09656)."""
        for name, parameter in self.named_parameters().items():
            # in place: a checkpoint may hold these tensors; `.to` moves the parameter where the copy is offloaded
            self._frozen[name].lerp_(parameter.detach().to(self._frozen[name].device), alpha)

    def reference_tensors(self) -> dict[str, Tensor]:
        """Return the frozen reference's parameters, by name; empty without one."""
        return self._frozen

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Make the model compute what the reference computes, within a `with` block."""
        if self.reference is None:
            raise RuntimeError("this policy keeps no reference: make it with reference='frozen' or 'adapter_off'")
        if self.reference == "adapter_off":
            with cast(PeftModel, self.model).disable_adapter():
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            # also after an error: a trainer that catches it must not go on with the reference's weights
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the values of the trained parameters and the frozen ones.

        In place and one at a time: a second model would double the memory, and an optimiser, FSDP2 and captured graphs
        refer to the parameters' addresses.
        """
        for name, parameter in self.named_parameters().items():
            trained = parameter.detach().clone()
            # .data: an in-place write to the parameter itself would invalidate graphs that autograd has saved it for
            parameter.data.copy_(self._frozen[name])
            self._frozen[name].copy_(trained)


# further names of rates: GPT-2's and OPT's, and noise on what a router of experts reads. (Not every name with jitter in
# it: PhiMoE has a threshold of such a name, which counts in evaluation too.)
_NOISE = ("pdrop", "layerdrop", "input_jitter_noise", "moe_jitter_eps")


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout rate to 0: with dropout, the ratio of a policy to itself would not be 1."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        # many models keep a rate as a number and call F.dropout with it (OPT), or skip whole layers (layerdrop)
        for name, value in list(vars(child).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith(_NOISE)):
                setattr(child, name, 0.0)
