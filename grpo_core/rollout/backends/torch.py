"""Decoding with fused weights in plain torch, for models of the registered families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from grpo_core.config.options import RolloutConfig
from grpo_core.rollout.cache import GroupCache, extent, move, prefill_batches
from grpo_core.rollout.sampling import LogitsSampling, SamplingParams
from grpo_core.rollout.weights import FusedLayer, FusedModel, can_pack
from grpo_kernels import rms_norm_reference as rms_norm


class TorchDecoder(FusedModel):
    """`Decoder` that returns logits, by some twenty torch operations a layer.

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.

    Attributes:
        cache: the groups' keys and values; None between rollouts.
    """

    held_bytes = 0  # nothing is kept between rollouts: on a CPU an allocation costs little

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, packed=can_pack(cast(Tensor, model.get_input_embeddings().weight)))
        self.activation: nn.Module = ACT2FN[model.config.hidden_act]
        self.cache: GroupCache | None = None

    def plan(self, groups: int, prompt_tokens: int, rollout: RolloutConfig, budget: int) -> int:
        """Return how many of `groups` groups fit `budget` bytes at a time, at least 1."""
        size = rollout.group_size
        cache = self.token_bytes * (extent(prompt_tokens) + size * extent(rollout.max_new_tokens))
        # six float32 arrays of [G, V]: logits, log-probs, probabilities, their running sums, and two of slack
        logits = 6 * 4 * self.vocabulary * size
        return max(1, min(groups, budget // (cache + logits)))

    def start_sampling(self, slots: int, prompt_tokens: int, params: SamplingParams) -> LogitsSampling:
        """Allocate caches for `slots` groups, and begin a rollout."""
        size, new_tokens, device = params.rollout.group_size, params.rollout.max_new_tokens, self.device
        sequences = slots * size
        self.cache = GroupCache(self.cache_shape, slots, sequences, size, prompt_tokens, new_tokens, device)
        cos, sin = self.rotary_tables(prompt_tokens + new_tokens)
        # [positions, 2, D], in the form that one multiply and one addcmul want: see _qkv
        self._rotations = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        # completion tokens in the cache by sequence, on the device; the host has upper bounds of them, so that no step
        # has to read them back
        self._lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._longest = np.zeros(0, dtype=np.int64)
        # the sequences' arrangement for attention, remade after sequences have come or gone
        self._plan: SequencePlan | None = None
        # index of column 0 of each sequence's 2 K heads in a layer's suffix, flat as [sequences * 2 K * S, D]
        columns = self.cache.suffix.shape[4]
        self._head_starts = torch.arange(sequences * 2 * self.num_kv_heads, device=device).view(sequences, -1) * columns
        self._columns = torch.arange(columns, device=device)
        # two scalars on the device: torch.where with Python numbers would make float32 of a half-precision mask
        self._visible, self._hidden = torch.tensor((0.0, -torch.inf), dtype=self.dtype, device=device).unbind()
        return LogitsSampling(self, params, device)

    def release(self, reuse: bool = False) -> None:
        """Free the caches."""
        self.cache = None

    def prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        """Add N groups with prompts `[P_n, H]`; return the logits `[N, V]` after each prompt."""
        cache = self.cache
        assert cache is not None, "start_sampling() comes first"
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
                q_lengths, is_last_layer = lengths, layer is self.layers[-1]
                if is_last_layer:  # only each prompt's last token goes on to the head
                    q, x, q_lengths = q[last_tokens], x[last_tokens], [1] * len(lengths)
                prompts = zip(q.split(q_lengths), k.split(lengths), v.split(lengths), strict=True)
                attended = []
                # attention by prompt: a call over all of them would need a dense [P, P] mask
                for slot, heads in enumerate(prompts, cache.num_groups + batch.start):
                    qs, ks, vs = (t.transpose(0, 1) for t in heads)  # heads first, as the cache has them
                    prefix[slot, 0, :, : ks.shape[1]] = ks
                    prefix[slot, 1, :, : vs.shape[1]] = vs
                    # the last token sees all of its prompt: no mask
                    out = F.scaled_dot_product_attention(
                        qs[None], ks[None], vs[None], is_causal=not is_last_layer, enable_gqa=len(qs) != len(ks)
                    )
                    attended.append(out[0].transpose(0, 1).flatten(1))
                x = layer.out(torch.cat(attended), residual=x)
                gate, up = layer.gate_up(rms_norm(x, layer.mlp_norm, self.eps)[0]).chunk(2, dim=-1)
                x = layer.down(self.activation(gate).mul_(up), residual=x)
            logits.append(self.head(rms_norm(x, self.norm, self.eps)[0]))
        # after the loop: the slots of all batches count from the groups that were there before
        before = cache.num_sequences
        cache.add_groups(all_lengths)
        self._longest = np.r_[self._longest, np.zeros(cache.num_sequences - before, dtype=np.int64)]
        self._lengths[before : cache.num_sequences] = 0
        self._plan = None
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token `[B]` to every sequence; return the logits `[B, V]` after it."""
        cache = self.cache
        assert cache is not None, "start_sampling() comes first"
        if self._plan is None:
            self._plan = SequencePlan.build(cache.group_of_sequence, cache.prefix_lengths, self.dtype, self.device)
        groups, sequences, last_column = cache.num_groups, cache.num_sequences, cache.suffix.shape[4] - 1
        lengths = self._lengths[:sequences]
        rotations = self._rotations.index_select(0, self._plan.prompt_tokens + lengths)
        # where the token's keys and values go in a layer's suffix
        index = (self._head_starts[:sequences] + lengths[:, None]).view(-1)
        # as many columns as the longest completion needs; of each, those up to the new token are seen
        columns = min(extent(int(self._longest.max()) + 1), last_column + 1)
        mask = torch.where(self._columns[:columns] > lengths[:, None], self._hidden, self._visible)[:, None, None]
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
                self._plan,
            )
            x = layer.out(attended, residual=x)
            gate, up = layer.gate_up(rms_norm(x, layer.mlp_norm, self.eps)[0]).chunk(2, dim=-1)
            x = layer.down(self.activation(gate).mul_(up), residual=x)
        # A full sequence stays at its last column and overwrites it: only sequences that have ended, and wait to be
        # dropped, get there. Clamped on the device and on the host alike: to ask which have ended would be a wait
        lengths.add_(1).clamp_(max=last_column)  # a view: counts in self._lengths
        self._longest = np.minimum(self._longest + 1, last_column)
        return self.head(rms_norm(x, self.norm, self.eps)[0])

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        assert self.cache is not None, "start_sampling() comes first"
        self.cache.keep(sequences)
        move(self._lengths, sequences, dim=0)
        self._longest = self._longest[sequences]
        self._plan = None

    def _qkv(self, layer: FusedLayer, x: Tensor, rotations: Tensor) -> Tensor:
        """Compute queries, keys (both rotated) and values of tokens `[T, H]`, as heads `[T, heads + 2 K, D]`.

        Args:
            rotations: `[T, 2, D]`: cosines, and sines that are negative for the first half of a head.
        """
        qkv = layer.qkv(rms_norm(x, layer.input_norm, self.eps)[0]).view(len(x), -1, self.head_dim)
        rotated = qkv[:, : self.num_heads + self.num_kv_heads]  # a view: what follows writes into qkv
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, : self.num_heads] = rms_norm(rotated[:, : self.num_heads], layer.q_norm, self.eps)[0]
            rotated[:, self.num_heads :] = rms_norm(rotated[:, self.num_heads :], layer.k_norm, self.eps)[0]
        halves_swapped = rotated.roll(self.head_dim // 2, dims=-1)  # a copy, so it must come before the multiply
        rotated.mul_(rotations[:, :1]).addcmul_(halves_swapped, rotations[:, 1:])
        return qkv


@dataclass(frozen=True)
class SequencePlan:
    """Which group each of B sequences belongs to, and the sequences of N groups as a `[N, W]` grid.

    The grid lets one batched product serve all queries of a group: its prompt's keys are read once, not once per
    sequence. W is at least the number of sequences of any group.

    Attributes:
        prompt_tokens: int64 `[B]`, the length of each sequence's prompt.
        grid: int64 `[N * W]`, the sequence in each cell; unused cells hold 0 and are never read. None: sequences are
            already in the grid's order, without gaps.
        cells: int64 `[B]`, the cell of each sequence; None likewise.
        prefix_mask: `[N, 1, 1, E]`, 0 on the prompt's keys and -inf after them.
    """

    prompt_tokens: Tensor
    grid: Tensor | None
    cells: Tensor | None
    prefix_mask: Tensor

    @classmethod
    def build(
        cls, group_of_sequence: np.ndarray, prefix_lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> SequencePlan:
        """Arrange sequences, given the group of each `[B]` (in any order) and the groups' prompt lengths `[N]`."""
        groups = len(prefix_lengths)
        order = np.argsort(group_of_sequence, kind="stable")
        counts = np.bincount(group_of_sequence, minlength=groups)
        starts = np.r_[0, np.cumsum(counts)[:-1]]
        column = np.empty_like(group_of_sequence)
        column[order] = np.arange(len(group_of_sequence)) - np.repeat(starts, counts)
        # W in multiples of 8: matrix kernels treat a short remainder of rows differently, to the last bit
        width = math.ceil(int(counts.max(initial=1)) / 8) * 8
        cells = group_of_sequence * width + column
        grid = np.zeros(groups * width, dtype=np.int64)
        grid[cells] = np.arange(len(group_of_sequence))
        # full groups of a multiple of 8, as most rollouts begin: no gather in any layer
        aligned = np.array_equal(cells, np.arange(len(grid)))
        lengths = torch.tensor(prefix_lengths, device=device)
        keys = torch.arange(extent(max(prefix_lengths)), device=device)
        mask = torch.zeros(groups, 1, 1, len(keys), dtype=dtype, device=device)
        mask.masked_fill_(keys >= lengths[:, None, None, None], -torch.inf)
        return cls(
            prompt_tokens=lengths[torch.from_numpy(group_of_sequence).to(device)],
            grid=None if aligned else torch.from_numpy(grid).to(device),
            cells=None if aligned else torch.from_numpy(cells).to(device),
            prefix_mask=mask,
        )


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_mask: Tensor,
    plan: SequencePlan,
) -> Tensor:
    """Attend from each sequence's newest token to its group's prompt and its completion; merge by log-sum-exp.

    Args:
        q: `[B, H, D]`: B sequences, H query heads.
        prefix_k, prefix_v: `[N, K, ≥ E, D]` of the groups' prompts; H / K query heads share a key/value head.
        suffix_k, suffix_v: `[B, K, S, D]` of the completions.
        suffix_mask: `[B, 1, 1, S]`, 0 on a completion's tokens and -inf after them.
        plan: which sequences belong to which group.

    Returns:
        `[B, H * D]`.
    """
    groups, keys = plan.prefix_mask.shape[0], plan.prefix_mask.shape[-1]
    grid = q if plan.grid is None else q.index_select(0, plan.grid)
    grid = grid.unflatten(0, (groups, -1)).transpose(1, 2)
    prefix_out, prefix_lse = _attend(grid, prefix_k[:, :, :keys], prefix_v[:, :, :keys], plan.prefix_mask)
    suffix_out, suffix_lse = _attend(q.unsqueeze(2), suffix_k, suffix_v, suffix_mask)
    # [N, H, W, …] → [N * W, H, …]. The CPU kernel's output lies with W before H in memory, so this copies nothing
    prefix_out, prefix_lse, suffix_out, suffix_lse = (
        x.transpose(1, 2).flatten(0, 1) for x in (prefix_out, prefix_lse, suffix_out, suffix_lse)
    )
    if plan.cells is not None:
        prefix_out, prefix_lse = prefix_out.index_select(0, plan.cells), prefix_lse.index_select(0, plan.cells)
    # softmax over all keys = the two softmaxes weighted by exp(lse). A softmax of pairs and not a sigmoid of their
    # difference: element-wise functions round the last few elements of a tensor by other code than the rest
    share = torch.softmax(torch.stack((suffix_lse, prefix_lse), dim=-1), dim=-1)[..., 1:].to(q.dtype)
    return torch.lerp(suffix_out, prefix_out, share).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and its log-sum-exp. q `[N, H, W, D]`, k and v `[N, K, S, D]`, mask `[N, 1, 1, S]`
    → `[N, H, W, D]`, float32 `[N, H, W]`."""
    if q.device.type == "cpu":
        # the operator behind scaled_dot_product_attention: the public function does not return the log-sum-exp
        mask = mask.expand(-1, -1, q.shape[2], -1)
        return torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    return _attend_reference(q, k, v, mask)


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # query heads that share keys, as rows of one product
    scores = (heads @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + mask
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.unsqueeze(-1)).to(q.dtype) @ v
    return out.view(q.shape), lse.view(q.shape[:-1])
