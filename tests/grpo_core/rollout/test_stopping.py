"""End tokens and stop strings."""

import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.rollout.sampling import StopConditions
from grpo_core.types import Prompt
from tests.conftest import CHAT_TEMPLATE, make_tokenizer
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


def with_holes() -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 and 20, where 20 ends; the model has 32 rows or more."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 20}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


def test_ids_that_a_tokenizer_with_holes_has_are_drawn_and_no_others():
    lm = make_lm(vocab_size=32, eos_token_id=20)
    stop = StopConditions(lm, with_holes(), ())
    assert stop.no_tokens.tolist() == [i for i in range(32) if i not in (0, 1, 2, 20)]
    prompts = [Prompt(f"p{i}", (0, 1, 2, i % 3)) for i in range(4)]
    rollout = RolloutConfig(group_size=16, max_new_tokens=12)
    groups = GroupSampler(Policy(lm), with_holes()).sample(prompts, rollout)
    drawn = {token for group in groups for c in group.completions for token in c.token_ids}
    assert drawn == {0, 1, 2, 20}
    ended = [c for group in groups for c in group.completions if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids[-1] == 20 and 20 not in c.token_ids[:-1] for c in ended)


def test_stop_strings_are_found_above_the_number_of_tokens():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "stop": 17}, unk_token="a"))
    stop = StopConditions(make_lm(), PreTrainedTokenizerFast(tokenizer_object=words), ("stop",))
    tokens = np.array([[0, 17], [0, 0]])
    assert stop.check(tokens[:, 1], tokens, np.arange(2), np.full(2, 2)).tolist() == [True, False]


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tagged(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "unk_token": "<unk>"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.mark.parametrize("special", [(), TAGS, ("<think>", "<answer>"), (*TAGS, "</s>", "<tool>", "</tool>")])
def test_tags_stay_in_the_text_whether_they_are_special_tokens_or_not(special):
    tokenizer = tagged(*special)
    lm = make_lm(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    text = "<think>why</think><answer>sad</answer>"
    ids = tokenizer(f"<s>{text}<|endoftext|><unk><|im_end|>", add_special_tokens=False).input_ids
    assert StopConditions(lm, tokenizer, ()).text(ids) == text
    stop = StopConditions(lm, tokenizer, ("</answer>",))
    assert stop.text(ids) == text.removesuffix("</answer>")
    completions = np.array([tokenizer(text, add_special_tokens=False).input_ids])
    length = completions.shape[1]
    assert stop.check(completions[:, -1], completions, np.arange(1), np.array([length])).tolist() == [True]
    assert stop.check(completions[:, 3], completions, np.arange(1), np.array([4])).tolist() == [False]


def test_only_special_tokens_that_mark_a_part_of_an_answer_stay():
    tokenizer = tagged(*TAGS, "<tool>", "</tool>", "<fim_middle>", "<|vision|>", "[INST]")
    lm = make_lm(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ids = tokenizer("<tool>x</tool><fim_middle><|vision|>[INST]<|im_start|>y", add_special_tokens=False).input_ids
    assert StopConditions(lm, tokenizer, ()).text(ids) == "<tool>x</tool>y"
    # what a stop string is made of is seen, and cut off with it
    assert StopConditions(lm, tokenizer, ("<|vision|>",)).text(ids) == "<tool>x</tool>"
    ended = StopConditions(lm, tokenizer, (), end_tokens=[tokenizer.convert_tokens_to_ids("</tool>")])
    assert ended.text(ids) == "<tool>xy"  # an end token is none of them


def test_more_end_tokens_can_be_given():
    lm = make_lm()
    assert np.flatnonzero(StopConditions(lm, CharTokenizer(), (), end_tokens=(5,)).end_tokens).tolist() == [1, 5]
    rollout = RolloutConfig(group_size=32, max_new_tokens=40)
    (group,) = GroupSampler(Policy(lm), CharTokenizer(), end_tokens=range(90)).sample([Prompt("p", (3, 4))], rollout)
    assert {len(c.token_ids) for c in group.completions if c.token_ids[0] < 90} == {1}


def test_what_a_template_opened_stands_before_the_answer():
    prompts = [Prompt("a", (3, 4)), Prompt("a", (3, 4), opened="<think>\n")]
    rollout = RolloutConfig(group_size=3, max_new_tokens=5)
    plain, opened = GroupSampler(Policy(make_lm()), CharTokenizer()).sample(prompts, rollout)
    for a, b in zip(plain.completions, opened.completions, strict=True):
        assert b.token_ids == a.token_ids
        assert b.text == "<think>\n" + a.text


@pytest.mark.parametrize(
    ("template", "eos", "words"),
    [
        (None, "<|endoftext|>", r"none ended with '<\|endoftext\|>' \(0\): raise rollout.max_new_tokens"),
        (
            CHAT_TEMPLATE,
            "<|endoftext|>",
            r"end with '<\|endoftext\|>' \(0\), but the chat template ends a turn with '<\|im_end\|>' \(2\)",
        ),
        (None, None, "no token that can be drawn ends one"),
    ],
)
def test_why_no_completion_ends_is_said(template, eos, words):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    lm = make_lm(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    assert re.search(words, GroupSampler(Policy(lm), tokenizer).why_none_ends())
