"""Where prompts and completions lie on the packed axis, which rows attend to which, and in how many calls."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import GroupSpans
from grpo_kernels.attention.spans import Segments

CPU = torch.device("cpu")


def test_rows_are_packed_group_by_group():
    spans = GroupSpans([5, 1, 3], [[3, 0, 6], [2], []])
    assert spans.prompt_starts == (0, 14, 17)
    assert spans.completion_starts == ((5, 8, 8), (15,), ())
    assert spans.total == 20


def test_every_row_is_a_query_once_over_its_own_segment():
    segments = GroupSpans([5, 1], [[3, 0], [2]]).self_segments
    assert segments.queries == segments.keys == ((0, 5), (5, 3), (8, 1), (9, 2))
    assert segments.causal


def test_completions_of_a_group_see_their_prompt_as_one_block():
    segments = GroupSpans([5, 4, 1], [[3, 2], [0, 0], [2]]).prompt_segments
    assert segments.queries == ((5, 5), (15, 2))  # a group without completion tokens has none
    assert segments.keys == ((0, 5), (14, 1))
    assert not segments.causal
    assert GroupSpans([4], [[]]).prompt_segments is None


def test_spans_of_equal_lengths_are_equal_and_hashable():
    assert GroupSpans([5], [[3, 2]]) == GroupSpans((5,), ((3, 2),))
    assert len({GroupSpans([5], [[3, 2]]), GroupSpans([5], [[3, 2]]), GroupSpans([5], [[3]])}) == 2


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        ([5, 3], [[1]], "2 prompt lengths but completions of 1 groups"),
        ([5, 0], [[1], [1]], "prompt 1 is empty"),
        ([5], [[1, -2]], "group 0 has a negative completion length"),
    ],
)
def test_bad_input_is_refused(prompts, completions, says):
    with pytest.raises(ValueError, match=says):
        GroupSpans(prompts, completions)


def over_themselves(lengths, causal=True):
    ranges = tuple((sum(lengths[:i]), length) for i, length in enumerate(lengths))
    return Segments(ranges, ranges, causal)


def rows_of(batch):
    rows = batch.query_rows
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[3], [4, 4, 4], [5, 3, 1, 0 + 6, 2, 2, 7], [130, 3, 200, 2, 129]], ids=str)
def test_batches_cover_every_query_row_once_and_in_order(lengths, causal):
    batches, order = over_themselves(lengths, causal).batches(CPU)
    covered = torch.cat([rows_of(batch) for batch in batches])
    if order is not None:
        covered = covered[order]
    assert torch.equal(covered, torch.arange(sum(lengths)))


def test_adjacent_segments_of_one_length_are_a_view():
    (batch,), order = over_themselves([4, 4, 4]).batches(CPU)
    assert (batch.count, batch.query_rows, batch.key_rows, batch.valid) == (3, slice(0, 12), slice(0, 12), None)
    assert order is None


def test_short_lone_segments_share_a_padded_call_only_where_padding_is_not_seen():
    batches, order = over_themselves([5, 7, 6]).batches(CPU)
    (batch,) = batches
    assert batch.valid.view(batch.count, 7).sum(1).tolist() == [5, 7, 6]
    assert batch.query_rows.view(3, 7)[2].tolist() == [12, 13, 14, 15, 16, 17, 17]  # the last row again
    assert order is not None
    batches, _ = over_themselves([5, 7, 6], causal=False).batches(CPU)  # a query would see the padding's keys
    assert [batch.count for batch in batches] == [1, 1, 1]
    batches, _ = over_themselves([129, 200]).batches(CPU)  # long ones are worth a call each
    assert [batch.count for batch in batches] == [1, 1]


def test_rows_on_a_device_are_slices_where_adjacent_and_cumulative_lengths_are_int32():
    queries, keys = over_themselves([3, 2]).on(CPU)
    assert queries.rows == keys.rows == slice(0, 5)
    assert queries.ends.tolist() == [0, 3, 5]
    assert queries.ends.dtype == torch.int32
    queries, keys = Segments(((2, 3), (9, 1)), ((0, 2), (7, 2)), causal=False).on(CPU)
    assert queries.rows.tolist() == [2, 3, 4, 9]
    assert keys.rows.tolist() == [0, 1, 7, 8]
    assert (queries.longest, keys.longest) == (3, 2)


def test_the_longest_length_is_never_1():
    assert [side.longest for side in over_themselves([1, 1]).on(CPU)] == [2, 2]
    assert [side.longest for side in over_themselves([1, 6]).on(CPU)] == [6, 6]
