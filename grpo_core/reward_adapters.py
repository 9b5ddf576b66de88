"""Import a user's rewards by path, and adapt their signatures to the engine's protocol."""

from __future__ import annotations

import asyncio
import copy
import difflib
import importlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from grpo_core.config.plugins import load_plugin
from grpo_core.errors import InputError
from grpo_core.rewards import (
    MOST_TIMEOUTS,
    TIME_LIMIT,
    Reward,
    RewardFailure,
    RewardOutput,
    RewardTimeout,
    as_number,
    defined_at,
    explain,
)
from grpo_core.types import Completion, Group, Prompt


@dataclass(frozen=True)
class TrainerState:
    """Progress of training, as rewards written for TRL read it from `trainer_state`.

    Attributes:
        global_step: steps made before this one.
        max_steps: steps of the whole run.
    """

    global_step: int = 0
    max_steps: int = 0


def load_reward(spec: str) -> Reward:
    """Import a reward and adapt it to `Reward`.

    Three signatures are accepted; the parameters' names tell them apart:

    ```
    reward(groups) -> float64 [N, G] or RewardOutput             ours: all groups of a step at once
    reward(completion, prompt, wanted) -> float or None          one completion; `wanted` is a column of the samples
    reward(prompts, completions, completion_ids, wanted, trainer_state, log_extra, log_metric, **kwargs) -> list   TRL's
    ```

    Each may leave out any of these parameters. A function that takes `**kwargs` and none of `groups`, `prompt` and
    `completion` is TRL's. Any of the three may be async, and may be a function, an object with `__call__`, or a class
    whose constructor needs no arguments. None, returned where it cannot judge, becomes NaN.

    Args:
        spec: `file.py:name` or `package.module:name`. A file is imported once, however many rewards come from it.

    Raises:
        InputError: there is no such file, module or name, it cannot be called, or its signature is not one of these.
    """
    source, _, name = spec.rpartition(":")  # from the right: a Windows path has a colon behind the drive
    if not source or not name:
        raise InputError(f"reward {spec!r} is not an import path: write file.py:name or package.module:name")
    # as a plug-in, which is imported once per process: two rewards of one file share its module and its models
    module = load_plugin(Path(source), f"reward {spec}") if source.endswith(".py") else _import_module(spec, source)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the name behind the colon"
        raise InputError(f"reward {spec}: {source} defines no {name!r}; {hint}")
    return adapt_reward(getattr(module, name), name, spec)


def adapt_reward(function: Any, name: str, spec: str | None = None) -> Reward:
    """Adapt a callable of one of the three forms of `load_reward` to `Reward`.

    Args:
        name: label of the reward, unless the callable has an attribute `name`.
        spec: the callable's name in messages; by default `name`.

    Raises:
        InputError: it cannot be called, or its signature is not one of the three.
    """
    spec = spec or name
    if not callable(function):
        raise InputError(f"reward {spec} is {function!r}, which cannot be called: name a function or a class")
    if isinstance(function, type):
        needed = [p.name for p in _parameters(function, spec) if _is_required(p)]
        if needed:
            raise InputError(
                f"reward {spec} is a class whose constructor needs {', '.join(needed)}: make an object of it in the "
                "file, and name that"
            )
        try:
            function = function()
        except (Exception, SystemExit) as error:
            raise InputError(f"reward {spec} is a class that cannot be made: {explain(error, function)}") from error
    label = getattr(function, "name", None)
    label = label if isinstance(label, str) else name  # an object's `name` may be anything
    parameters = _parameters(function, spec)
    names = [p.name for p in parameters]
    if "groups" in names:
        # an object that has a name and is not async keeps the protocol already, and may have further methods
        plain = label == getattr(function, "name", None) and not inspect.iscoroutinefunction(function.__call__)
        return cast(Reward, function if plain else _GroupReward(function, label, spec))
    if {"completion", "prompt"}.intersection(names):
        return cast(Reward, _CompletionReward(function, label, spec))
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if takes_any or {"prompts", "completions", "completion_ids"}.intersection(names):
        return cast(Reward, _TRLReward(function, label, spec))
    raise InputError(
        f"reward {spec} takes ({', '.join(names)}), which is not one of the known signatures: name `groups` (all of a "
        "step), `completion` (one at a time) or `completions` (a list, as TRL calls it) among its parameters"
    )


def check_columns(reward: Reward, prompt: Prompt) -> None:
    """Refuse a sample that lacks a column that the reward reads; rewards that read no column by name accept all.

    Raises:
        InputError: naming the reward, the column, and the columns that the sample has.
    """
    check = getattr(reward, "check_columns", None)
    if check is not None:
        check(prompt)


