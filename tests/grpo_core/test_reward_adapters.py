"""Rewards by import path: the three signatures, what reaches them, what comes back, and what is refused."""

import asyncio
import inspect
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from grpo_core.reward_adapters import TrainerState, adapt_reward, check_columns, load_reward
from grpo_core.rewards import RewardOutput, ask
from grpo_core.types import Completion, Group, Prompt

CHAT = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Clip:
    name: str
    labels: str


def group(sample, *texts: str) -> Group:
    completions = [
        Completion(tuple(range(len(text) + 1)), np.zeros(len(text) + 1, np.float32), "stop", text) for text in texts
    ]
    return Group(Prompt("p", (1,), sample=sample), completions)


def rows(*prompts, **columns):
    """One group of two completions for each prompt."""
    return [group({"prompt": prompt, **columns}, f"a{i}", f"bb{i}") for i, prompt in enumerate(prompts)]


def load(tmp_path, source: str, name: str = "reward"):
    path = tmp_path / "mine.py"
    path.write_text(inspect.cleandoc(source))
    return load_reward(f"{path}:{name}")


def values(reward, groups):
    """What the engine takes from a reward: float64 `[N, G]`."""
    return ask(reward, groups, len(groups[0].completions)).values


# --- ours: groups ------------------------------------------------------------------------------------------------


def test_a_function_of_groups_gives_a_table_with_nan_where_it_cannot_judge(tmp_path):
    reward = load(
        tmp_path,
        """
        def reward(groups):
            return [[None if c.text == "a0" else len(c.text) for c in group.completions] for group in groups]
        """,
    )
    table = values(reward, rows("x", "y"))
    assert reward.name == "reward"
    assert table.dtype == np.float64
    np.testing.assert_array_equal(table, [[np.nan, 3], [2, 3]])


def test_a_class_is_made_and_keeps_the_name_it_gives_itself(tmp_path):
    reward = load(
        tmp_path,
        """
        import numpy as np

        class Brevity:
            name = "short"

            def __call__(self, groups):
                return np.array([[-len(c.text) for c in group.completions] for group in groups], dtype=np.float64)
        """,
        "Brevity",
    )
    assert reward.name == "short"
    assert type(reward).__name__ == "Brevity"  # it keeps the protocol: nothing stands between
    assert reward(rows("x")).tolist() == [[-2, -3]]


def test_an_output_with_metrics_and_columns_goes_through_unchanged():
    output = RewardOutput(np.ones((1, 2)), {"seen": [2.0]}, {"why": ["a", "b"]})
    assert adapt_reward(lambda groups: output, "mine")(rows("x")) is output


# --- ours: one completion ----------------------------------------------------------------------------------------


def test_a_function_of_one_completion_gets_its_prompt_and_the_columns_it_names(tmp_path):
    reward = load(
        tmp_path,
        """
        def reward(completion, prompt, wanted, missing=7):
            assert missing == 7
            return None if prompt == "y" else completion.count(wanted)
        """,
    )
    np.testing.assert_array_equal(values(reward, rows("x", "y", wanted="b", unread=1)), [[0, 2], [np.nan, np.nan]])


def test_columns_of_a_dataclass_are_its_fields():
    reward = adapt_reward(lambda completion, labels: labels == completion, "same")
    assert values(reward, [group(Clip("c", "happy"), "happy", "sad")]).tolist() == [[1, 0]]


def test_calls_of_an_async_function_wait_together():
    gate, seen = asyncio.Event(), []

    async def reward(completion):
        seen.append(completion)
        if len(seen) == 4:
            gate.set()
        await asyncio.wait_for(gate.wait(), 10)
        return len(completion)

    assert values(adapt_reward(reward, "slow"), rows("x", "y")).tolist() == [[2, 3], [2, 3]]


# --- TRL's -------------------------------------------------------------------------------------------------------


def test_trl_gets_lists_over_all_completions():
    seen = {}

    def reward(prompts, completions, completion_ids, wanted, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, wanted=wanted, more=kwargs)
        return [1, None, 3.5, True]

    table = values(adapt_reward(reward, "trl"), rows("x", "y", wanted="w", other=0))
    np.testing.assert_array_equal(table, [[1, np.nan], [3.5, 1]])
    assert seen["prompts"] == ["x", "x", "y", "y"]
    assert seen["completions"] == ["a0", "bb0", "a1", "bb1"]
    assert seen["ids"] == [[0, 1, 2], [0, 1, 2, 3]] * 2
    assert seen["wanted"] == ["w"] * 4
    assert seen["more"].keys() == {"other", "trainer_state", "log_extra", "log_metric"}


def test_trl_gets_messages_where_the_prompt_is_a_chat():
    def reward(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    assert values(adapt_reward(reward, "trl"), rows(CHAT)).tolist() == [[2, 3]]
    seen = []
    adapt_reward(lambda prompts, completions: [seen.append((prompts, completions))] * 2, "trl")(rows(CHAT))
    (prompts, completions), *_ = seen
    assert prompts == [CHAT, CHAT]
    assert completions[1] == [{"role": "assistant", "content": "bb0"}]


def test_a_function_of_kwargs_alone_is_trls():
    reward = adapt_reward(lambda **kwargs: [len(text) for text in kwargs["completions"]], "any")
    assert values(reward, rows("x")).tolist() == [[2, 3]]


def test_an_async_object_of_trl_is_awaited_on_one_loop_also_beside_a_running_one():
    loops = set()

    class Remote:
        async def __call__(self, completions, **kwargs):
            loops.add((asyncio.get_running_loop(), threading.get_ident()))
            return [0.5] * len(completions)

    reward = adapt_reward(Remote, "remote")

    async def notebook():
        return values(reward, rows("x"))

    assert values(reward, rows("x")).tolist() == asyncio.run(notebook()).tolist() == [[0.5, 0.5]]
    assert len(loops) == 1


def test_what_trl_logs_comes_with_the_values():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(text) for text in completions])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        return [0.0] * len(completions)

    output = adapt_reward(reward, "logs")(rows("x", "y"))
    assert output.values.tolist() == [[0, 0], [0, 0]]
    assert output.metrics == {"share": [0.25, 0.75]}
    assert output.columns == {"length": [2, 3, 2, 3]}


