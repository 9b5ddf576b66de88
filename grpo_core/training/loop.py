"""Base of the training loops: what surrounds a step, from progress and evaluation to early stopping and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grpo_core.config.options import OptimConfig, RunConfig
from grpo_core.distributed import (
    Distributed,
    barrier,
    broadcast_parameters,
    require_same,
)
from grpo_core.policy import Policy
from grpo_core.storage.checkpoint import CheckpointError, CheckpointManager, read_manifest
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.training.accumulator import MetricAccumulator, PhaseClock, postfix
from grpo_core.training.optim import make_optimizer
from grpo_core.verify import verify_model

TRAINED_FILE = "trained.safetensors"


class TrainingLoop:
    """Base of the loops: `train` calls `step`, which a subclass writes, until the run is over.

    Args:
        policy: its trained parameters are what is optimised and checkpointed.
        optim, run: see their classes.
        dist: this process's place among the ranks.
        save_model: writes a loadable model into a folder; called for every checkpoint.
        evaluate: gives metrics (`eval/…`) of the policy as it is; called on every rank.
    """

    phases: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    """Metrics in the progress bar, beside `run.metric_for_best_model`."""

    def __init__(
        self,
        policy: Policy,
        optim: OptimConfig,
        run: RunConfig,
        *,
        dist: Distributed | None = None,
        save_model: Callable[[Path], Any] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ):
        # before anything is made of its weights: a model that packed groups are wrong for would be trained on noise
        verify_model(policy.causal_lm)
        self.policy, self.optim, self.run = policy, optim, run
        self.dist = dist or Distributed()
        self.save_model, self.evaluate = save_model, evaluate
        self.parameters = policy.named_parameters()
        self.optimizer = make_optimizer(self.parameters, optim)
        self.metrics = MetricAccumulator(self.dist)
        self.clock = PhaseClock(self.phases, policy.device)
        self.step_index = 0
        self.best: float | None = None
        self.evaluations_since_best = 0
        self.checkpoints = CheckpointManager(
            run.folder / "checkpoints", keep_last=run.keep_checkpoints, keep_best=int(bool(run.metric_for_best_model))
        )
        # Fresh adapters are drawn from a seed, but on several kinds of device: rank 0's values are everyone's.
        broadcast_parameters(self.parameters.values(), self.dist)

    def step(self) -> dict[str, float]:
        """Make step `step_index`, advance it, and return the step's metrics."""
        raise NotImplementedError

    def train(self) -> None:
        """Run from where the newest checkpoint stands to `run.max_steps`, or until early stopping.

        Afterwards the policy is the last one, or the best evaluated one where `run.metric_for_best_model` is set.
        """
        run, main = self.run, self.dist.main_process
        if run.resume:
            self.resume()
        # After resuming: lines that a killed run wrote beyond its last checkpoint are dropped, their steps come again.
        writer = self.open_writer(self.step_index or None) if main else None
        bar = tqdm(total=run.max_steps, initial=self.step_index, desc=run.name, unit="step", disable=not main)
        while self.step_index < run.max_steps and not self.out_of_patience:
            values = self.step()
            metric = None
            # on every rank: an evaluation samples, which all ranks do together
            if self.evaluate is not None and run.eval_steps and self.step_index % run.eval_steps == 0:
                values |= self.evaluate()
                metric = self.follow_best(values)
            if writer is not None:
                writer.write(self.step_index, values)
                bar.set_postfix(postfix(values, (*self.shown, run.metric_for_best_model)))
                bar.update()
            # Every evaluated model is saved, since it may turn out to be the best one; older ones are pruned.
            finished = self.step_index >= run.max_steps or self.out_of_patience
            if metric is not None or (run.save_steps and (self.step_index % run.save_steps == 0 or finished)):
                self.save(metric)
        bar.close()
        if writer is not None:
            writer.close()
        # The file, not a copy in memory: what is returned is what a later run can load.
        if run.metric_for_best_model and (best := self.checkpoints.best()):
            self.load_trained(best)

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        """Open the run's metrics file, on the main process."""
        return MetricsWriter(self.run.folder, resume_step, self.run.trackers)

    def extra_state(self) -> dict[str, Any]:
        """What else a resumed run needs, in JSON's types."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state`."""

    def extra_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors that a resumed run needs beside the trained parameters, by file and name; filled in place."""
        return {}

    @property
    def out_of_patience(self) -> bool:
        """Early stopping: the metric has not risen for `run.early_stopping_patience` evaluations."""
        return 0 < self.run.early_stopping_patience <= self.evaluations_since_best

    def follow_best(self, values: Mapping[str, float]) -> float | None:
        """Note whether this evaluation is the best so far; returns its metric, None where none is followed.

        Raises:
            ValueError: the evaluation lacks the metric that the run follows.
        """
        name = self.run.metric_for_best_model
        if not name:
            return None
        if name not in values:
            raise ValueError(f"run.metric_for_best_model is {name!r}, but an evaluation gives {', '.join(values)}")
        # NaN (nothing could be scored) is no best, but counts as an evaluation without one
        if math.isfinite(values[name]) and (self.best is None or values[name] > self.best):
            self.best, self.evaluations_since_best = values[name], 0
        else:
            self.evaluations_since_best += 1
        return values[name]

    def save(self, metric: float | None = None) -> None:
        """Write a checkpoint of this step, on the main process."""

        def write_model(folder: Path) -> None:
            files = {TRAINED_FILE: self.parameters, **self.extra_tensors()}
            for name, tensors in files.items():
                save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
            if self.save_model:
                self.save_model(folder)

        if self.dist.main_process:
            self.checkpoints.save(
                self.step_index,
                save_model=write_model,
                optimizer=self.optimizer,
                named_parameters=self.parameters.items(),
                state={
                    "best": self.best,
                    "evaluations_since_best": self.evaluations_since_best,
                    "loop": self.extra_state(),
                },
                metric=metric,
            )
        barrier(self.dist)  # no rank may look for a checkpoint that is still being written

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run, if there is one.

        Random numbers need no restoring: sampling, data order and dropout are keyed by seed and step.

        Raises:
            CheckpointError: it is of another model.
            RuntimeError: ranks see different checkpoints (a folder that is not shared).
        """
        folder = self.checkpoints.latest()
        # Ranks on machines that do not share the folder would train different models from here on.
        require_same("the newest checkpoint", folder and folder.name, self.dist)
        if folder is None:
            return
        # Parameters before the optimiser: its moments are moved to where the parameters are.
        self.load_trained(folder)
        self.checkpoints.load_optimizer(folder, self.optimizer, self.parameters.items())
        manifest = read_manifest(folder)
        self.step_index = manifest["step"]
        self.best = manifest["state"]["best"]
        self.evaluations_since_best = manifest["state"]["evaluations_since_best"]
        self.load_extra_state(manifest["state"]["loop"])
        for name, tensors in self.extra_tensors().items():
            _load_into(tensors, folder / "model" / name)

    def load_trained(self, folder: Path) -> None:
        """Give the trained parameters the values of a checkpoint.

        Raises:
            CheckpointError: names or shapes differ.
        """
        _load_into(self.parameters, folder / "model" / TRAINED_FILE)


@torch.no_grad()
def _load_into(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give tensors the values that a file holds under their names."""
    saved = load_file(path)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(f"{path} holds other parameters: resume with the configuration it was trained with")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
