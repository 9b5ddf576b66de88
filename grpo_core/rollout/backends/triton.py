"""Decoding by Triton kernels: six launches a layer beside its four GEMMs, sampling included, replayed as CUDA graphs.

A step reads and writes nothing but device memory at fixed addresses: the caches, the sequences' state and their
arrangement by group. The host only chooses the batch size, and reads the tokens some steps later. Batches come in a few
sizes, so that few graphs are needed: a batch is filled up with padding sequences, which have no group and have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.config.options import RolloutConfig
from grpo_core.rollout.cache import PREFILL_TOKENS, CacheShape, GroupCache, extent, move, prefill_batches
from grpo_core.rollout.cuda_graphs import StepGraphs
from grpo_core.rollout.sampling import PendingTokens, SamplingParams
from grpo_core.rollout.weights import FusedModel
from grpo_kernels import (
    GroupRows,
    GroupSpans,
    RowState,
    SampleOptions,
    group_attention,
    group_decode_attention,
    record_tokens,
    rms_norm,
    rope_append,
    sample_head,
    silu_mul,
)

_KEPT_SHARE = 8
"""Caches of at most 1/8 of the device's memory are kept between rollouts, and their graphs with them: training then has
the other 7/8, and a rollout of the same sizes captures nothing again."""
_PADDING_STATE = (0, 0, 1, 0, 1)
"""`RowState` of a padding sequence: ended, with one token sampled, since kernels want at least one key to attend to."""


def batch_size(sequences: int) -> int:
    """Round up to the size of batch that sequences run in: 8, 16, 32, 64, then two an octave (96, 128, 192, …)."""
    size = 8
    while size < sequences:
        size *= 2
    return size * 3 // 4 if size > 64 and sequences <= size * 3 // 4 else size


class TritonCache(GroupCache):
    """A cache whose lengths and arrangement are read by kernels on the device.

    Attributes:
        state: int64 `[5, sequences]`, the fields of `RowState`.
        record: int32 `[2, sequences]`, each sequence's last token and its log-prob's bits, which the host copies.
        batch: the size of batch that the live sequences run in; padding sequences follow them in it.
    """

    def __init__(
        self,
        shape: CacheShape,
        slots: int,
        group_size: int,
        prompt_tokens: int,
        new_tokens: int,
        device: torch.device,
    ):
        sequences = batch_size(slots * group_size)
        super().__init__(shape, slots, sequences, group_size, prompt_tokens, new_tokens, device)
        self.state = torch.tensor(_PADDING_STATE, device=device)[:, None].repeat(1, sequences)
        self.record = torch.zeros(2, sequences, dtype=torch.int32, device=device)
        # the arrangement, at fixed addresses as well; only as many entries are read as there are slots and sequences
        self._prompt_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self._order = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._group_of_sequence = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._starts = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.batch = 0

    def fits(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether a rollout of these sizes can use this cache."""
        return (
            slots <= self.prefix.shape[1]
            and batch_size(slots * group_size) <= self.suffix.shape[1]
            and prompt_tokens <= self.prefix.shape[4]
            and new_tokens <= self.suffix.shape[4]
        )

    def clear(self, group_size: int) -> None:
        """Drop everything, for another rollout."""
        self.keep(np.zeros(0, dtype=np.int64))
        self.group_size = group_size

    @property
    def nbytes(self) -> int:
        return self.prefix.nbytes + self.suffix.nbytes

    def add_sequences(self, lengths: Sequence[int], keys: np.ndarray) -> None:
        """Open slots for prompts of these lengths, with empty sequences of these random keys (uint64)."""
        before = self.num_sequences
        self.add_groups(lengths)
        state = np.zeros((5, len(keys)), dtype=np.int64)
        state[0] = keys.view(np.int64)  # the same 64 bits: torch has no uint64 arithmetic, and the kernel needs none
        state[3] = np.repeat(lengths, self.group_size) - 1  # position of the prompt's last token
        self.state[:, before : self.num_sequences] = torch.from_numpy(state).to(self.state.device)
        self._arrange()

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        before = self.num_sequences
        super().keep(sequences)
        move(self.state, sequences, dim=1)
        padding = torch.tensor(_PADDING_STATE, device=self.state.device)[:, None]
        self.state[:, self.num_sequences : before] = padding
        self._arrange()

    def state_of(self, sequences: slice) -> RowState:
        """The state of some sequences, as views that kernels write to."""
        return RowState(*self.state[:, sequences].unbind())

    def arrangement(self) -> tuple[Tensor, GroupRows]:
        """The groups' prompt lengths, and the batch's sequences sorted by group: views of what `_arrange` writes."""
        # as many groups as the batch can have, not as there are: a graph's launches depend on the batch size alone
        groups = min(self.prefix.shape[1], self.batch)
        rows = GroupRows(
            order=self._order[: self.batch],
            starts=self._starts[: groups + 1],
            group_of_row=self._group_of_sequence[: self.batch],
            widest=self.group_size,
        )
        return self._prompt_lengths[:groups], rows

    def _arrange(self) -> None:
        """Choose the batch size and write the arrangement of its sequences to the device."""
        self.batch = batch_size(self.num_sequences)
        slots, device = self.prefix.shape[1], self.prefix.device
        order = np.argsort(self.group_of_sequence, kind="stable")
        # slots without a group start where the last group ends, so they are empty
        starts = np.searchsorted(self.group_of_sequence[order], np.arange(slots + 1))
        padding = np.arange(self.num_sequences, self.batch)
        for buffer, values in (
            (self._order[: self.batch], np.r_[order, padding]),
            (self._group_of_sequence[: self.batch], np.r_[self.group_of_sequence, np.full_like(padding, -1)]),
            (self._starts, starts),
            (self._prompt_lengths[: self.num_groups], np.array(self.prefix_lengths)),
        ):
            buffer.copy_(torch.from_numpy(values.astype(np.int32)).to(device))


