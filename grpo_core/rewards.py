"""Score completions: the protocol of a reward, and the scores of several rewards for a step.

A reward is a user's program, so anything may happen in it. Whatever does costs the completions concerned (NaN) and is
recorded as a `RewardFailure`; nothing is raised here, where other ranks would wait for one that stopped. The limit of
failures is applied at the end of the step, on all ranks (`grpo_core/training/guards.py`).
"""

from __future__ import annotations

import copy
import inspect
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from grpo_core.algorithm.advantages import fill_unjudged, has_signal
from grpo_core.errors import InputError
from grpo_core.types import Group

MOST_TIMEOUTS = 2
"""Timeouts after which a reward is not asked again in a step, beside that of a call for the whole batch: a reward that
always hangs must cost less than the 600 s for which other ranks wait."""
LARGEST_REWARD = 1e30
"""Largest magnitude of a reward: beyond float32's 3e38 advantages and losses would be infinite."""


class Reward(Protocol):
    """Judges whole batches of groups at once.

    `name` labels it in metrics, logs and `algorithm.reward_weights`. Called with N groups of G completions each, it
    returns float64 `[N, G]` (or a `RewardOutput`), NaN where it cannot judge: a completion that no reward judges gets
    advantage 0. It must be a pure function of the groups: the same groups give the same numbers on every rank and after
    a resume. The groups are copies: what it changes in them is lost. A method `begin_step(step, max_steps)`, if there
    is one, is called before each step.
    """

    name: str

    def __call__(self, groups: Sequence[Group]) -> np.ndarray | RewardOutput: ...


class RewardFailure(NamedTuple):
    """A completion that a reward failed to judge: it raised, took too long, or returned no finite number."""

    group: int
    """Index of its group."""
    member: int
    problem: str
    """What happened, with file and line of the user's code."""


class RewardOutput(NamedTuple):
    """Result of a reward that also logs something."""

    values: np.ndarray
    """float64 `[N, G]`, NaN where it cannot judge."""
    metrics: Mapping[str, Sequence[float]] = MappingProxyType({})
    """Numbers by name; their mean over the step is written to `metrics.jsonl`."""
    columns: Mapping[str, Sequence[Any]] = MappingProxyType({})
    """`N · G` values by name, in the groups' order; written to `completions.jsonl`."""
    failures: Sequence[RewardFailure] = ()
    """Completions that it failed on, each NaN in `values`; a reward may also raise, or return NaN without a reason."""


class RewardTimeout(BaseException):
    """A call of a reward took too long. No `Exception`: a user's `except Exception` must not catch it and go on."""


@dataclass(frozen=True)
class Scores:
    """Scores that K rewards give N groups of G completions.

    Attributes:
        names, weights: of the rewards.
        by_reward: float64 `[K, N, G]`, NaN where a reward could not judge.
        total: float64 `[N, G]`, the weighted sum over the rewards; NaN where none could judge. Where one could not, it
            counts as the mean of what it gave the group's other members, so that nothing is won or lost by it.
        signal: bool `[N]`, groups with a learning signal: their totals (for GDPO, one reward's values) are not all
            equal up to rounding.
        seconds: time that each reward took, by name.
        metrics, columns: values that rewards logged, see `RewardOutput`; columns hold all N · G completions.
        failures: by the reward's name; indices are of all groups that were scored, also after `select`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    by_reward: np.ndarray
    total: np.ndarray
    signal: np.ndarray
    seconds: Mapping[str, float]
    metrics: Mapping[str, Sequence[float]]
    columns: Mapping[str, Sequence[Any]]
    failures: Mapping[str, Sequence[RewardFailure]]

    def select(self, groups: np.ndarray) -> Scores:
        """Return the scores of some groups, int64 `[n]` indices into N; metrics and seconds stay those of all."""
        size = self.total.shape[1]
        members = (groups[:, None] * size + np.arange(size)).ravel()
        columns = {name: [values[i] for i in members] for name, values in self.columns.items()}
        return replace(
            self,
            by_reward=self.by_reward[:, groups],
            total=self.total[groups],
            signal=self.signal[groups],
            columns=columns,
        )


def check_reward_weights(rewards: Sequence[Reward], weights: Mapping[str, float]) -> None:
    """Refuse weights of unknown rewards, weights that are not finite, and rewards that share a name.

    Raises:
        InputError: naming the key and the run's rewards, or the names.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise InputError(
            f"two rewards share a name: {', '.join(names)}. Give each once, or rename one: metrics and "
            "algorithm.reward_weights go by names"
        )
    for key, weight in weights.items():
        if key not in names:
            raise InputError(f"algorithm.reward_weights.{key}: no such reward, this run has {', '.join(names)}")
        if not np.isfinite(weight):
            raise InputError(f"algorithm.reward_weights.{key} is {weight}: give a finite number")