class _Adapter:
    """Base of the adapters: the reward's name, the step, and the arguments that its signature accepts."""

    offers: frozenset[str] = frozenset()
    """Parameters that the adapter fills itself; all others are columns of the samples."""

    def __init__(self, function: Callable[..., Any], name: str, spec: str):
        self.function, self.name, self.spec = function, name, spec
        self.state = TrainerState()
        parameters = _parameters(function, spec)
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}
        self._required = [p.name for p in parameters if _is_required(p)]

    def begin_step(self, step: int, max_steps: int) -> None:
        """Record the step of the next call, and pass it on if the function has this method too."""
        self.state = TrainerState(step, max_steps)
        begin_step = getattr(self.function, "begin_step", None)
        if begin_step is not None:
            begin_step(step, max_steps)

    def check_columns(self, prompt: Prompt) -> None:
        """Refuse a sample without a column that the function needs, see the module's `check_columns`."""
        columns = _columns(prompt)
        for name in self._required:
            # TRL passes the column `prompt` as `prompts`
            column = "prompt" if name == "prompts" else name
            if name not in self.offers and column not in columns:
                raise InputError(
                    f"reward {self.spec} reads the column {column!r}, which prompt {prompt.id!r} lacks: it has "
                    f"{', '.join(columns) or 'none'}. Rename the parameter, or give it a default"
                )

    def _accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Select the arguments that the function can take."""
        return arguments if self._takes_any else {k: v for k, v in arguments.items() if k in self._names}

    def _table(self, groups: Sequence[Group], returned: Sequence[Any]) -> RewardOutput:
        """Make a table of what was returned for each completion; what was raised, or is no number, is a failure."""
        values = np.full((len(groups), len(groups[0].completions)), np.nan)
        failures = []
        for (n, member), value in zip(np.ndindex(values.shape), returned, strict=True):
            if isinstance(value, BaseException):
                failures.append(RewardFailure(n, member, explain(value, self)))
                continue
            try:
                values[n, member] = as_number(value)
            except TypeError as error:  # not of the user's code: what it names is where the function is defined
                failures.append(RewardFailure(n, member, f"{error}{defined_at(self)}"))
        return RewardOutput(values, failures=failures)


class _GroupReward(_Adapter):
    """Adapter of a function of all groups, which returns `[N, G]` numbers or None, or a `RewardOutput`."""

    offers = frozenset({"groups"})

    def __call__(self, groups: Sequence[Group]) -> np.ndarray | RewardOutput:
        # `grpo_core.rewards.ask` checks it
        return cast(np.ndarray | RewardOutput, _wait_for(self.function(groups)))


class _CompletionReward(_Adapter):
    """Adapter of a function of one completion's text, its prompt and its sample's columns.

    A call that raises, takes too long or returns no number costs its completion alone. Async calls of a step run
    concurrently.
    """

    offers = frozenset({"completion"})

    def __call__(self, groups: Sequence[Group]) -> RewardOutput:
        returned: list[Any] = []
        timeouts = 0
        for group in groups:
            for completion in group.completions:
                if timeouts >= MOST_TIMEOUTS:
                    # the completions behind it are as unjudged as those that it hung on
                    returned.append(RewardTimeout(f"not asked again in this step, after {timeouts} timeouts"))
                    continue
                # columns of its own for each call, which may change them; the completion's text last: a column of that
                # name must not replace it
                arguments = self._accepted({**_own_columns(group.prompt), "completion": completion.text})
                TIME_LIMIT.restart()
                try:
                    returned.append(self.function(**arguments))
                except (Exception, SystemExit, RewardTimeout) as error:
                    returned.append(error)
                    timeouts += isinstance(error, RewardTimeout)
        # all calls are made before any is awaited, so that a thousand requests to a judge are under way at once
        waiting = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
        if waiting:
            outcomes = _wait_for(_gather([returned[i] for i in waiting], TIME_LIMIT.seconds), limit=False)
            for i, outcome in zip(waiting, outcomes, strict=True):
                returned[i] = outcome
        TIME_LIMIT.restart()  # the last call's time must not run out in what follows
        return self._table(groups, returned)


class _TRLReward(_Adapter):
    """Adapter of a function that TRL 1.16 could call (`GRPOTrainer._calculate_rewards`), with lists over completions.

    If a sample's `prompt` is a list of messages, its completions are lists of one assistant message, as in TRL.
    """

    offers = frozenset({"completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})

    def __call__(self, groups: Sequence[Group]) -> RewardOutput:
        members = [(group, member) for group in groups for member in range(len(group.completions))]
        rows = [columns for group in groups for columns in [_columns(group.prompt)] * len(group.completions)]
        # samples may have different columns: a missing value is None, as in a table
        keys = dict.fromkeys(key for row in rows for key in row)
        arguments: dict[str, Any] = {
            key: [row.get(key) for row in rows] for key in keys if key not in ("prompt", "completion", "completion_ids")
        }
        if "prompt" in keys:
            arguments["prompts"] = [row.get("prompt") for row in rows]
        completions = [group.completions[member] for group, member in members]
        metrics: dict[str, list[float]] = {}
        columns: dict[str, list[Any]] = {}
        # after the columns: TRL's arguments win over columns of the same names
        arguments |= {
            "completions": [_as_trl(c, row.get("prompt")) for c, row in zip(completions, rows, strict=True)],
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "trainer_state": self.state,
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(value),
            "log_extra": lambda column, values: columns.setdefault(column, []).extend(values),
        }
        returned = _wait_for(self.function(**self._accepted(arguments)))
        if len(returned) != len(members):
            raise InputError(f"it returned {len(returned)} values for {len(members)} completions")
        for column, values in columns.items():
            if len(values) != len(members):
                raise InputError(
                    f"it logged {len(values)} values of {column!r} for {len(members)} completions: give log_extra one "
                    "value each, once a call"
                )
        return self._table(groups, list(returned))._replace(metrics=metrics, columns=columns)


def _parameters(function: Callable[..., Any], spec: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some built-in functions have no signature to inspect
        raise InputError(f"reward {spec}: its signature cannot be read ({error}): wrap it in a function") from error


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return not variadic and parameter.default is inspect.Parameter.empty


def _columns(prompt: Prompt) -> dict[str, Any]:
    """Return a sample's columns: the items of a mapping, or the fields of a dataclass."""
    sample = prompt.sample
    if sample is None:
        return {}
    if isinstance(sample, Mapping):
        return dict(sample)
    if is_dataclass(sample):
        # not `asdict`, which would copy a sample's arrays for every completion
        return {field.name: getattr(sample, field.name) for field in fields(sample)}
    raise InputError(
        f"the sample of prompt {prompt.id!r} is a {type(sample).__name__}, whose columns are not known: use a dict or "
        "a dataclass, or a reward that takes `groups`"
    )