class TritonDecoder(FusedModel):
    """`Decoder` by kernels on a GPU (or in Triton's interpreter), and the `SamplingBackend` of its rollouts.

    Tokens are sampled on the device and read while later steps run.

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.
    """

    # four steps to a read, and one read behind: the device always has four steps to do while the host handles tokens. A
    # sequence may so sample up to seven tokens after its end, which are dropped
    steps_per_read = 4
    max_pending = 1

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, packed=False)
        self.cache: TritonCache | None = None
        self.graphs: StepGraphs | None = None
        self._seen: Tensor | None = None  # bool [sequences, V], tokens so far; for the repetition penalty

    @property
    def held_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def plan(self, groups: int, prompt_tokens: int, rollout: RolloutConfig, budget: int) -> int:
        """Return how many of `groups` groups fit `budget` bytes at a time, at least 1."""
        size = rollout.group_size
        cache = self.token_bytes * (extent(prompt_tokens) + size * extent(rollout.max_new_tokens))
        logits = 2 * 4 * self.vocabulary * size  # where truncation wants them: logits, and what it makes of them
        # a layer's activations while prompts are prefilled: three of the MLP's width, and two of QKV and hidden size
        layer = self.layers[0]
        widths = 3 * sum(layer.gate_up.widths) + 2 * sum(layer.qkv.widths) + 4 * self.norm.shape[0]
        prefill = min(PREFILL_TOKENS + prompt_tokens, groups * prompt_tokens) * widths * self.dtype.itemsize
        return max(1, min(groups, (budget - prefill) // (cache + logits)))

    def start_sampling(self, slots: int, prompt_tokens: int, params: SamplingParams) -> TritonDecoder:
        """Clear the caches of the last rollout if this one fits them, else allocate new ones; begin the rollout."""
        rollout = params.rollout
        sizes = (slots, rollout.group_size, prompt_tokens, rollout.max_new_tokens)
        # caches that stay where they are keep the graphs valid, so a rollout that fits captures nothing
        if self.cache is None or not self.cache.fits(*sizes):
            self.release()  # first: old and new caches together might not fit the device
            self.cache = TritonCache(self.cache_shape, *sizes, self.device)
            # graphs hold the caches' addresses, so both live and die together
            self.graphs = StepGraphs(self.device)
            self._cos, self._sin = self.rotary_tables(self.cache.prefix.shape[4] + self.cache.suffix.shape[4])
            head_rows = sum(self.head.widths)
            self._end = torch.zeros(head_rows, dtype=torch.bool, device=self.device)
            self._never_sampled = torch.zeros(head_rows, dtype=torch.bool, device=self.device)
        self.cache.clear(rollout.group_size)
        self.max_new_tokens = rollout.max_new_tokens
        self.options = SampleOptions(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty,
        )
        # written in place: captured steps read these addresses
        head_rows = len(self._end)
        self._end.copy_(torch.from_numpy(params.end_tokens[:head_rows]))
        never_sampled = np.zeros(head_rows, dtype=bool)
        never_sampled[params.never_sampled] = True
        self._never_sampled.copy_(torch.from_numpy(never_sampled))
        if rollout.repetition_penalty != 1:
            if self._seen is None:
                shape = (self.cache.suffix.shape[1], head_rows)
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._seen.zero_()
        return self

    def release(self, reuse: bool = False) -> None:
        """Free the caches; with `reuse`, keep them if they are small beside the device's memory."""
        if reuse:
            if self.device.type != "cuda":
                return
            if self.held_bytes * _KEPT_SHARE <= torch.cuda.get_device_properties(self.device).total_memory:
                return
        self.cache = self.graphs = self._seen = None

    def prefill(self, embeds: Sequence[Tensor], keys: np.ndarray) -> PendingTokens:
        """Add groups with prompts `[P_n, H]` and sample the first token of their new sequences."""
        cache = self.cache
        assert cache is not None, "start_sampling() comes first"
        lengths = [len(embed) for embed in embeds]
        hidden = torch.cat(
            [
                self._prefill(torch.cat(list(embeds[batch])), lengths[batch], cache.num_groups + batch.start)
                for batch in prefill_batches(lengths)
            ]
        )
        new = slice(cache.num_sequences, cache.num_sequences + len(keys))
        cache.add_sequences(lengths, keys)
        if self._seen is not None:
            self._seen[new] = False
        # all members of a group sample their first token from one hidden state
        self._sample(hidden.repeat_interleave(cache.group_size, dim=0), new)
        records = self._new_records(1)
        records[0].copy_(cache.record, non_blocking=True)
        return self._pending(records, new)

    def decode(self, steps: int) -> PendingTokens:
        """Sample `steps` tokens for every sequence. Ended sequences repeat their last step."""
        cache, graphs = self.cache, self.graphs
        assert cache is not None, "start_sampling() comes first"
        assert graphs is not None
        records = self._new_records(steps)
        for record in records:
            # whatever a launch depends on beside the contents of buffers; the model may move its embedding table
            key = (cache.batch, cache.group_size, self.options, self.max_new_tokens, self.embedding_address)
            graphs.run(key, self._step)
            record.copy_(cache.record, non_blocking=True)  # before the next step overwrites it, in stream order
        return self._pending(records, slice(cache.num_sequences))

    def worth_dropping(self, sequences: int, unfinished: int) -> bool:
        """Whether the unfinished sequences fit a smaller size of batch."""
        return unfinished == 0 or batch_size(unfinished) < batch_size(sequences)

    def keep(self, sequences: np.ndarray) -> None:
        """Make sequence `sequences[i]` sequence i; drop all others, and groups without sequences."""
        assert self.cache is not None, "start_sampling() comes first"
        if self._seen is not None:
            move(self._seen, sequences, dim=0)
        self.cache.keep(sequences)

    def _new_records(self, steps: int) -> Tensor:
        """Allocate host memory for the records of some steps, pinned on a GPU: the host would wait for other copies."""
        assert self.cache is not None
        record = self.cache.record
        return torch.empty(steps, *record.shape, dtype=record.dtype, pin_memory=record.is_cuda)

    def _pending(self, records: Tensor, sequences: slice) -> PendingTokens:
        """Return what waits for the copies of `records` that have been queued, and reads them."""
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()

        def wait() -> tuple[np.ndarray, np.ndarray]:
            if done is not None:
                done.synchronize()  # for this event alone: later steps run on
            values = records.numpy()[:, :, sequences]
            return values[:, 0].astype(np.int64), values[:, 1].view(np.float32)

        return wait

    def _step(self) -> None:
        """Append every sequence's last token and sample the next one: what a graph captures."""
        cache = self.cache
        assert cache is not None
        batch = slice(cache.batch)
        state = cache.state_of(batch)
        prompt_lengths, arrangement = cache.arrangement()
        groups = len(prompt_lengths)

        def attend(depth: int, qkv: Tensor) -> Tensor:
            prefix, suffix = cache.prefix[depth, :groups], cache.suffix[depth, batch]
            q = self._rotate(depth, qkv, state.position, suffix, state.drawn)
            return group_decode_attention(
                q, prefix[:, 0], prefix[:, 1], prompt_lengths, suffix[:, 0], suffix[:, 1], state.drawn, arrangement
            )

        self._sample(self._layers(self.embed(state.last), attend), batch)

    def _prefill(self, x: Tensor, lengths: list[int], first_slot: int) -> Tensor:
        """Compute packed prompts `[P, H]` into the slots from `first_slot` on.

        Returns:
            `[N, H]`, each prompt's last hidden state after the final norm.
        """
        cache = self.cache
        assert cache is not None
        spans = GroupSpans(lengths, [[]] * len(lengths))  # groups without completions: causal attention per prompt
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(x.device)
        slots = torch.from_numpy(np.repeat(first_slot + np.arange(len(lengths)), lengths)).to(x.device)
        last_tokens = torch.from_numpy(np.cumsum(lengths) - 1).to(x.device)

        def attend(depth: int, qkv: Tensor) -> Tensor:
            q = self._rotate(depth, qkv, positions, cache.prefix[depth], positions + 1, slots)
            _, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            return group_attention(q, k, v, spans)

        return self._layers(x, attend, last_tokens)

    def _layers(self, x: Tensor, attend: Callable[[int, Tensor], Tensor], only: Tensor | None = None) -> Tensor:
        """Run all layers and the final norm over tokens `[T, H]`.

        Args:
            attend: given a layer's depth and its heads `[T, heads + 2 K, D]`, returns `[T, heads, D]`.
            only: int64, the tokens whose hidden states are wanted; all by default.

        Returns:
            `[T, H]`, or `[len(only), H]`.
        """
        # each norm adds the GEMM before it to the residual stream, which so is read and written once
        delta: Tensor = x
        residual: Tensor | None = None
        for depth, layer in enumerate(self.layers):
            hidden, residual = rms_norm(delta, layer.input_norm, self.eps, residual=residual)
            attended = attend(depth, layer.qkv(hidden).view(len(hidden), -1, self.head_dim)).flatten(1)
            if only is not None and depth == len(self.layers) - 1:
                attended, residual = attended[only], residual[only]
            hidden, residual = rms_norm(layer.out(attended), layer.mlp_norm, self.eps, residual=residual)
            delta = layer.down(silu_mul(layer.gate_up(hidden)))
        return rms_norm(delta, self.norm, self.eps, residual=residual)[0]

    def _rotate(
        self, depth: int, qkv: Tensor, positions: Tensor, cache: Tensor, lengths: Tensor, slots: Tensor | None = None
    ) -> Tensor:
        """Rotate queries and keys in place, and write keys and values to the cache; see `rope_append`."""
        layer = self.layers[depth]
        return rope_append(
            qkv,
            self._cos,
            self._sin,
            positions,
            cache[:, 0],
            cache[:, 1],
            lengths,
            cache_rows=slots,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self.eps,
        )

    def _sample(self, hidden: Tensor, sequences: slice) -> None:
        """Sample a token for each of `sequences` from its hidden state; write it to their state and to the record."""
        cache = self.cache
        assert cache is not None
        state = cache.state_of(sequences)
        # kept after a rollout with a penalty, but written and read in such rollouts alone
        seen = self._seen[sequences] if self._seen is not None and self.options.repetition_penalty != 1 else None
        sampled = sample_head(
            hidden,
            cast(Tensor, self.head.weight).t(),  # not packed, so there is one; [V, H] again
            state.key,
            state.drawn,
            self.options,
            bias=self.head.bias,
            seen=seen,
            forbidden=self._never_sampled,
        )
        record_tokens(
            sampled.token,
            sampled.tempered_logprob,
            state,
            self._end,
            self.max_new_tokens,
            cache.record[:, sequences],
            seen=seen,
        )
