"""Checkpoints that are either complete or absent, and from which a run continues bit for bit.

A checkpoint is a folder `step-000123`:

    trainer_state.json       step, metric, the trainer's own state, optimiser options; size and SHA-256 of the other
                             files, and its own SHA-256
    optimizer.safetensors    `<parameter name>/<state name>`, e.g. `layers.0.weight/exp_avg`
    model/                   whatever `save_model(folder)` writes

It is written under a hidden name, flushed to the disk, and renamed: a kill at any moment leaves the earlier ones
untouched. No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from grpo_core.errors import DivergedError, InputError, TrainingStopped
from grpo_core.storage.files import flush
from grpo_core.storage.optimizer_state import NamedParameters, flatten_optimizer, restore_optimizer

STATE_FILE = "trainer_state.json"
TRAINED_FILE = "trained.safetensors"
_KEYS = {"step", "metric", "state", "optimizer_groups", "files"}
# A checkpoint that is being replaced by one of the same step stays under the second name until the new one is in place.
_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")


class CheckpointError(InputError):
    """A checkpoint is incomplete or damaged, or belongs to another model or other data."""


class CheckpointManager:
    """Saves a run's checkpoints under `root`, keeps the last and the best ones, and finds the one to resume from.

    In a run of several processes only the main one saves; all of them may load.
    """

    def __init__(self, root: Path, keep_last: int = 2, keep_best: int = 1) -> None:
        """Keep the `keep_last` ≥ 1 newest checkpoints and, of those with a metric, the `keep_best` ≥ 0 best."""
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be ≥ 1 and keep_best ≥ 0, got {keep_last} and {keep_best}")
        self.root = Path(root)
        self.keep_last, self.keep_best = keep_last, keep_best

    def save(
        self,
        step: int,
        *,
        save_model: Callable[[Path], Any],
        optimizer: Optimizer,
        named_parameters: NamedParameters,
        state: dict[str, Any],
        metric: float | None = None,
    ) -> Path:
        """Write a checkpoint, then delete those that need not be kept.

        Deleted are those neither among the last nor the best, and those of later steps, which a run that resumed from
        an earlier checkpoint has left behind.

        Args:
            step: optimiser steps made so far.
            save_model: writes the model into the folder it is given.
            named_parameters: name and parameter; covers the optimiser's parameters.
            state: the trainer's own state, in JSON's types.
            metric: what `best` compares; None or NaN never counts as best.

        Returns:
            The checkpoint's folder.

        Raises:
            DivergedError: a parameter is not finite.
            TrainingStopped: a file cannot be written (a full disk, missing rights). Earlier checkpoints stay as they
                were.
        """
        named_parameters = list(named_parameters)
        require_finite(named_parameters, f"at step {step}")
        folder = self.root / f"step-{step:06d}"
        # under `root`, because a rename is atomic within one file system only; `_folders` does not match a hidden name
        temporary = self.root / f".writing-step-{step:06d}"
        replaced = folder.with_name(folder.name + ".replaced")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # of any step: a run that was killed while it wrote may resume at an earlier one and never come back to it
            for leftover in (*self.root.glob(".writing-*"), *self.root.glob(".deleting-*")):
                shutil.rmtree(leftover)
            (temporary / "model").mkdir(parents=True)
            save_model(temporary / "model")
            tensors, groups = flatten_optimizer(optimizer, named_parameters)
            save_file(tensors, temporary / "optimizer.safetensors")
            manifest: dict[str, Any] = {
                "step": step,
                # JSON has no NaN; and NaN would break the order in `_ranked`, as it compares false with everything
                "metric": None if metric is None or math.isnan(metric) else float(metric),
                "state": state,
                "optimizer_groups": groups,
                "files": _describe(temporary),  # before the manifest exists, which has its own digest
            }
            manifest["sha256"] = _manifest_digest(manifest)
            (temporary / STATE_FILE).write_text(json.dumps(manifest, indent=1, allow_nan=False))
            # before the rename: a file system may write a folder's new name to the disk before its files' bytes
            flush([*temporary.rglob("*"), temporary])
            # rename does not replace a folder that holds files: a checkpoint of the same step is moved aside first
            if folder.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            temporary.rename(folder)
            flush([self.root])  # the new name itself, before anything older is deleted
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
            kept = self._folders()
            raise TrainingStopped(
                f"the checkpoint of step {step} cannot be written into {self.root} ({error}); "
                f"{f'{kept[-1].name} is the newest one' if kept else 'there is no earlier one'}: make room or mend the "
                "folder's rights, and start the same command again"
            ) from error
        # an error leaves one folder too many, which is no reason to stop a run
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)
        return folder

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is complete, checking every byte of it; None if there is none.

        Damaged ones, and those whose weights are not finite, are passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints, but none is whole; the message says what is wrong with each.
        """
        reasons: list[str] = []
        folder = _first_whole(reversed(self._folders()), reasons)
        if folder is None and reasons:
            raise CheckpointError(
                f"none of the {len(reasons)} checkpoints in {self.root} is whole, and the run would begin anew: "
                f"{'; '.join(reasons)}. Bring one back from a copy, or give another run.name"
            )
        return folder

    def newest(self) -> Path | None:
        """Return the newest checkpoint without reading it; None if there is none."""
        folders = self._folders()
        return folders[-1] if folders else None

    def best(self) -> Path | None:
        """Return the complete checkpoint with the best metric, checked like `latest`; of equals the earliest."""
        return _first_whole(self._ranked())

    def load_optimizer(self, folder: Path, optimizer: Optimizer, named_parameters: NamedParameters) -> None:
        """Restore an optimiser's state and options as they were when the checkpoint was written.

        Args:
            named_parameters: as in `save`; names, shapes, groups and order must be the same.

        Raises:
            CheckpointError: naming the parameters that differ.
        """
        tensors, groups = load_file(folder / "optimizer.safetensors"), read_manifest(folder)["optimizer_groups"]
        try:
            restore_optimizer(optimizer, named_parameters, tensors, groups)
        except InputError as error:
            raise CheckpointError(f"{folder} does not fit the model: {error}") from error

    def _folders(self) -> list[Path]:
        """List all finished checkpoints, oldest first; of two of the same step the replaced one first."""
        found = [(match, path) for path in self.root.glob("step-*") if (match := _FOLDER.fullmatch(path.name))]
        # by number, because names sort as text: step-1000000 comes before step-999999
        return [path for match, path in sorted(found, key=lambda item: (int(item[0][1]), not item[0][2]))]

    def _ranked(self) -> list[Path]:
        """List the checkpoints that have a metric, best first."""
        scored = []
        for folder in self._folders():
            try:
                metric = read_manifest(folder)["metric"]
            except CheckpointError:  # `latest` warns about it when it is the one to resume from
                continue
            if metric is not None:
                scored.append((metric, folder))
        # negated and not reversed: the sort is stable, so of equal metrics the earliest checkpoint comes first
        return [folder for _, folder in sorted(scored, key=lambda item: -item[0])]

    def _prune(self, step: int) -> None:
        """Delete checkpoints neither among the last nor the best, and those of steps after `step`."""
        folders = self._folders()
        # after a resume from an earlier checkpoint: `latest` must not find the steps that are being made again
        abandoned = [folder for folder in folders if int(folder.name.partition(".")[0].removeprefix("step-")) > step]
        kept = [folder for folder in folders if folder not in abandoned]
        # ranked after the abandoned ones are out: one of them would otherwise hold a place among the best
        best = [folder for folder in self._ranked() if folder in kept][: self.keep_best]
        for folder in folders:
            if folder not in (*kept[-self.keep_last :], *best):
                # renamed first: a kill halfway through must not leave a folder that passes for a checkpoint
                hidden = folder.with_name(f".deleting-{folder.name}")
                try:
                    folder.rename(hidden)
                except OSError:
                    continue  # one folder too many is no reason to stop a run
                shutil.rmtree(hidden, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `trainer_state.json`: `step`, `metric`, `state`, `optimizer_groups`, `files`.

    Raises:
        CheckpointError: it is missing, lacks one of these keys, or has changed since it was written.
    """
    path = Path(folder) / STATE_FILE
    try:
        manifest = json.loads(path.read_text())
        # earlier versions wrote no digest; and a damaged key `sha256` is none of the known ones
        written = manifest.pop("sha256", None)
        problem = None
        if manifest.keys() != _KEYS:
            problem = f"its keys are {', '.join(manifest)}"
        elif written is not None and written != _manifest_digest(manifest):
            problem = "it has changed since it was written"
        elif int(path.parent.name.partition(".")[0].removeprefix("step-")) != manifest["step"]:
            problem = f"it says step {manifest['step']}"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error!r}): resume from another checkpoint") from error
    if problem is not None:
        raise CheckpointError(f"{path} is damaged ({problem}): resume from another checkpoint")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content without the digest itself, as JSON: floats keep all their digits in it."""
    return hashlib.sha256(json.dumps(manifest, indent=1, allow_nan=False).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Check that every file of a checkpoint has the size and SHA-256 it was written with, and its weights are finite.

    Raises:
        CheckpointError: naming the file.
    """
    for name, written in read_manifest(folder)["files"].items():
        path = Path(folder) / name
        try:
            found = _digest(path) if path.is_file() else "no such file"
        except OSError as error:  # a disk that fails
            found = str(error)
        if found != written:
            raise CheckpointError(f"{path} has changed since it was written ({found} instead of {written})")
    trained = Path(folder) / "model" / TRAINED_FILE
    if trained.is_file():
        with safe_open(trained, "pt") as tensors:
            try:
                require_finite(((name, tensors.get_tensor(name)) for name in tensors.keys()), f"in {trained}")  # noqa: SIM118
            except DivergedError as error:  # this checkpoint is no good, but an earlier one may be
                raise CheckpointError(str(error)) from error


@torch.no_grad()
def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse weights with NaN or infinity in them.

    Raises:
        DivergedError: naming the first such tensor.
    """
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                f"the weights {where} are not finite ({name}): training has diverged, lower optim.learning_rate"
            )


def _first_whole(folders: Iterable[Path], reasons: list[str] | None = None) -> Path | None:
    """Return the first folder that is whole; what is wrong with those before it is added to `reasons`."""
    for folder in folders:
        try:
            verify(folder)
        except CheckpointError as error:
            # not an error: the checkpoint before it is whole, and a run on a cluster restarts with nobody watching
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=3)
            if reasons is not None:
                reasons.append(str(error))
        else:
            return folder
    return None


def _describe(folder: Path) -> dict[str, list]:
    # sorted: rglob's order is the file system's, and equal checkpoints should have equal manifests
    return {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(path: Path) -> list:
    with path.open("rb") as file:
        # a list, not a tuple: it is compared with what JSON gives back
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