def _own_columns(prompt: Prompt) -> dict[str, Any]:
    """Copy a sample's columns, for a call that may change them."""
    columns = _columns(prompt)
    try:
        return copy.deepcopy(columns)
    except Exception:  # what cannot be copied, such as an open file, is shared
        return columns


def _as_trl(completion: Completion, prompt: Any) -> Any:
    """Return a completion as TRL passes it: text, or messages if the prompt is a list of messages."""
    return completion.text if not isinstance(prompt, list) else [{"role": "assistant", "content": completion.text}]


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"reward {spec}: {name} cannot be imported ({error}): install it or put its folder on PYTHONPATH, or write "
            "file.py:name"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"reward {spec}: {name} cannot be imported: {explain(error, None)}") from error


_event_loop: asyncio.AbstractEventLoop | None = None


def _wait_for(result: Any, limit: bool = True) -> Any:
    """Return the result, awaited if it is a coroutine, which has the time limit of a call unless `limit` is False.

    One event loop in one background thread serves the whole process: a client that a reward keeps between steps is
    bound to the loop it was made on, and the main thread of a notebook has a running loop already.
    """
    global _event_loop
    if not inspect.isawaitable(result):
        return result
    if _event_loop is None:
        _event_loop = asyncio.new_event_loop()
        # daemon: a request that never ends must not keep the process alive after training
        threading.Thread(target=_event_loop.run_forever, name="async rewards", daemon=True).start()
    # behind the limit that `_outcome` sets, which is known to the loop and spares the calls that have answered
    TIME_LIMIT.restart(slack=0.5 + 0.1 * TIME_LIMIT.seconds)
    future = asyncio.run_coroutine_threadsafe(_outcome(result, TIME_LIMIT.seconds if limit else 0.0), _event_loop)
    try:
        outcome = future.result()
    except RewardTimeout:
        # a coroutine blocks the loop without awaiting anything: its thread is lost, the next call gets another
        future.cancel()
        _event_loop = None
        raise
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def _outcome(call: Awaitable[Any], seconds: float) -> Any:
    """Await a call, and return its result or what it raised; an error that leaves a task may end the loop's thread."""
    try:
        async with asyncio.timeout(seconds or None) as limit:
            return await call
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, TimeoutError) and limit.expired():
            timeout = RewardTimeout(f"no answer within {seconds:g} seconds (run.reward_timeout)")
            return timeout.with_traceback(error.__traceback__)
        return error


# `asyncio.gather` needs a running loop, so it is called inside a coroutine on that loop
async def _gather(calls: Sequence[Awaitable[Any]], seconds: float) -> list[Any]:
    return list(await asyncio.gather(*(_outcome(call, seconds) for call in calls)))