def score(
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    weights: Mapping[str, float],
    *,
    group_size: int,
    step: int = 0,
    max_steps: int = 0,
    timeout: float = 0.0,
    each_reward: bool = False,
) -> Scores:
    """Score N groups of `group_size` completions by every reward.

    A batch on which a reward fails is given to it again group by group, so that the sample is found and the others are
    judged.

    Args:
        weights: weight by reward name; a reward that is not named weighs 1.
        step, max_steps: progress of the run, see `Reward`.
        timeout: seconds that a call may take (`run.reward_timeout`), 0 for no limit.
        each_reward: a reward that differs within the group is enough for a signal, as for GDPO.
    """
    shape = (len(groups), group_size)
    by_reward = np.zeros((len(rewards), *shape))
    total, judged, signal = np.zeros(shape), np.zeros(shape, dtype=bool), np.zeros(len(groups), dtype=bool)
    # filled for every reward, so that a rank without prompts has the same metrics and makes the same collectives
    seconds = {reward.name: 0.0 for reward in rewards}
    weighted = {reward.name: float(weights.get(reward.name, 1.0)) for reward in rewards}
    metrics: dict[str, list[float]] = {}
    columns: dict[str, Sequence[Any]] = {}
    failures: dict[str, Sequence[RewardFailure]] = {reward.name: () for reward in rewards}
    for index, reward in enumerate(rewards if groups else ()):  # a rank without prompts has nothing to judge
        start = time.perf_counter()
        try:
            if hasattr(reward, "begin_step"):
                reward.begin_step(step, max_steps)
            output = ask(reward, groups, group_size, timeout)
        # SystemExit is no `Exception`: `sys.exit(0)` in a reward would end the run as if it had succeeded
        except (Exception, SystemExit, RewardTimeout) as error:
            output = _ask_apart(reward, groups, group_size, timeout, error)
        seconds[reward.name] = time.perf_counter() - start
        for name, logged in output.metrics.items():
            metrics.setdefault(name, []).extend(logged)
        columns |= output.columns
        failures[reward.name] = output.failures
        values, weight = output.values, weighted[reward.name]
        # summed in the order of the rewards, so that the total rounds alike wherever it is computed
        known = ~np.isnan(values)
        total += (values if known.all() else fill_unjudged(values)) * weight
        judged |= known
        by_reward[index] = values
        if each_reward and weight:
            signal |= has_signal(values)
    total[~judged] = np.nan  # not 0, which would count as a score in the group's mean
    return Scores(
        tuple(seconds),
        tuple(weighted.values()),
        by_reward,
        total,
        signal if each_reward else has_signal(total),
        seconds,
        metrics,
        columns,
        failures,
    )


def ask(reward: Reward, groups: Sequence[Group], group_size: int, timeout: float = 0.0) -> RewardOutput:
    """Call a reward on copies of N groups, and check what it returns.

    Returns:
        Values as float64 `[N, G]`. A value that is not a finite number is NaN, with a failure.

    Raises:
        InputError: it returns another shape than `[N, G]`, or columns of another length.
        RewardTimeout: it takes too long. It may raise anything else, too.
    """
    # token ids are tuples of integers, of which a copy would be the same: known to `deepcopy`, they are not walked
    known: dict[int, Any] = {
        id(ids): ids for group in groups for ids in (group.prompt.token_ids, *(c.token_ids for c in group.completions))
    }
    try:
        copies = copy.deepcopy(list(groups), known.copy())
    except Exception:  # a sample may hold what cannot be copied, such as an open file: then it is shared
        copies = copy.deepcopy(list(groups), known | {id(group.prompt.sample): group.prompt.sample for group in groups})
    with TIME_LIMIT.over(timeout):
        output = reward(copies)
    values, metrics, columns, failures = output if isinstance(output, RewardOutput) else RewardOutput(output)
    if hasattr(values, "detach"):  # a tensor, which may be on another device, have a gradient, or be in bfloat16
        values = values.detach().cpu().double().numpy()
    # a list as objects: beside a text NumPy would turn all numbers into texts
    table = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    failures = list(failures)
    shape = (len(groups), group_size)
    if table.shape != shape:
        raise InputError(f"it returned shape {table.shape} for {shape[0]} groups of {shape[1]} completions")
    if table.dtype.kind not in "fiub":  # float, int, unsigned, bool
        numbers = np.full(shape, np.nan)
        for (n, member), value in np.ndenumerate(table):
            try:
                numbers[n, member] = as_number(value)
            except TypeError as error:
                failures.append(RewardFailure(n, member, f"{error}{defined_at(reward)}"))
        table = numbers
    table = table.astype(np.float64)
    for n, member in np.argwhere(np.abs(table) > LARGEST_REWARD).tolist():
        problem = f"it returned {table[n, member]:g}: return a finite number, or NaN{defined_at(reward)}"
        failures.append(RewardFailure(n, member, problem))
        table[n, member] = np.nan
    for name, column in columns.items():
        if len(column) != table.size:
            raise InputError(
                f"it logged {len(column)} values of {name!r} for {table.size} completions: log one value each, once a "
                "call"
            )
    return RewardOutput(table, {name: [*map(float, logged)] for name, logged in metrics.items()}, columns, failures)


