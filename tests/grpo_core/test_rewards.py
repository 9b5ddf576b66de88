"""Scores of several rewards: not to be judged is no punishment, and what goes wrong costs its completion alone."""

import asyncio
import inspect
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

from grpo_core.algorithm.advantages import group_advantages
from grpo_core.reward_adapters import adapt_reward, load_reward
from grpo_core.rewards import MOST_TIMEOUTS, RewardOutput, TimeLimit, ask, check_reward_weights, score
from grpo_core.types import Completion, Group, Prompt

NAN = float("nan")


def groups(count=2, size=2, **columns):
    """Groups `p0`, `p1`, … whose completions say `0a`, `0b`, `1a`, …"""

    def completion(text):
        return Completion(tuple(range(3)), np.zeros(3, np.float32), "stop", text)

    return [
        Group(
            Prompt(f"p{n}", (1, 2), {"audio": torch.ones(2, 3)}, {"prompt": f"q{n}", "wanted": [1, 2], **columns}),
            [completion(f"{n}{'abcd'[m]}") for m in range(size)],
        )
        for n in range(count)
    ]


def fixed(table, name="fixed"):
    """A reward that gives a table."""
    return adapt_reward(lambda groups: table, name)


def scored(rewards, asked=None, *, timeout=0.0, **weights):
    asked = groups() if asked is None else asked
    return score(asked, rewards, weights, group_size=len(asked[0].completions), timeout=timeout)


def load(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(inspect.cleandoc(source))
    return load_reward(f"{path}:reward")


# --- several rewards ---------------------------------------------------------------------------------------------


def test_a_member_that_one_reward_could_not_judge_is_compared_on_what_the_others_say():
    accuracy = fixed([[0.6, 0.6, 0.6, NAN], [0.2, 0.4, NAN, NAN], [NAN] * 4, [NAN, 0.9, NAN, NAN]], "accuracy")
    format_ = fixed([[1.0] * 4, [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], "format")
    scores = scored([accuracy, format_], groups(4, 4))
    np.testing.assert_allclose(scores.total[0], [1.6] * 4, rtol=0)  # today 1.6, 1.6, 1.6, 1.0
    np.testing.assert_allclose(scores.total[1], [1.2, 1.4, 1.3, 0.3])
    np.testing.assert_allclose(scores.total[2], [1, 0, 0, 0])
    assert scores.signal.tolist() == [False, True, True, False]  # of the last one, one member alone is judged
    advantages = group_advantages(scores.total)
    assert (advantages[[0, 3]] == 0).all()
    # the third member has the mean accuracy and the better format, the fourth the worse: one is judged on the format
    centred = scores.total[1] - scores.total[1].mean()
    np.testing.assert_allclose(advantages[1], centred / (scores.total[1].std(ddof=1) + 1e-4))


def test_what_no_reward_judged_stays_out():
    scores = scored([fixed([[NAN, 1], [NAN, NAN]], "a"), fixed([[NAN, 3], [NAN, 2]], "b")], b=0.5)
    np.testing.assert_array_equal(scores.total, [[NAN, 2.5], [NAN, 1]])
    assert not scores.signal.any()


def test_a_reward_of_weight_zero_gives_no_signal_of_its_own():
    table = [[0.0, 1.0], [2.0, 2.0]]
    each = score(groups(), [fixed(table, "off")], {"off": 0.0}, group_size=2, each_reward=True)
    assert each.signal.tolist() == [False, False]
    assert score(groups(), [fixed(table, "on")], {}, group_size=2, each_reward=True).signal.tolist() == [True, False]


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"algorithm.reward_weights.a is inf: give a finite number"):
        check_reward_weights([fixed([], "a")], {"a": float("inf")})


# --- failures ----------------------------------------------------------------------------------------------------

BUGS = {
    "raises": ('int("x")', r"ValueError: invalid literal for int\(\) .*mine\.py:\d+, `.*int\(\"x\"\)"),
    "missing_file": ('open("/no/such/file").read()', r"FileNotFoundError: .*/no/such/file.*mine\.py:\d+"),
    "exits": ("sys.exit(0)", r"it called sys.exit\(0\) .*mine\.py:\d+, `.*sys\.exit\(0\)"),
    "text": ('"0.5"', r"it returned '0.5': return a number, or None .*mine\.py:\d+"),
    "bytes": ('b"1"', "it returned b'1'"),
    "list": ("[1.0]", r"it returned \[1.0\]"),
    "complex": ("1j", "it returned 1j"),
    "tensor": ("torch.ones(2)", r"it returned tensor\(\[1., 1.\]\)"),
    "object": ("object()", "it returned <object"),
    "infinite": ('float("inf")', "it returned inf: return a finite number, or NaN"),
    "too_large": ("-1e200", "it returned -1e\\+200"),
    "assertion": ("check(False)", r"AssertionError: .*mine\.py:\d+"),
}
FORMS = {
    "completion": """
        def reward(completion):
            return (BUG) if completion == "1a" else 7
        """,
    "async": """
        async def reward(completion):
            return (BUG) if completion == "1a" else 7
        """,
    "trl": """
        def reward(completions, **kwargs):
            return [(BUG) if text == "1a" else 7 for text in completions]
        """,
    "groups": """
        def reward(groups):
            return [[(BUG) if c.text == "1a" else 7 for c in group.completions] for group in groups]
        """,
}
HEAD = "import sys, torch\ndef check(x):\n    assert x\n"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_costs_the_completion_and_is_named_with_its_line(tmp_path, form, bug):
    code, message = BUGS[bug]
    reward = load(tmp_path, HEAD + inspect.cleandoc(FORMS[form]).replace("BUG", code))
    scores = scored([reward, fixed([[1, 2], [3, 4], [5, 6]], "other")], groups(3))
    failures = scores.failures["reward"]
    assert not scores.failures["other"]
    lost = {(failure.group, failure.member) for failure in failures}
    # a reward that raises in a call for many gives none of them; its group alone is lost
    whole_group = form in ("trl", "groups") and bug in ("raises", "missing_file", "exits", "assertion")
    assert lost == ({(1, 0), (1, 1)} if whole_group else {(1, 0)})
    table = np.full((3, 2), 7.0)
    table[tuple(np.transpose(sorted(lost)))] = NAN
    np.testing.assert_array_equal(scores.by_reward[0], table)
    text = failures[0].problem
    assert re.search(message, text), text
    assert "mine.py" in text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda groups: [1.0] * len(groups), r"it returned shape \(\d,\) for \d groups of 2 completions .*py:\d+"),
        (lambda groups: None, r"it returned shape \(\) for"),
        (lambda groups: [[1.0]] * len(groups), r"it returned shape \(\d, 1\)"),
        (lambda completions, **kwargs: [1.0], r"it returned 1 values for [24] completions"),
        (lambda completions, **kwargs: 1.0, r"TypeError"),
        (lambda completions, **kwargs: (1.0 for _ in completions), r"TypeError"),
        (lambda completions, log_extra: log_extra("x", [1]) or [0] * len(completions), r"logged 1 values of 'x'"),
        (lambda groups: RewardOutput(np.ones((len(groups), 2)), {}, {"x": [1]}), r"logged 1 values of 'x'"),
        (lambda groups: RewardOutput(np.ones((len(groups), 2)), {"m": ["a"]}), r"could not convert string"),
    ],
)
def test_a_result_of_another_shape_is_refused_with_the_place_where_the_reward_is_defined(table, message):
    scores = scored([adapt_reward(table, "mine")])
    assert np.isnan(scores.total).all()
    assert len(scores.failures["mine"]) == 4
    for failure in scores.failures["mine"]:
        assert re.search(message, failure.problem), failure.problem
        assert "test_rewards.py" in failure.problem


