"""Segments as rows on a device, and as few batched calls that cover every query row once."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels.attention.segments import Segments

CPU = torch.device("cpu")


def own(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return Segments(starts, lengths, starts, lengths)


def rows_of(batch):
    rows = batch.query_rows
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[3], [4, 4, 4], [5, 3, 1, 0 + 6, 2, 2, 7], [130, 3, 200, 2, 129]], ids=str)
def test_batches_cover_every_query_row_once_and_in_order(lengths, causal):
    batches, order = own(lengths).batches(CPU, causal)
    covered = torch.cat([rows_of(batch) for batch in batches])
    if order is not None:
        covered = covered[order]
    assert torch.equal(covered, torch.arange(sum(lengths)))


def test_adjacent_segments_of_one_length_are_a_view():
    (batch,), order = own([4, 4, 4]).batches(CPU, True)
    assert (batch.count, batch.query_length, batch.query_rows, batch.valid) == (3, 4, slice(0, 12), None)
    assert order is None


def test_short_lone_segments_share_a_padded_call_only_where_padding_is_not_seen():
    batches, order = own([5, 7, 6]).batches(CPU, True)
    assert [(batch.count, batch.query_length) for batch in batches] == [(3, 7)]
    assert batches[0].valid.view(3, 7).sum(1).tolist() == [5, 7, 6]
    assert order is not None
    batches, _ = own([5, 7, 6]).batches(CPU, False)  # a query would see the padding's keys
    assert [batch.count for batch in batches] == [1, 1, 1]
    batches, _ = own([129, 200]).batches(CPU, True)  # long ones are worth a call each
    assert [batch.count for batch in batches] == [1, 1]


def test_rows_on_a_device_are_slices_where_adjacent_and_cumulative_lengths_are_int32():
    rows = own([3, 2]).on(CPU)
    assert rows.query_rows == slice(0, 5)
    assert rows.query_ends.tolist() == [0, 3, 5]
    assert rows.query_ends.dtype == torch.int32
    apart = Segments([2, 9], [3, 1], [0, 7], [2, 2]).on(CPU)
    assert apart.query_rows.tolist() == [2, 3, 4, 9]
    assert apart.key_rows.tolist() == [0, 1, 7, 8]


def test_the_longest_length_is_never_1():
    assert own([1, 1]).longest == (2, 2)
    assert own([1, 6]).longest == (6, 6)
