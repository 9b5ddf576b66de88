"""The end of a decode step: note what each row drew, and bring the rows' counters to the next step.

Everything the next step reads is in device memory, so a step can be captured once and replayed: the last token, how
many were drawn (the counter of the next draw), the position of the next token, and whether the row has ended. A row
that has ended keeps its counters: it repeats its last step, writes the same keys and values to the same place, and
grows no more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, tl, triton

BLOCK = 256
"""Rows of a program of `record_tokens_kernel`."""


class RowState(NamedTuple):
    """What a decode step reads and writes of each of B rows, int64 `[B]` each."""

    key: Tensor
    """64-bit key of the row's random numbers; never written."""
    last: Tensor
    """The token drawn last, which the next step appends."""
    drawn: Tensor
    """Tokens drawn so far."""
    position: Tensor
    """Of the last token in its sequence."""
    ended: Tensor
    """1 once an end token or the length limit has come."""


@triton.jit
def record_tokens_kernel(
    # data
    token,  # [B], as the next one: what was drawn
    logprob,
    last,  # [B], as the next three: `RowState`
    drawn,
    position,
    ended,
    end,  # [V] bytes
    record,  # [2, ≥ B]
    seen,  # [B, V] bytes; any pointer without SEEN
    # shapes and strides
    B,
    V,
    limit,
    record_row,
    seen_row,
    # what to do, and the block
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Record BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < B
    new = tl.load(token + row, live, other=0)
    new = tl.minimum(tl.maximum(new, 0), V - 1)  # the draw from a row of NaN may be anything
    going = live & (tl.load(ended + row, live, other=1) == 0)
    count = tl.load(drawn + row, live, other=0) + 1
    tl.store(record + row, new.to(tl.int32), live)
    # tokens and the bits of their log-probs share one int32 tensor, so that the host fetches both with one copy
    tl.store(record + record_row + row, tl.load(logprob + row, live, other=0.0).to(tl.int32, bitcast=True), live)
    tl.store(last + row, new, going)
    tl.store(drawn + row, count, going)
    tl.store(position + row, tl.load(position + row, live, other=0) + 1, going)
    over = (tl.load(end + new, live, other=0) != 0) | (count >= limit)
    tl.store(ended + row, over.to(tl.int64), going)
    if SEEN:
        tl.store(seen + row.to(tl.int64) * seen_row + new, 1, going)


def record_tokens(
    token: Tensor,
    logprob: Tensor,
    state: RowState,
    end: Tensor,
    limit: int,
    record: Tensor,
    *,
    seen: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Write B rows' new tokens into `state`, `record` and `seen`.

    Args:
        token: int64 `[B]`; logprob: float32 `[B]`.
        state: of the rows, changed in place.
        end: bool `[V]`, tokens that end a row.
        limit: tokens after which a row ends.
        record: int32 `[2, ≥ B]`: the tokens, and the log-probs' bits. Written for ended rows too.
        seen: bool `[B, V]`, tokens that the repetition penalty is for.

    Raises:
        ValueError: shapes do not fit each other.
    """
    batch, vocabulary = len(token), len(end)
    if any(x.shape != (batch,) for x in (logprob, *state)) or record.dim() != 2 or record.shape[1] < batch:
        lengths = {"logprob": len(logprob)} | {name: len(x) for name, x in state._asdict().items()}
        raise ValueError(
            f"token has {batch} rows: need logprob and each of state [{batch}], and record [2, ≥ {batch}], got "
            f"{lengths} and {list(record.shape)}"
        )
    if choose_backend(token.device, backend, logprob.dtype) == "torch":
        record_tokens_reference(token, logprob, state, end, limit, record, seen=seen)
        return
    record_tokens_kernel[(triton.cdiv(batch, BLOCK),)](
        token=token,
        logprob=logprob,
        last=state.last,
        drawn=state.drawn,
        position=state.position,
        ended=state.ended,
        end=end.view(torch.uint8),
        record=record,
        seen=record if seen is None else seen.view(torch.uint8),
        B=batch,
        V=vocabulary,
        limit=limit,
        record_row=record.stride(0),
        seen_row=0 if seen is None else seen.stride(0),
        SEEN=seen is not None,
        BLOCK=BLOCK,
    )


def record_tokens_reference(
    token: Tensor,
    logprob: Tensor,
    state: RowState,
    end: Tensor,
    limit: int,
    record: Tensor,
    *,
    seen: Tensor | None = None,
) -> None:
    """`record_tokens` in plain torch."""
    batch = len(token)
    new, going = token.clamp(0, len(end) - 1), state.ended == 0
    record[0, :batch] = new
    record[1, :batch] = logprob.view(torch.int32)
    state.last.copy_(torch.where(going, new, state.last))
    state.drawn.add_(going)
    state.position.add_(going)
    if seen is not None:
        seen.scatter_(1, new[:, None], seen.gather(1, new[:, None]) | going[:, None])
    state.ended.copy_(torch.where(going, (end[new] | (state.drawn >= limit)).long(), state.ended))
