"""How caches are compacted."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.rollout.cache import fill_holes


@given(st.lists(st.booleans()))
def test_filling_holes_keeps_the_living_and_moves_no_more_than_the_dead(alive):
    alive = np.array(alive, dtype=bool)
    order = fill_holes(alive)
    assert sorted(order) == list(np.flatnonzero(alive))
    assert (order != np.arange(len(order))).sum() <= (~alive).sum()
