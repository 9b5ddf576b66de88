"""Decoding by Triton kernels: six launches a layer beside its four GEMMs, sampling included, replayed as CUDA graphs.

A step reads and writes nothing but device memory at fixed addresses: the caches, the rows' state, their arrangement.
The host only says which size of batch is next, and looks at the tokens some steps later. A batch is filled up to one of
a few sizes with rows that belong to no group and have ended, so that few graphs are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.rollout.backends.torch import PREFILL_TOKENS, FlatModel
from grpo_core.rollout.cache import CacheShape, GroupCache, move
from grpo_core.rollout.cuda_graphs import StepGraphs
from grpo_core.rollout.sampling import Drawn, DrawRules
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
from grpo_kernels._backend import choose_backend

_KEPT_SHARE = 8
"""Caches of at most 1/8 of the device's memory are kept between rollouts, and their graphs with them."""
_NO_ROW = (0, 0, 1, 0, 1)
"""`RowState` of a row that only fills up a batch: ended, one token drawn."""


def bucket(rows: int) -> int:
    """The size of batch that `rows` rows run in: 8, 16, 32, 64, then two sizes an octave (96, 128, 192, …)."""
    size = 8
    while size < rows:
        size *= 2
    return size * 3 // 4 if size > 64 and rows <= size * 3 // 4 else size