def _ask_apart(
    reward: Reward, groups: Sequence[Group], group_size: int, timeout: float, error: BaseException
) -> RewardOutput:
    """Ask a reward group by group, after it failed on all together with `error`; a group that it fails on is NaN."""
    values = np.full((len(groups), group_size), np.nan)
    metrics: dict[str, list[float]] = {}
    columns: dict[str, list[Any]] = {}
    failures: list[RewardFailure] = []
    timeouts = 0
    for n, group in enumerate(groups):
        problem = None
        if timeouts >= MOST_TIMEOUTS:
            problem = f"not asked again in this step, after {timeouts} timeouts: {explain(error, reward)}"
        else:
            try:
                # with one group there is nothing to take apart, and the same call would fail in the same way
                if len(groups) == 1:
                    raise error
                output = ask(reward, [group], group_size, timeout)
            except (Exception, SystemExit, RewardTimeout) as found:
                error = found
                timeouts += isinstance(found, RewardTimeout)
                problem = explain(found, reward)
        if problem is not None:
            failures += [RewardFailure(n, member, problem) for member in range(group_size)]
            continue
        values[n] = output.values[0]
        failures += [failure._replace(group=n) for failure in output.failures]
        for name, logged in output.metrics.items():
            metrics.setdefault(name, []).extend(logged)
        for name, column in output.columns.items():
            # None for the groups before, which logged nothing; and, below, for those behind
            columns.setdefault(name, []).extend([None] * (n * group_size - len(columns.get(name, ()))))
            columns[name].extend(column)
    for column in columns.values():
        column.extend([None] * (values.size - len(column)))
    return RewardOutput(values, metrics, columns, failures)


def as_number(value: Any) -> float:
    """Convert what a reward returned for one completion to float; None becomes NaN.

    Raises:
        TypeError: it is not a number.
    """
    if value is None:
        return float("nan")
    try:
        # float("1") would pass, but a reward that returns text is a mistake; of NumPy's complex it is the real part
        if isinstance(value, str | bytes | complex):
            raise TypeError
        return float(value)
    except Exception:  # a tensor of several elements raises RuntimeError
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise TypeError(f"it returned {shown}: return a number, or None if it cannot judge") from None


def explain(error: BaseException, reward: Any) -> str:
    """Say in one sentence what a reward raised, and at which line of the user's file."""
    if isinstance(error, SystemExit):
        text = f"it called sys.exit({'' if error.code is None else error.code})"
    elif isinstance(error, RewardTimeout):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    text = text if len(text) <= 300 else text[:297] + "..."
    path, _ = _definition(reward)
    stack = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _OURS]
    # the user's own line and not the depths of a library that it called
    frames = [frame for frame in stack if frame.filename == path] or stack
    if not frames:
        return text + defined_at(reward)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`)"


def defined_at(reward: Any) -> str:
    """Return ` (file:line)` of a reward's definition, or nothing where it has none."""
    path, line = _definition(reward)
    return f" ({path}:{line})" if path else ""


def _definition(reward: Any) -> tuple[str, int]:
    """File and line of the function behind a reward, ("", 0) for one without Python code."""
    function = getattr(reward, "function", reward)  # of an adapter
    if isinstance(function, type):  # which is being made
        function = vars(function).get("__init__", function)
    # of a function, or of the class of an object that is called
    code = getattr(inspect.unwrap(function), "__code__", None)
    code = code or getattr(vars(type(function)).get("__call__"), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


class TimeLimit:
    """Interrupts a call of a reward by a timer of the operating system (SIGALRM), which raises `RewardTimeout` in it.

    A timer and not a second thread: a regular expression that backtracks for ever holds the interpreter's lock, and
    rewards go on running in the main thread, which some need. What holds the processor in C without ever looking for
    signals is interrupted when it returns. A reward that sets alarms of its own (math_verify) keeps them, in place of
    this one. Outside the main thread, and on Windows, there is no limit.
    """

    seconds = 0.0

    @contextmanager
    def over(self, seconds: float) -> Iterator[None]:
        """Limit the calls inside to `seconds` each; 0 is no limit."""
        main_thread = threading.current_thread() is threading.main_thread()
        if not seconds or not main_thread or not hasattr(signal, "setitimer"):
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            if self.seconds:
                raise RewardTimeout(f"no answer within {seconds:g} seconds (run.reward_timeout)")

        earlier = signal.signal(signal.SIGALRM, interrupt)
        try:
            try:
                self.seconds = seconds
                # again after 5 s: a bare `except` of the user, or a destructor, may swallow the first one
                signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
                yield
            finally:
                self.seconds = 0.0  # first of all: an alarm from here on is too late
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if earlier is None else earlier)

    def restart(self, slack: float = 0.0) -> None:
        """Start the time of the next call, inside `over`, with `slack` seconds more."""
        if self.seconds:
            signal.setitimer(signal.ITIMER_REAL, self.seconds + slack, 5.0)


TIME_LIMIT = TimeLimit()
"""The process's one, as it has one timer; adapters that make many calls restart it for each."""

_OURS = {__file__, str(Path(__file__).with_name("reward_adapters.py"))}