def test_a_reward_that_fails_on_one_group_keeps_what_it_logs_of_the_others():
    def reward(groups):
        if any(group.id == "p1" for group in groups):
            raise KeyError("wanted")
        values = np.ones((len(groups), 2))
        return RewardOutput(values, {"seen": [len(groups)]}, {"why": [c.text for g in groups for c in g.completions]})

    scores = scored([adapt_reward(reward, "mine")], groups(3))
    assert scores.columns["why"] == ["0a", "0b", None, None, "2a", "2b"]
    assert scores.metrics["seen"] == [1.0, 1.0]
    assert [failure[:2] for failure in scores.failures["mine"]] == [(1, 0), (1, 1)]


def test_begin_step_may_fail_too():
    class Reward:
        name = "mine"

        def begin_step(self, step, max_steps):
            raise RuntimeError("no server")

        def __call__(self, groups):
            return np.ones((len(groups), 2))

    assert np.isfinite(scored([Reward()]).total).all()  # what follows may work all the same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_and_flags_are_numbers(dtype):
    values = torch.tensor([[0, 1], [1, 0]])
    for table in (values.to(dtype), values.to(dtype).numpy() if dtype != torch.bfloat16 else values.bool().tolist()):
        assert scored([fixed(table)]).total.tolist() == [[0, 1], [1, 0]]
    leaf = values.double().requires_grad_()
    assert scored([fixed(leaf * 2)]).total.tolist() == [[0, 2], [2, 0]]
    of_trl = adapt_reward(lambda completions, **kwargs: values.to(dtype).flatten(), "trl")
    assert scored([of_trl]).total.tolist() == [[0, 1], [1, 0]]


