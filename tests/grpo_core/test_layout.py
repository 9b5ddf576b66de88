"""Packing groups on one token axis."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.layout import GroupLayout
from grpo_core.types import Completion, Group, Prompt


def test_a_small_layout_by_hand():
    layout = GroupLayout.pack([[10, 11], [20]], [[[1, 2, 3], []], [[4], [5, 6]]])
    assert layout.token_ids.tolist() == [10, 11, 1, 2, 3, 20, 4, 5, 6]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 1, 2]
    assert layout.target_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert layout.predictor_rows.tolist() == [1, 2, 3, 5, 5, 7]
    assert layout.completion_index.tolist() == [0, 0, 0, 2, 3, 3]
    assert (layout.num_tokens, layout.num_predicted, layout.num_completions) == (9, 6, 4)
    assert layout.spans.prompt_starts == (0, 5)
    assert layout.spans.completion_starts == ((2, 5), (6, 7))


groups = st.lists(
    st.tuples(
        st.lists(st.integers(0, 99), min_size=1, max_size=5),
        st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@given(groups)
def test_every_completion_token_is_predicted_once_by_the_row_before_it(groups):
    layout = GroupLayout.pack([p for p, _ in groups], [c for _, c in groups])
    flat = [(prompt, completion) for prompt, members in groups for completion in members]
    predicted = 0
    for member, (prompt, completion) in enumerate(flat):
        mine = layout.completion_index == member
        assert layout.target_ids[mine].tolist() == completion
        sequence = [*prompt, *completion]
        rows = layout.predictor_rows[mine]
        assert layout.token_ids[rows].tolist() == sequence[len(prompt) - 1 : -1][: len(completion)]
        assert layout.position_ids[rows].tolist() == list(range(len(prompt) - 1, len(sequence) - 1))
        predicted += len(completion)
    assert layout.num_predicted == predicted
    assert layout.num_tokens == sum(len(p) for p, _ in groups) + predicted


def test_groups_are_packed_as_sampled():
    def completion(*ids):
        return Completion(ids, np.zeros(len(ids), np.float32), "stop", "")

    sampled = [Group(Prompt("a", (1, 2)), [completion(3), completion(4, 5)]), Group(Prompt("b", (6,)), [completion(7)])]
    by_hand = GroupLayout.pack([[1, 2], [6]], [[[3], [4, 5]], [[7]]])
    layout = GroupLayout.from_groups(sampled)
    assert layout.spans == by_hand.spans
    assert torch.equal(layout.token_ids, by_hand.token_ids)
    assert layout.per_token([0.5, -1.0, 2.0]).tolist() == [0.5, -1.0, -1.0, 2.0]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Prompt("a", ())
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        GroupLayout.pack([[1], []], [[], []])
