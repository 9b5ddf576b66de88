"""Open the folder of a run: decide whether the run there goes on, and keep everything that another run has left.

    run = open_run(config, dist)    # reads only: finds the folder, refuses one that holds another run
    config = run.config             # named `r1-2` if `r1` is finished
    ...                             # open model and data: a mistake in them has changed nothing yet
    run.begin()                     # from here on the folder is this run's
    ...
    run.finish()                    # written last: without it the run is unfinished, and the next start continues it

| the newest folder of that name holds | then |
|---|---|
| nothing, or nothing that a run would overwrite | a new run |
| an unfinished run, of options that train the same (`option(free=...)`) | it goes on |
| an unfinished run of other options | refused, unless `run.accept_changes` names them |
| a finished run, and `run.max_steps` is now larger | it goes on, if the rest is as above |
| a finished run | it stays; a new run goes beside it, under the next number |
| files that a run would overwrite, and no run | refused |

Nothing is deleted or moved.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml

from grpo_core.config.fields import ConfigError, Member, holds_paths, options
from grpo_core.config.loader import save_config, to_dict
from grpo_core.config.moved import translate_saved_config
from grpo_core.config.options import RunConfig
from grpo_core.distributed import Distributed, run_on_main
from grpo_core.storage.environment import describe_session
from grpo_core.storage.files import write_text
from grpo_core.storage.lock import FileLock, LockHeld

Config = TypeVar("Config")

CONFIG_FILE = "config.yaml"
SESSIONS_FILE = "sessions.jsonl"
"""A line for each start of the run: command, versions, machine, and the options that changed."""
FINISHED_FILE = "finished.json"
LOCK_FILE = "run.lock"
_ENGINE_FILES = (
    CONFIG_FILE,
    SESSIONS_FILE,
    FINISHED_FILE,
    "metrics.jsonl",
    "completions.jsonl",
    "checkpoints",
    "model",
    "tensorboard",
    "report.html",
)
# what an emotion run of an earlier version wrote last
_FINISHED_BEFORE = "summary.json"

_CHECKPOINT = re.compile(r"step-(\d+)")
# a reward by its file: the folder of the file is a place like any other
_IMPORT_PATH = re.compile(r"(.+\.py):(\w+)")
_NOT_SET = "not set"


@dataclass(frozen=True)
class Change:
    """An option whose value is not that of the saved config.

    Attributes:
        before, now: the values, as text.
        free: a run may go on with it unasked, see `grpo_core.config.option`.
    """

    key: str
    before: str
    now: str
    free: bool

    def __str__(self) -> str:
        return f"{self.key} was {self.before} and is {self.now}"


@dataclass
class _Found:
    """Where a run goes, as the main process has decided."""

    path: Path
    changes: list[Change]
    notes: list[str]
    lock: FileLock | None = None


class RunFolder(Generic[Config]):
    """The folder of a run, as `open_run` has found it.

    Attributes:
        config: the run's config, with the folder's name as `run.name`.
        path: the folder.
        changes: options that are not what they were before.
    """

    def __init__(self, config: Config, dist: Distributed, writes: Sequence[str]):
        run: RunConfig = config.run  # type: ignore[attr-defined]
        self.dist, self._requested, self._writes = dist, run.name, (*_ENGINE_FILES, *writes)
        self._lock: FileLock | None = None

        def look() -> dict[str, Any]:
            found = _find(config, self._writes)
            self._lock = found.lock
            for note in found.notes:
                print(note, flush=True)
            return {"name": found.path.name, "changes": [vars(change) for change in found.changes]}

        # one process decides: ranks that looked for themselves might see the folder in two states
        decided = run_on_main(look, dist)
        self.config: Config = replace(config, run=replace(run, name=decided["name"]))  # type: ignore[type-var]
        self.path = run.output_dir / decided["name"]
        self.changes = [Change(**change) for change in decided["changes"]]

    def begin(self) -> None:
        """Make the folder this run's: lock it, and write its config and how it was started.

        Raises:
            ConfigError: on every rank; the folder cannot be written, or another process has taken it.
        """
        run_on_main(self._begin, self.dist)

    def _begin(self) -> None:
        run: RunConfig = self.config.run  # type: ignore[attr-defined]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:  # a new folder: nobody had it when `open_run` looked, and models were loaded since
                self._lock = _lock(self.path, run.lock_timeout)
                if any((self.path / name).exists() for name in self._writes):
                    raise ConfigError(f"another process has used {self.path} in the meantime: start again")
            # without what it accepted, or a start from the saved config would accept later changes unasked
            saved = replace(self.config, run=replace(run, accept_changes=()))  # type: ignore[type-var]
            session = {
                "name": self._requested,
                "position": _position(self.path),
                "changes": [vars(change) for change in self.changes],
                **describe_session(str(self.dist.device), self.dist.world_size),
            }
            save_config(saved, self.path / CONFIG_FILE)
            with (self.path / SESSIONS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(session, ensure_ascii=False) + "\n")
        except OSError as error:
            _cannot_write(self.path, error)

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished and let others have its folder. To be called after everything else is written.

        Args:
            facts: what else the file says, in JSON's types.
        """
        if not self.dist.main_process:
            return
        run: RunConfig = self.config.run  # type: ignore[attr-defined]
        # the steps, because a run that is made longer afterwards is unfinished again, with this file in its folder
        finished = {"max_steps": run.max_steps, "position": _position(self.path), **facts}
        try:
            write_text(self.path / FINISHED_FILE, json.dumps(finished, indent=1) + "\n")
        except OSError as error:
            _cannot_write(self.path, error)
        self.release()
        print(f"run folder: {self.path}", flush=True)

    def release(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()


def open_run(config: Config, dist: Distributed, *, writes: Sequence[str] = ()) -> RunFolder[Config]:
    """Find the folder of a run and decide whether the run there goes on. Writes nothing but the lock of a run there.

    Args:
        config: a config with a section `run`.
        writes: names of files and folders that the program writes into a run's folder beside the engine's.

    Raises:
        ConfigError: on every rank; the folder holds another run or somebody's files, is in use, or cannot be written.
    """
    return RunFolder(config, dist, writes)


def newest_folder(output_dir: Path, name: str) -> Path:
    """Return the folder of the latest run that was started under a name: `name`, or `name-<number>` beside it."""
    # the number alone says nothing: users name runs of their own like this
    ours = {
        number: path
        for number, path in _numbered(output_dir, name)
        if path.is_dir() and _first_session(path).get("name") == name
    }
    return ours[max(ours)] if ours else output_dir / name


def changed_options(saved: Mapping[str, Any], config: Any) -> list[Change]:
    """Compare a saved config with today's, option by option.

    An option that the saved one lacks counts as its default. Of a path it counts only whether there is one, since
    folders move.

    Args:
        saved: nested dicts, as `yaml.safe_load` reads them from a run's `config.yaml`.
    """
    saved, today = translate_saved_config(saved, type(config)), to_dict(config)
    members = options(type(config), _chosen_names(type(config), today))
    before, now = dict(_leaves(saved, members)), dict(_leaves(today, members))
    changes: list[Change] = []
    replaced: list[str] = []  # sections whose options are another entry's: that another is chosen says it all
    for key in {**now, **before}:
        old, new = before.get(key, _NOT_SET), now.get(key, _NOT_SET)
        if old == new or any(key.startswith(f"{section}.") for section in replaced):
            continue
        member = members.get(key)
        if member is not None and member.selects:  # declared above its section, so met before it
            replaced.append(member.selects)
        free = member is not None and key in before and key in now and _is_free(member, old, new, config)
        changes.append(Change(key, _shown(old), _shown(new), free))
    return changes


def _find(config: Any, writes: Collection[str]) -> _Found:
    """Find the folder of a run, and lock it if the run there goes on."""
    run: RunConfig = config.run
    # the training data is accepted where it is read, in the training loop
    keys = [*options(type(config)), CONFIG_FILE, "data"]
    path = newest_folder(run.output_dir, run.name)
    _check_place(path)
    saved = _read_saved(path, run, writes)
    if saved is None:
        _check_accepted(run.accept_changes, keys)
        return _Found(path, [], [])
    lock = None
    finished_at = _finished_at(path, saved)
    if run.resume and (finished_at is None or run.max_steps > finished_at):
        lock = _lock(path, run.lock_timeout)
        # again: while this process waited for the lock, the one that held it may have finished the run
        saved = _read_saved(path, run, writes) or {}
        finished_at = _finished_at(path, saved)
    try:
        # nothing to compare with where the user has accepted a damaged config
        changes = changed_options(saved, config) if saved else []
        # the saved name is the folder's, with a number that nobody gave; what was accepted is never saved
        changes = [change for change in changes if change.key not in ("run.name", "run.accept_changes")]
        _check_accepted(run.accept_changes, [*keys, *(change.key for change in changes)])
        refused = [change for change in changes if not change.free and not _accepts(run.accept_changes, change.key)]
        # a finished run goes on where that means more of the same; without a checkpoint it would begin again
        more = finished_at is not None and run.max_steps > finished_at and _steps(path / "checkpoints") > 0
        if run.resume and (finished_at is None or (more and not refused)):
            if refused and _has_progress(path):
                _refuse(path, refused)
            place = _position(path)
            notes = [f"run folder: {path}, going on at {place}", *(f"{change} from {place} on" for change in changes)]
            kept, lock = lock, None
            return _Found(path, changes, notes, kept)
    finally:
        if lock is not None:
            lock.release()
    beside = path.with_name(f"{run.name}-{1 + max((n for n, _ in _numbered(run.output_dir, run.name)), default=1)}")
    why = "holds a finished run" if run.resume else "stays as it is, since run.resume is false"
    return _Found(beside, [], [f"run folder: {beside} ({path} {why})"])


# --- what is in a folder -------------------------------------------------------------------------------------------


def _read_saved(path: Path, run: RunConfig, writes: Collection[str]) -> dict[str, Any] | None:
    """Read the config of the run in a folder.

    Returns:
        None if there is no run and nothing to overwrite; empty if the user has accepted a damaged config.

    Raises:
        ConfigError: the config cannot be read, or the folder holds files of somebody else.
    """
    present = [name for name in writes if (path / name).exists()]
    try:
        saved = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
        if isinstance(saved, dict) and isinstance(saved.get("run"), dict):
            return saved
        reason = "is empty" if saved is None else "is cut or of another program (it has no section `run`)"
    except FileNotFoundError:
        reason = "is missing"
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: bytes that are not UTF-8
        reason = f"cannot be read ({' '.join(str(error).split())})"
    if not present:
        return None
    # two levels and no deeper: the folder may be somebody's home
    checkpoints = (*path.glob("checkpoints/step-*/trainer_state.json"), *path.glob("*/checkpoints/step-*"))
    if (path / SESSIONS_FILE).exists() or checkpoints:
        if CONFIG_FILE in run.accept_changes:
            return {}
        raise ConfigError(
            f"{path} holds a run (at {_position(path)}) whose {CONFIG_FILE} {reason}: restore it, go on with the "
            f"options that you give with --run.accept_changes {CONFIG_FILE}, or choose another --run.name"
        )
    raise ConfigError(
        f"{path} holds {present[0]}, which a run would overwrite, and no {CONFIG_FILE} of a run: choose another "
        "--run.name or --run.output_dir"
    )


def _finished_at(path: Path, saved: Mapping[str, Any]) -> int | None:
    """Return the steps after which the run in a folder finished; None if it is unfinished."""
    max_steps = saved.get("run", {}).get("max_steps", RunConfig.max_steps)
    if not (path / SESSIONS_FILE).exists():
        return max_steps if (path / _FINISHED_BEFORE).is_file() else None
    try:
        finished = json.loads((path / FINISHED_FILE).read_text(encoding="utf-8"))["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # it stays when a finished run is made longer, and then says less than the config
    return finished if isinstance(finished, int) and finished >= max_steps else None


def _steps(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint in a folder, 0 if there is none."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in checkpoints.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=0)


def _position(path: Path) -> str:
    """Say how far a run is: the step of its newest checkpoint, with the stage if that is not the last one."""
    if step := _steps(path / "checkpoints"):
        return f"step {step}"
    stages = {folder.parent.name: _steps(folder) for folder in path.glob("*/checkpoints")}
    # the latest stage: a run's stages follow each other, and each writes its own folder
    found = [(os.path.getmtime(path / stage / "checkpoints"), stage) for stage, step in stages.items() if step]
    return f"step {stages[max(found)[1]]} of {max(found)[1]}" if found else "step 0"


def _has_progress(path: Path) -> bool:
    """Whether the run in a folder has made a step, in any of its stages."""
    logs = (*path.glob("metrics.jsonl"), *path.glob("*/metrics.jsonl"))
    return _position(path) != "step 0" or any(log.stat().st_size for log in logs)


def _numbered(output_dir: Path, name: str) -> Iterator[tuple[int, Path]]:
    """List what is called `<name>-<number>`."""
    for path in output_dir.glob("*"):
        number = path.name.removeprefix(f"{name}-")
        if number != path.name and number.isdecimal() and number.isascii():
            yield int(number), path


def _first_session(path: Path) -> dict[str, Any]:
    try:
        with (path / SESSIONS_FILE).open(encoding="utf-8") as file:
            session = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return session if isinstance(session, dict) else {}


# --- comparing options ---------------------------------------------------------------------------------------------


def _leaves(tree: Mapping[str, Any], members: Mapping[str, Member], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List keys and values of nested dicts; an option that holds a mapping is one value."""
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in members:
            yield from _leaves(value, members, f"{key}.")
        else:
            yield key, value


def _chosen_names(cls: type, tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the registry entries that a config chooses, by key of their selector."""
    selectors = {key: member for key, member in options(cls).items() if member.selects}
    return {key: value for key, value in _leaves(tree, selectors) if key in selectors}


def _is_free(member: Member, old: Any, new: Any, config: Any) -> bool:
    if member.free:
        return member.free is True or member.free(config)
    if holds_paths(member.type):
        return (old is None) == (new is None)
    return _without_folders(old) == _without_folders(new)


def _without_folders(value: Any) -> Any:
    """Leave the folders out of import paths (`folder/file.py:name`)."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and (match := _IMPORT_PATH.fullmatch(value)):
        return f"{Path(match[1]).name}:{match[2]}"
    return value


def _shown(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(map(_shown, value)) or "empty"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def _accepts(accepted: Sequence[str], key: str) -> bool:
    """Whether a key is accepted: by its whole name, its last name, or its section."""
    return any(key == name or key.endswith(f".{name}") or key.startswith(f"{name}.") for name in accepted)


def _check_accepted(accepted: Sequence[str], known: Sequence[str]) -> None:
    for name in accepted:
        if not any(_accepts([name], key) for key in known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists every key"
            raise ConfigError(f"run.accept_changes names {name!r}, which is no option: {hint}")


def _refuse(path: Path, refused: Sequence[Change]) -> NoReturn:
    # two of one experiment differ in a few options; more than these say that it is another experiment
    listed = [str(change) for change in refused[:6]] + [f"{len(refused) - 6} more differ"] * (len(refused) > 6)
    keys = ",".join(change.key for change in refused)
    raise ConfigError(
        f"{path} holds an unfinished run (at {_position(path)}) of other options ({'; '.join(listed)}): choose another "
        f"--run.name, give the old values to go on as before, or go on with the new ones by --run.accept_changes {keys}"
    )


# --- the disk ------------------------------------------------------------------------------------------------------


def _lock(path: Path, wait_seconds: float) -> FileLock:
    try:
        return FileLock(path / LOCK_FILE, wait_seconds)
    except LockHeld as error:
        raise ConfigError(f"{path} is in use by {error}: wait for it, end it, or choose another --run.name") from None
    except OSError as error:
        _cannot_write(path, error)


def _check_place(path: Path) -> None:
    """Refuse a folder that cannot be made, before anything is loaded."""
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise ConfigError(
            f"{existing} is not a folder, where the run's folder {path} would be: choose another --run.name or "
            "--run.output_dir"
        )
    # of a run that is there, its lock shows whether it can be written; a finished one need not be
    if existing != path and not os.access(existing, os.W_OK | os.X_OK):
        _cannot_write(existing, PermissionError(0, "no permission"))


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    raise ConfigError(
        f"{error.filename or path} cannot be written ({error.strerror or error}): choose another --run.output_dir, or "
        "make room and permissions for it"
    ) from error