def test_an_interrupt_of_the_user_goes_through():
    def reward(completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored([adapt_reward(reward, "mine")])


# --- time --------------------------------------------------------------------------------------------------------

HANGS = {
    "loop": "while True: pass",
    "sleep": "time.sleep(60)",
    # backtracks for ever, holding the interpreter's lock
    "regex": 're.match(r"(a+)+b", "a" * 60)',
    # a user's retry that catches everything it can
    "retry": "while True:\n        try:\n            time.sleep(60)\n        except Exception:\n            pass",
    "event": "threading.Event().wait()",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_call_that_hangs_is_interrupted_and_named_with_its_line(tmp_path, hang):
    source = (
        f"import re, threading, time\ndef reward(completion):\n    if completion != '1a': return 7\n    {HANGS[hang]}\n"
    )
    start = time.monotonic()
    scores = scored([load(tmp_path, source)], timeout=0.2)
    assert time.monotonic() - start < 5
    np.testing.assert_array_equal(scores.total, [[7, 7], [NAN, 7]])
    (failure,) = scores.failures["reward"]
    assert "no answer within 0.2 seconds (run.reward_timeout)" in failure.problem
    assert "mine.py:" in failure.problem


def test_after_two_timeouts_a_reward_is_not_asked_again_in_the_step():
    asked = []

    def hangs(completion):
        asked.append(completion)
        time.sleep(60)

    def hangs_on_all(groups):
        asked.append(len(groups))
        time.sleep(60)

    for function, calls in ((hangs, ["0a", "0b"]), (hangs_on_all, [3, 1, 1])):
        asked.clear()
        scores = scored([adapt_reward(function, "mine")], groups(3), timeout=0.1)
        assert asked == calls
        assert len(calls) - (3 in calls) == MOST_TIMEOUTS
        assert len(scores.failures["mine"]) == 6
        assert "not asked again in this step, after 2 timeouts" in scores.failures["mine"][-1].problem


def test_a_hang_in_one_group_costs_that_group():
    def reward(completions, **kwargs):
        if "1b" in completions:
            time.sleep(60)
        return [1.0] * len(completions)

    scores = scored([adapt_reward(reward, "mine")], groups(3), timeout=0.15)
    np.testing.assert_array_equal(scores.total, [[1, 1], [NAN, NAN], [1, 1]])


def test_an_async_call_that_hangs_costs_its_completion_and_a_blocked_loop_is_replaced():
    async def waits(completion):
        await asyncio.sleep(60 if completion == "0b" else 0)
        return 1.0

    async def blocks(completion):
        time.sleep(1 if completion == "0b" else 0)
        return 1.0

    scores = scored([adapt_reward(waits, "mine")], timeout=0.2)
    np.testing.assert_array_equal(scores.total, [[1, NAN], [1, 1]])
    assert "no answer within 0.2 seconds" in scores.failures["mine"][0].problem
    assert np.isnan(scored([adapt_reward(blocks, "mine")], timeout=0.2).total).any()
    np.testing.assert_array_equal(scored([adapt_reward(waits, "mine")], timeout=0.2).total, [[1, NAN], [1, 1]])


def test_the_limit_is_of_each_call_and_leaves_the_process_alarm_as_it_was():
    seen = []
    earlier = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        scores = scored([adapt_reward(lambda completion: time.sleep(0.1) or 1.0, "mine")], groups(3), timeout=0.3)
        assert np.isfinite(scores.total).all()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        signal.raise_signal(signal.SIGALRM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGALRM, earlier)


def test_outside_the_main_thread_there_is_no_limit():
    done = []

    def work():
        with TimeLimit().over(0.01):
            time.sleep(0.1)
        done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


# --- copies ------------------------------------------------------------------------------------------------------


def test_what_a_reward_changes_in_its_arguments_is_lost():
    asked = groups()
    original = groups()

    def by_completion(completion, wanted, prompt):
        assert wanted == [1, 2]  # not what the call before has made of it
        wanted.clear()
        return 0

    def by_list(completions, completion_ids, wanted, prompts, **kwargs):
        wanted[0].append(3)
        for listed in (completions, completion_ids, prompts):
            listed.clear()
        return [0] * 4

    def by_group(groups):
        for group in groups:
            group.prompt.sample["wanted"].clear()
            group.prompt.sample["new"] = 1
            group.prompt.features["audio"].zero_()
            group.completions[0].logprobs[:] = 5
            group.completions.pop()
        groups.clear()
        return np.zeros((2, 2))

    rewards = [adapt_reward(f, f.__name__) for f in (by_completion, by_list, by_group, by_completion)]
    scores = scored(rewards[:3], asked)
    assert not any(scores.failures.values())
    assert (scored([rewards[3]], asked).total == 0).all()
    for group, same in zip(asked, original, strict=True):
        assert group.prompt.sample == same.prompt.sample
        assert (group.prompt.features["audio"] == 1).all()
        assert [c.text for c in group.completions] == [c.text for c in same.completions]
        assert not group.completions[0].logprobs.any()


def test_a_sample_that_cannot_be_copied_is_shared():
    lock = threading.Lock()
    seen = []
    output = ask(adapt_reward(lambda completion, lock: seen.append(lock) or 1, "mine"), groups(lock=lock), 2)
    assert output.values.tolist() == [[1, 1], [1, 1]]
    assert set(map(id, seen)) == {id(lock)}
