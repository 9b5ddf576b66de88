"""`record_tokens` against plain bookkeeping."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import RowState, record_tokens


def test_recording_advances_rows_that_go_on_and_leaves_the_others(backend):
    ended = [0, 0, 0, 1, 0]
    state = RowState(*(torch.tensor(x) for x in ([9] * 5, [0] * 5, [0, 4, 1, 2, 3], [7, 8, 9, 10, 11], ended)))
    end = torch.tensor([False, False, True, False])
    record, seen = torch.full((2, 8), -1, dtype=torch.int32), torch.zeros(5, 4, dtype=torch.bool)
    token = torch.tensor([1, 3, 2, 1, 77])  # a row of NaN draws anything
    logprob = torch.tensor([-0.5, -1.0, -2.0, -3.0, torch.nan])
    record_tokens(token, logprob, state, end, 5, record, seen=seen, backend=backend)
    assert state.last.tolist() == [1, 3, 2, 0, 3]
    assert state.drawn.tolist() == [1, 5, 2, 2, 4]
    assert state.position.tolist() == [8, 9, 10, 10, 12]
    assert state.ended.tolist() == [0, 1, 1, 1, 0]  # going on, length, end token, before, going on
    assert record[0].tolist() == [1, 3, 2, 1, 3, -1, -1, -1]
    torch.testing.assert_close(record[1, :5].view(torch.float32), logprob, equal_nan=True)
    assert seen.nonzero().tolist() == [[0, 1], [1, 3], [2, 2], [4, 3]]


def test_many_rows_are_recorded(backend):
    count = 600
    state = RowState(*torch.zeros(5, count, dtype=torch.int64).unbind())
    record, tokens = torch.zeros(2, count, dtype=torch.int32), torch.arange(count)
    end = torch.zeros(count, dtype=torch.bool)
    record_tokens(tokens, tokens.float(), state, end, 2, record, backend=backend)
    assert torch.equal(state.last, tokens)
    assert torch.equal(record[1].view(torch.float32), tokens.float())
    assert not state.ended.any()


def test_bad_input_is_refused():
    state = RowState(*torch.zeros(5, 3, dtype=torch.int64).unbind())
    tokens, end, record = torch.zeros(3, dtype=torch.int64), torch.zeros(9, dtype=torch.bool), torch.zeros(2, 3).int()
    with pytest.raises(ValueError, match=r"need logprob and each of state \[3\]"):
        record_tokens(tokens, torch.zeros(2), state, end, 5, record)
    with pytest.raises(ValueError, match=r"record \[2, ≥ 3\]"):
        record_tokens(tokens, torch.zeros(3), state, end, 5, record[:, :2])
