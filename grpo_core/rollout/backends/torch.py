"""Decoding with fused weights in plain torch, for models of the registered families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from grpo_core.rollout.attention import decode_attention, prefill_attention
from grpo_core.rollout.cache import GroupCache, MaskedCache, prefill_batches
from grpo_core.rollout.sampling import LogitsSampling, SamplingParams
from grpo_core.rollout.weights import FusedLayer, FusedModel, FusedNorm, can_pack
from grpo_kernels import rms_norm_reference


class TorchDecoder(FusedModel):
    """`Decoder` that returns logits, by some twenty torch operations a layer.

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.
    """

    held_bytes = 0  # nothing is kept between rollouts: on a CPU an allocation costs little

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, packed=can_pack(cast(Tensor, model.get_input_embeddings().weight)))
        self.activation: nn.Module = ACT2FN[model.config.hidden_act]
        self.cache: MaskedCache | None = None

    def plan(self, groups: int, group_size: int, prompt_tokens: int, new_tokens: int, budget: int) -> int:
        """Return how many of `groups` groups fit `budget` bytes at a time, at least 1."""
        cache = GroupCache.bytes_per_group(self.cache_shape, group_size, prompt_tokens, new_tokens)
        # six float32 arrays of [G, V]: logits, log-probs, probabilities, their running sums, and two of slack
        logits = 6 * 4 * self.vocabulary * group_size
        return max(1, min(groups, budget // (cache + logits)))

    def reserve(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Allocate caches for `slots` groups of `group_size` sequences."""
        self.cache = MaskedCache(self.cache_shape, slots, group_size, prompt_tokens, new_tokens, self.device)
        cos, sin = self.rotary_tables(prompt_tokens + new_tokens)
        # [positions, 2, D], in the form that one multiply and one addcmul want: see _qkv
        self._rotations = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)

    def release(self, reuse: bool = False) -> None:
        """Free the caches."""
        self.cache = None

    def start_sampling(self, params: SamplingParams) -> LogitsSampling:
        """Begin a rollout over the reserved caches."""
        return LogitsSampling(self, params, self.device)

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        """Add N groups with prompts `[P_n, H]`; return the logits `[N, V]` after each prompt."""
        cache = self.cache
        assert cache is not None, "reserve() comes first"
        all_lengths = [len(embed) for embed in embeds]
        logits = []
        for batch in prefill_batches(all_lengths):
            x, lengths = torch.cat(list(embeds[batch])), all_lengths[batch]
            positions = torch.cat([torch.arange(length, device=x.device) for length in lengths])
            last_tokens = torch.tensor(lengths, device=x.device).cumsum(0) - 1
            rotations = self._rotations.index_select(0, positions)
            for layer, prefix in zip(self.layers, cache.prefix, strict=True):
                qkv = self._qkv(layer, x, rotations)
                q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
                first_slot = cache.num_groups + batch.start
                for slot, (ks, vs) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True), first_slot):
                    prefix[slot, 0, :, : len(ks)] = ks.transpose(0, 1)
                    prefix[slot, 1, :, : len(vs)] = vs.transpose(0, 1)
                is_last_layer = layer is self.layers[-1]
                if is_last_layer:  # only each prompt's last token goes on to the head
                    q, x = q[last_tokens], x[last_tokens]
                attended = prefill_attention(q, k, v, lengths, last_only=is_last_layer)
                x = self._mlp(layer, layer.out(attended, residual=x))
            logits.append(self.head(self._norm(x, self.norm)))
        # after the loop: the slots of all batches count from the groups that were there before
        cache.add_groups(all_lengths)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token `[B]` to every sequence; return the logits `[B, V]` after it."""
        cache = self.cache
        assert cache is not None, "reserve() comes first"
        positions, index, mask = cache.next_token()
        groups, sequences, columns = cache.num_groups, cache.num_sequences, mask.shape[-1]
        rotations = self._rotations.index_select(0, positions)
        x = self.embed(tokens)
        for layer, prefix, suffix in zip(self.layers, cache.prefix, cache.suffix, strict=True):
            qkv = self._qkv(layer, x, rotations)
            # keys and values lie side by side in qkv and in the cache, so one copy moves both
            suffix.view(-1, self.head_dim).index_copy_(0, index, qkv[:, self.num_heads :].reshape(-1, self.head_dim))
            attended = decode_attention(
                qkv[:, : self.num_heads],
                prefix[:groups, 0],
                prefix[:groups, 1],
                suffix[:sequences, 0, :, :columns],
                suffix[:sequences, 1, :, :columns],
                mask,
                cache.plan,
            )
            x = self._mlp(layer, layer.out(attended, residual=x))
        cache.advance()
        return self.head(self._norm(x, self.norm))

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        assert self.cache is not None, "reserve() comes first"
        self.cache.keep(sequences)

    def _qkv(self, layer: FusedLayer, x: Tensor, rotations: Tensor) -> Tensor:
        """Compute queries, keys (both rotated) and values of tokens `[T, H]`, as heads `[T, heads + 2 K, D]`.

        Args:
            rotations: `[T, 2, D]`: cosines, and sines that are negative for the first half of a head.
        """
        qkv = layer.qkv(self._norm(x, layer.input_norm)).view(len(x), -1, self.head_dim)
        rotated = qkv[:, : self.num_heads + self.num_kv_heads]  # a view: what follows writes into qkv
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, : self.num_heads] = self._norm(rotated[:, : self.num_heads], layer.q_norm)
            rotated[:, self.num_heads :] = self._norm(rotated[:, self.num_heads :], layer.k_norm)
        halves_swapped = rotated.roll(self.head_dim // 2, dims=-1)  # a copy, so it must come before the multiply
        rotated.mul_(rotations[:, :1]).addcmul_(halves_swapped, rotations[:, 1:])
        return qkv

    def _mlp(self, layer: FusedLayer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(self.activation(gate).mul_(up), residual=x)

    def _norm(self, x: Tensor, norm: FusedNorm) -> Tensor:
        return rms_norm_reference(x, norm.weight, self.eps)[0]
