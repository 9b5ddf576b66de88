"""Where prompts and completions lie on the packed axis, and which rows attend to which."""

from __future__ import annotations

import pytest

from grpo_kernels import GroupSpans


def test_rows_are_packed_group_by_group():
    spans = GroupSpans([5, 1, 3], [[3, 0, 6], [2], []])
    assert spans.prompt_starts == (0, 14, 17)
    assert spans.completion_starts == ((5, 8, 8), (15,), ())
    assert spans.total == 20


def test_every_row_is_a_query_once_over_its_own_segment():
    segments = GroupSpans([5, 1], [[3, 0], [2]]).self_segments
    assert segments.query_starts == segments.key_starts == (0, 5, 8, 9)
    assert segments.query_lengths == segments.key_lengths == (5, 3, 1, 2)


def test_completions_of_a_group_see_their_prompt_as_one_block():
    spans = GroupSpans([5, 4, 1], [[3, 2], [0, 0], [2]])
    over = spans.prompt_segments
    assert (over.query_starts, over.query_lengths) == ((5, 15), (5, 2))  # a group without completion tokens has none
    assert (over.key_starts, over.key_lengths) == ((0, 14), (5, 1))
    assert len(GroupSpans([4], [[]]).prompt_segments) == 0


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