def test_the_state_says_which_step_is_judged():
    class Curriculum:
        begun = None

        def begin_step(self, step, max_steps):
            self.begun = step

        def __call__(self, completions, trainer_state):
            return [trainer_state.global_step / trainer_state.max_steps + self.begun] * len(completions)

    reward = adapt_reward(Curriculum(), "curriculum")
    assert reward.state == TrainerState(0, 0)
    reward.begin_step(5, 20)
    assert values(reward, rows("x")).tolist() == [[5.25, 5.25]]


def test_rows_of_different_columns_have_none_where_one_lacks_a_column():
    groups = [group({"prompt": "x", "wanted": "w"}, "a"), group({"prompt": "y"}, "b")]
    seen = []
    adapt_reward(lambda completions, wanted=None: seen.extend(wanted) or [0, 0], "trl")(groups)
    assert seen == ["w", None]


def test_rewards_of_trl_itself_run_unchanged():
    trl_rewards = pytest.importorskip("trl.rewards")
    good = "<think>\nso\n</think>\nanswer"
    reward = adapt_reward(trl_rewards.think_format_reward, "think_format_reward")
    assert values(reward, [group({"prompt": CHAT}, good, "answer")]).tolist() == [[1, 0]]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brevity", r"'brevity' is not an import path: write file\.py:name or package\.module:name"),
        ("mine.py:", "is not an import path"),
        ("{folder}/none.py:f", r"none\.py:f: there is no file .*none\.py"),
        ("no_such_package.rewards:f", "no_such_package.rewards cannot be imported .*PYTHONPATH"),
        ("{folder}/mine.py:brevty", "mine.py defines no 'brevty'; did you mean 'brevity'"),
        ("{folder}/mine.py:zzz", "defines no 'zzz'; check the name"),
        ("{folder}/mine.py:NUMBER", "is 3, which cannot be called"),
        ("{folder}/mine.py:Needs", "constructor needs scale, which: make an object of it in the file"),
        ("{folder}/mine.py:two", r"takes \(x, y\), which is not one of the known signatures: name `groups`"),
        ("builtins:max", "its signature cannot be read"),
        ("{folder}/broken.py:f", r"broken\.py, line 2, raises ZeroDivisionError: division by zero"),
        ("{folder}/leaves.py:f", r"leaves\.py, line 1, raises SystemExit: 0"),
        (
            "{folder}/mine.py:Fails",
            r"is a class that cannot be made: KeyError: 'no key' \(.*mine\.py:8, `.*raise KeyError",
        ),
        ("rewards_that_break:f", r"rewards_that_break cannot be imported: ZeroDivisionError: .*break\.py:1, `1 / 0`"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_with_the_fix(tmp_path, monkeypatch, spec, message):
    (tmp_path / "mine.py").write_text(
        "NUMBER = 3\ndef brevity(completion): return 0\ndef two(x, y): return 0\n"
        "class Needs:\n    def __init__(self, scale, which): pass\n    def __call__(self, groups): return 0\n"
        "class Fails:\n    def __init__(self): raise KeyError('no key')\n"
    )
    (tmp_path / "broken.py").write_text("x = 1\nx / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "rewards_that_break.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_reward(spec.format(folder=tmp_path))


def test_columns_are_checked_before_anything_is_judged():
    prompt = Prompt("p", (1,), sample={"prompt": "x", "answer": 1})
    check_columns(adapt_reward(lambda completion, answer, more=1: 0, "one"), prompt)
    check_columns(adapt_reward(lambda prompts, completions, answer, log_metric, **kwargs: 0, "trl"), prompt)
    check_columns(adapt_reward(lambda groups: 0, "ours"), prompt)
    for reward in (lambda completion, wanted: 0, lambda completions, wanted, **kwargs: 0):
        with pytest.raises(ValueError, match=r"mine\.py:f reads the column 'wanted', .* it has prompt, answer"):
            check_columns(adapt_reward(reward, "f", "mine.py:f"), prompt)
    with pytest.raises(ValueError, match="reads the column 'prompt'"):
        check_columns(adapt_reward(lambda prompts: 0, "trl"), Prompt("p", (1,), sample=Clip("a", "b")))
    with pytest.raises(ValueError, match="is a set, whose columns are not known"):
        check_columns(adapt_reward(lambda completion: 0, "one"), Prompt("p", (1,), sample={1, 2}))


def test_two_rewards_of_one_file_share_what_it_defines(tmp_path):
    source = "made = []\nmade.append(0)\ndef a(completion): return len(made)\ndef b(completion): return len(made)\n"
    first, second = load(tmp_path, source, "a"), load(tmp_path, source, "b")
    assert values(first, rows("x")).tolist() == values(second, rows("x")).tolist() == [[1, 1]]
    assert first.function.__globals__ is second.function.__globals__