class KernelCache(GroupCache):
    """A cache whose lengths and arrangement kernels read on the device.

    Attributes:
        state: int64 `[5, rows]`, the fields of `RowState`.
        batch: the size of batch that live rows run in; the rows behind them belong to no group and have ended.
    """

    def __init__(self, shape: CacheShape, slots: int, group_size: int, prompt_tokens: int, new_tokens: int,
                 device: torch.device):  # fmt: skip
        rows = bucket(slots * group_size)
        super().__init__(shape, slots, rows, group_size, prompt_tokens, new_tokens, device)
        self.state = torch.tensor(_NO_ROW, device=device)[:, None].repeat(1, rows)
        self.record = torch.zeros(2, rows, dtype=torch.int32, device=device)
        index = dict(dtype=torch.int32, device=device)
        self._prompt_lengths = torch.zeros(slots, **index)
        self._order, self._group_of_row = torch.zeros(rows, **index), torch.zeros(rows, **index)
        self._starts = torch.zeros(slots + 1, **index)
        self.batch = 0

    def fits(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether there is room for such a rollout."""
        return (
            slots <= self.prefix.shape[1]
            and bucket(slots * group_size) <= self.suffix.shape[1]
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

    def admit(self, lengths: list[int], keys: np.ndarray) -> None:
        """Open slots for prompts of these lengths, with rows of these random keys that have drawn nothing."""
        before = self.rows
        self.add_groups(lengths)
        first = np.zeros((5, len(keys)), dtype=np.int64)
        first[0] = keys.view(np.int64)
        first[3] = np.repeat(lengths, self.group_size) - 1
        self.state[:, before : self.rows] = torch.from_numpy(first).to(self.state.device)
        self._arrange()

    def keep(self, rows: np.ndarray) -> None:
        before = self.rows
        super().keep(rows)
        move(self.state, rows, dim=1)
        self.state[:, self.rows : before] = torch.tensor(_NO_ROW, device=self.state.device)[:, None]
        self._arrange()

    def live(self, rows: slice) -> RowState:
        """The state of some rows, as views."""
        return RowState(*self.state[:, rows].unbind())

    def arrangement(self) -> tuple[Tensor, GroupRows]:
        """The groups' prompt lengths, and the batch's rows among them; all views of what `_arrange` writes."""
        groups = min(self.prefix.shape[1], self.batch)
        rows = GroupRows(
            self._order[: self.batch], self._starts[: groups + 1], self._group_of_row[: self.batch], self.group_size
        )
        return self._prompt_lengths[:groups], rows

    def _arrange(self) -> None:
        self.batch = bucket(self.rows)
        slots, device = self.prefix.shape[1], self.prefix.device
        order = np.argsort(self.group_of_row, kind="stable")
        starts = np.searchsorted(self.group_of_row[order], np.arange(slots + 1))
        filling = np.arange(self.rows, self.batch)
        for buffer, values in (
            (self._order[: self.batch], np.r_[order, filling]),
            (self._group_of_row[: self.batch], np.r_[self.group_of_row, np.full_like(filling, -1)]),
            (self._starts, starts),
            (self._prompt_lengths[: self.groups], np.array(self.prefix_lengths)),
        ):
            buffer.copy_(torch.from_numpy(values.astype(np.int32)).to(device))


class KernelDecoder(FlatModel):
    """`Decoder` of a model whose family `FlatModel` knows, on a GPU (or in Triton's interpreter).

    Args:
        model: the causal LM without its outer PEFT wrapper; adapters inside are merged at `refresh`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, packed=False)
        self.cache: KernelCache | None = None

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model is one of the four families, and on a device that runs kernels."""
        weight = model.get_input_embeddings().weight
        kernels = choose_backend(weight.device, None, weight.dtype) == "triton"
        return kernels and FlatModel.supports(model) and model.config.hidden_act == "silu"

    @property
    def held_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def plan(self, groups: int, group_size: int, prompt_tokens: int, new_tokens: int, budget: int) -> int:
        cache = GroupCache.bytes_per_group(self.shape, group_size, prompt_tokens, new_tokens)
        logits = 2 * 4 * self.vocabulary * group_size  # where truncation wants them, with what it makes of them
        # a layer's activations while prompts are prefilled: three of the MLP's width, and two of QKV and hidden size
        widths = 3 * self.weights.layers[0].gate_up.weight.shape[1] + 4 * self.weights.norm.weight.shape[0]
        widths += 2 * self.weights.layers[0].qkv.weight.shape[1]
        prefill = min(PREFILL_TOKENS + prompt_tokens, groups * prompt_tokens) * widths * self.shape.dtype.itemsize
        return max(1, min(groups, (budget - prefill) // (cache + logits)))

    def reserve(self, slots: int, group_size: int, prompt_tokens: int, new_tokens: int) -> None:
        if self.cache is None or not self.cache.fits(slots, group_size, prompt_tokens, new_tokens):
            self.release()
            device = self.weights.norm.weight.device
            self.cache = KernelCache(self.shape, slots, group_size, prompt_tokens, new_tokens, device)
            self.graphs = StepGraphs(device)
            self._cos, self._sin = self._rotations(self.cache.prefix.shape[4] + self.cache.suffix.shape[4])
            self._end = torch.zeros(self.weights.head.weight.shape[1], dtype=torch.bool, device=device)
            self._forbidden = torch.zeros_like(self._end)
            self._seen: Tensor | None = None
        self.cache.clear(group_size)

    def release(self, reuse: bool = False) -> None:
        if reuse and self._may_keep():
            return
        self.cache = self.graphs = self._seen = None

    def drawer(self, rules: DrawRules) -> KernelDrawer:
        vocabulary = len(self._end)
        self._end.copy_(torch.from_numpy(rules.end[:vocabulary]))
        forbidden = np.arange(vocabulary) >= rules.limit
        forbidden[[token for token in rules.forbidden if 0 <= token < vocabulary]] = True
        self._forbidden.copy_(torch.from_numpy(forbidden))
        if rules.rollout.repetition_penalty != 1:
            rows = self.cache.suffix.shape[1]
            if self._seen is None:
                self._seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=self._end.device)
            self._seen.zero_()
        return KernelDrawer(self, rules)

    def prefill(self, embeds: Sequence[Tensor], keys: np.ndarray, options: SampleOptions, limit: int) -> slice:
        """Add groups, and draw the first token of each of their rows: which rows those are."""
        lengths = [len(embed) for embed in embeds]
        first_slot, first_row = self.cache.groups, self.cache.rows
        hidden = torch.cat(
            [
                self._prefill(torch.cat(list(embeds[part])), lengths[part], first_slot + part.start)
                for part in self._parts(lengths)
            ]
        )
        self.cache.admit(lengths, keys)
        rows = slice(first_row, self.cache.rows)
        if options.repetition_penalty != 1:
            self._seen[rows] = False
        self._draw(hidden.repeat_interleave(self.cache.group_size, dim=0), rows, options, limit)
        return rows

    def step(self, options: SampleOptions, limit: int) -> None:
        """Append every row's last token and draw the next one."""
        cache = self.cache
        kind = (cache.batch, cache.group_size, options, limit, self.weights.embedding_address)
        self.graphs.run(kind, lambda: self._step(options, limit))

    def keep(self, rows: np.ndarray) -> None:
        if self._seen is not None:
            move(self._seen, rows, dim=0)
        self.cache.keep(rows)

    def _may_keep(self) -> bool:
        device = self.weights.norm.weight.device
        if device.type != "cuda":
            return True
        return self.held_bytes * _KEPT_SHARE <= torch.cuda.get_device_properties(device).total_memory

    def _step(self, options: SampleOptions, limit: int) -> None:
        cache = self.cache
        rows = slice(cache.batch)
        state = cache.live(rows)
        prompt_lengths, arrangement = cache.arrangement()
        groups = len(prompt_lengths)

        def attend(depth: int, qkv: Tensor) -> Tensor:
            suffix = cache.suffix[depth, rows]
            q = self._rotate(depth, qkv, state.position, suffix, state.drawn)
            prefix = cache.prefix[depth, :groups]
            return group_decode_attention(
                q, prefix[:, 0], prefix[:, 1], prompt_lengths, suffix[:, 0], suffix[:, 1], state.drawn, arrangement
            )

        self._draw(self._layers(self.weights.embed(state.last), attend), rows, options, limit)

    def _prefill(self, x: Tensor, lengths: list[int], first_slot: int) -> Tensor:
        """Packed prompts `[T, H]` into the slots from `first_slot` on: normed hidden states `[N, H]` at their ends."""
        spans = GroupSpans(lengths, [[]] * len(lengths))
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(x.device)
        slots = torch.from_numpy(np.repeat(first_slot + np.arange(len(lengths)), lengths)).to(x.device)
        ends = torch.from_numpy(np.cumsum(lengths) - 1).to(x.device)

        def attend(depth: int, qkv: Tensor) -> Tensor:
            q = self._rotate(depth, qkv, positions, self.cache.prefix[depth], positions + 1, slots)
            _, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            return group_attention(q, k, v, spans)

        return self._layers(x, attend, ends)

    def _layers(self, x: Tensor, attend: Callable[[int, Tensor], Tensor], only: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm of rows `[T, H]`; with `only`, of these rows."""
        delta, residual = x, None
        for depth, layer in enumerate(self.weights.layers):
            hidden, residual = rms_norm(delta, layer.input_norm.weight, self.eps, residual=residual)
            attended = attend(depth, layer.qkv(hidden).view(len(hidden), -1, self.head_dim)).flatten(1)
            if only is not None and depth == len(self.weights.layers) - 1:
                attended, residual = attended[only], residual[only]
            hidden, residual = rms_norm(layer.out(attended), layer.mlp_norm.weight, self.eps, residual=residual)
            delta = layer.down(silu_mul(layer.gate_up(hidden)))
        return rms_norm(delta, self.weights.norm.weight, self.eps, residual=residual)[0]

    def _rotate(
        self, depth: int, qkv: Tensor, positions: Tensor, cache: Tensor, lengths: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        layer = self.weights.layers[depth]
        norms = {} if layer.q_norm is None else {"q_norm": layer.q_norm.weight, "k_norm": layer.k_norm.weight}
        return rope_append(
            qkv, self._cos, self._sin, positions, cache[:, 0], cache[:, 1], lengths,
            cache_rows=rows, eps=self.eps, **norms,
        )  # fmt: skip

    def _draw(self, hidden: Tensor, rows: slice, options: SampleOptions, limit: int) -> None:
        """A token for each of `rows` from its normed hidden state, noted in their state and in the record."""
        state, head = self.cache.live(rows), self.weights.head
        seen = self._seen[rows] if options.repetition_penalty != 1 else None
        drawn = sample_head(
            hidden, head.weight.t(), state.key, state.drawn, options,
            bias=head.bias, seen=seen, forbidden=self._forbidden,
        )  # fmt: skip
        record = self.cache.record[:, rows]
        record_tokens(drawn.token, drawn.tempered_logprob, state, self._end, limit, record, seen=seen)


class KernelDrawer:
    """`Drawer` over a `KernelDecoder`: tokens are drawn on the device, and read while later steps run."""

    steps_per_read = 4
    lag = 1

    def __init__(self, decoder: KernelDecoder, rules: DrawRules):
        rollout = rules.rollout
        self.decoder, self.limit = decoder, rollout.max_new_tokens
        self.options = SampleOptions(
            rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p, rollout.repetition_penalty
        )

    def admit(self, embeds: Sequence[Tensor], keys: np.ndarray) -> Drawn:
        rows = self.decoder.prefill(embeds, keys, self.options, self.limit)
        copies = self._host(1)
        copies[0].copy_(self.decoder.cache.record, non_blocking=True)
        return self._read(copies, rows)

    def advance(self, steps: int) -> Drawn:
        copies = self._host(steps)
        for copy in copies:
            self.decoder.step(self.options, self.limit)
            copy.copy_(self.decoder.cache.record, non_blocking=True)
        return self._read(copies, slice(self.decoder.cache.rows))

    def shrinks(self, rows: int, left: int) -> bool:
        return left == 0 or bucket(left) < bucket(rows)

    def keep(self, rows: np.ndarray) -> None:
        self.decoder.keep(rows)

    def _host(self, steps: int) -> Tensor:
        """Room for the records of some steps, pinned where copies run beside the host."""
        record = self.decoder.cache.record
        return torch.empty(steps, *record.shape, dtype=record.dtype, pin_memory=record.is_cuda)

    def _read(self, copies: Tensor, rows: slice) -> Drawn:
        done = torch.cuda.Event() if self.decoder.cache.record.is_cuda else None
        if done is not None:
            done.record()

        def wait() -> tuple[np.ndarray, np.ndarray]:
            if done is not None:
                done.synchronize()
            records = copies.numpy()[:, :, rows]
            return records[:, 0].astype(np.int64), records[:, 1].view(np.float32)

        return wait
