"""Decoding of Qwen2, Qwen3, Llama and Mistral models over flat weights, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from grpo_core.rollout.attention import decode_attention, prefill_attention
from grpo_core.rollout.cache import CacheShape, GroupCache, MaskedCache
from grpo_core.rollout.sampling import DrawRules, LogitsDrawer
from grpo_core.rollout.weights import CopiedVector, FlatLayer, FlatWeights, can_pack
from grpo_kernels.layers.rms_norm import rms_norm_reference

_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
PREFILL_TOKENS = 16384
"""Prompts are prefilled together up to this many tokens."""


class FlatModel:
    """What decoding in torch and by kernels share: the weights and sizes of a model that `supports` accepts.

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.
        packed: how weights lie in memory, see `FusedLinear`.
    """

    def __init__(self, model: PreTrainedModel, packed: bool):
        config = model.config
        self.weights = FlatWeights(model, packed)
        self.rotary = model.base_model.rotary_emb
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.vocabulary = config.vocab_size
        dtype = self.weights.norm.weight.dtype
        self.shape = CacheShape(len(self.weights.layers), self.kv_heads, self.head_dim, dtype)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model's layers are those of the four families, and rotations depend on the position alone."""
        config = model.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return config.model_type in _FAMILIES and rope in _STATIC_ROPES

    def refresh(self) -> None:
        self.weights.refresh()

    def _rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[positions, D / 2]` that queries and keys are turned by."""
        weight = self.weights.norm.weight
        tables = self.rotary(weight, torch.arange(positions, device=weight.device)[None])
        return tuple(table[0, :, : self.head_dim // 2].contiguous() for table in tables)

    @staticmethod
    def _parts(lengths: Sequence[int]) -> Iterator[slice]:
        """Runs of prompts that are prefilled together."""
        start = 0
        while start < len(lengths):
            end = start + 1
            while end < len(lengths) and sum(lengths[start : end + 1]) <= PREFILL_TOKENS:
                end += 1
            yield slice(start, end)
            start = end


class FlatDecoder(FlatModel):
    """`Decoder` that gives logits, by some twenty torch operations a layer."""

    held_bytes = 0

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, packed=can_pack(model.get_input_embeddings().weight))
        self.activation = ACT2FN[model.config.hidden_act]
        self.cache: MaskedCache | None = None

    def plan(self, groups: int, group_size: int, prompt_tokens: int, new_tokens: int, budget: int) -> int:
        cache = GroupCache.bytes_per_group(self.shape, group_size, prompt_tokens, new_tokens)
        logits = 6 * 4 * self.vocabulary * group_size  # fp32 logits, log-probs, probabilities, their sums, and slack
        return max(1, min(groups, budget // (cache + logits)))

    def reserve(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> None:
        device = self.weights.norm.weight.device
        self.cache = MaskedCache(self.shape, slots, group_size, prompt_tokens, new_tokens, device)
        cos, sin = self._rotations(prompt_tokens + new_tokens)
        self._turns = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)

    def release(self, reuse: bool = False) -> None:
        self.cache = None

    def drawer(self, rules: DrawRules) -> LogitsDrawer:
        return LogitsDrawer(self, rules, self.weights.norm.weight.device)

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        lengths = [len(embed) for embed in embeds]
        first = self.cache.groups
        logits = [
            self._prefill(torch.cat(list(embeds[part])), lengths[part], first + part.start)
            for part in self._parts(lengths)
        ]
        self.cache.add_groups(lengths)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        cache = self.cache
        turns = self._turns.index_select(0, cache.positions())
        index, mask = cache.append_index(), cache.suffix_mask()
        columns = mask.shape[-1]
        x = self.weights.embed(tokens)
        for layer, prefix, suffix in zip(self.weights.layers, cache.prefix, cache.suffix, strict=True):
            qkv = self._qkv(layer, x, turns)
            suffix.view(-1, self.head_dim).index_copy_(0, index, qkv[:, self.heads :].reshape(-1, self.head_dim))
            attended = decode_attention(
                qkv[:, : self.heads],
                prefix[: cache.groups, 0],
                prefix[: cache.groups, 1],
                suffix[: cache.rows, 0, :, :columns],
                suffix[: cache.rows, 1, :, :columns],
                mask,
                cache.plan,
            )
            x = self._mlp(layer, layer.out(attended, residual=x))
        cache.advance()
        return self._logits(x)

    def keep(self, rows: np.ndarray) -> None:
        self.cache.keep(rows)

    def _prefill(self, x: Tensor, lengths: list[int], first_slot: int) -> Tensor:
        """Packed prompts `[T, H]` into the slots from `first_slot` on: logits `[N, V]` after each prompt."""
        positions = torch.cat([torch.arange(length, device=x.device) for length in lengths])
        last_rows = torch.tensor(lengths, device=x.device).cumsum(0) - 1
        turns = self._turns.index_select(0, positions)
        for depth, (layer, prefix) in enumerate(zip(self.weights.layers, self.cache.prefix, strict=True)):
            qkv = self._qkv(layer, x, turns)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            for slot, (ks, vs) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True), start=first_slot):
                prefix[slot, 0, :, : len(ks)] = ks.transpose(0, 1)
                prefix[slot, 1, :, : len(vs)] = vs.transpose(0, 1)
            last_layer = depth == len(self.weights.layers) - 1
            if last_layer:  # nothing reads the other rows any more
                q, x = q[last_rows], x[last_rows]
            attended = prefill_attention(q, k, v, lengths, last_only=last_layer)
            x = self._mlp(layer, layer.out(attended, residual=x))
        return self._logits(x)

    def _qkv(self, layer: FlatLayer, x: Tensor, turns: Tensor) -> Tensor:
        """Queries, keys (both rotated) and values of rows `[T, H]`, as heads `[T, heads + 2 K, D]`.

        Args:
            turns: `[T, 2, D]`, cosines, and sines with the sign of the half of a head that they are added to.
        """
        qkv = layer.qkv(self._norm(x, layer.input_norm)).view(len(x), -1, self.head_dim)
        rotated = qkv[:, : self.heads + self.kv_heads]
        if layer.q_norm is not None:
            rotated[:, : self.heads] = self._norm(rotated[:, : self.heads], layer.q_norm)
            rotated[:, self.heads :] = self._norm(rotated[:, self.heads :], layer.k_norm)
        halves_swapped = rotated.roll(self.head_dim // 2, dims=-1)
        rotated.mul_(turns[:, :1]).addcmul_(halves_swapped, turns[:, 1:])
        return qkv

    def _mlp(self, layer: FlatLayer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(self.activation(gate).mul_(up), residual=x)

    def _norm(self, x: Tensor, norm: CopiedVector) -> Tensor:
        return rms_norm_reference(x, norm.weight, self.eps)[0]

    def _logits(self, x: Tensor) -> Tensor:
        return self.weights.head(self._norm(x, self.weights.norm))
