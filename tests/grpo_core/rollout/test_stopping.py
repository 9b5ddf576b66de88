"""End tokens and stop strings."""

import numpy as np

from grpo_core.rollout.sampling import StopConditions
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer


def stop_conditions(*strings):
    return StopConditions(make_lm(), CharTokenizer(), strings)


def test_stop_conditions_see_end_tokens_and_strings_over_token_borders():
    stop = stop_conditions("###", "ab")
    tokenizer = CharTokenizer()
    ids = {c: ord(c) - 33 for c in "#abx"}
    assert tokenizer.decode([ids["#"]]) == "#"
    completions = np.array([[ids[c] for c in text] for text in ("x###", "x##x", "xxab", "xxba")])
    lengths = np.full(4, 4)
    rows = np.arange(4)
    assert stop.check(completions[:, -1], completions, rows, lengths).tolist() == [True, False, True, False]
    assert stop.check(np.array([1, 5]), completions, rows[:2], lengths).tolist() == [True, False]
    assert [stop.text(c.tolist()) for c in completions] == ["x", "x##x", "xx", "xxba"]


def test_every_end_token_of_the_generation_config_ends():
    lm = make_lm()
    lm.generation_config.eos_token_id = [7, 9]
    end = StopConditions(lm, CharTokenizer(), ()).end_tokens
    assert np.flatnonzero(end).tolist() == [1, 7, 9]  # 1 is the tokenizer's
