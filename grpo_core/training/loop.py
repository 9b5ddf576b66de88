"""What every training loop needs around its step: progress, metrics, evaluation, early stopping, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grpo_core.config.options import OptimConfig, RunConfig
from grpo_core.distributed.collectives import (
    Distributed,
    all_reduce_gradients,
    barrier,
    broadcast_parameters,
    require_same,
)
from grpo_core.policy import Policy
from grpo_core.storage.checkpoint import CheckpointError, CheckpointManager, read_manifest
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.training.accumulator import StepMetrics, postfix
from grpo_core.training.optim import learning_rate, make_optimizer, optimizer_step
from grpo_core.training.timing import PhaseClock

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
    """Metrics in the progress bar."""

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
        self.policy, self.optim, self.run = policy, optim, run
        self.dist = dist or Distributed()
        self.save_model, self.evaluate = save_model, evaluate
        self.parameters = policy.named_parameters()
        self.optimizer = make_optimizer(self.parameters, optim)
        self.metrics = StepMetrics(self.dist)
        self.clock = PhaseClock(self.phases, policy.device)
        self.step_index = 0
        self.best: float | None = None
        self.evaluations_since_best = 0
        self.checkpoints = CheckpointManager(
            run.folder / "checkpoints", keep_last=run.keep_checkpoints, keep_best=int(bool(run.metric_for_best_model))
        )
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
        self.writer = self.open_writer(self.step_index or None) if main else None
        bar = tqdm(total=run.max_steps, initial=self.step_index, desc=run.name, unit="step", disable=not main)
        while self.step_index < run.max_steps and not self.out_of_patience:
            values = self.step()
            metric = None
            if run.eval_steps and self.evaluate and self.step_index % run.eval_steps == 0:
                values |= self.evaluate()
                metric = self.compare_with_best(values)
            if main:
                self.writer.write(self.step_index, values)
                bar.set_postfix(postfix(values, self.shown))
                bar.update()
            finished = self.step_index >= run.max_steps or self.out_of_patience
            if metric is not None or (run.save_steps and (self.step_index % run.save_steps == 0 or finished)):
                self.save(metric)
        bar.close()
        if main:
            self.writer.close()
        if run.metric_for_best_model and (best := self.checkpoints.best()):
            self.load_trained(best)

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        """The run's metrics file, on the main process."""
        return MetricsWriter(self.run.folder, resume_step, tensorboard=self.run.tensorboard)

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs, in JSON's types."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""

    def more_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a resumed run needs beside the trained parameters: tensors by file and name, filled in place."""
        return {}

    def optimizer_step(self, schedule_step: int, schedule_length: int) -> None:
        """Sum gradients over ranks, clip, and step with the scheduled learning rate."""
        all_reduce_gradients(self.parameters.values(), self.dist)
        lr = learning_rate(schedule_step, schedule_length, self.optim)
        norm = optimizer_step(self.optimizer, self.parameters.values(), lr, self.optim.max_grad_norm)
        self.metrics.mean("grad_norm", norm)
        self.metrics.mean("learning_rate", lr)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the seconds spent inside to a phase."""
        return self.clock.phase(name)

    def report_phases(self) -> None:
        """Put the step's phase times, those of the slowest rank, among its metrics."""
        for name, value in self.clock.read().items():
            self.metrics.max(f"time/{name}", value)

    @property
    def out_of_patience(self) -> bool:
        """Early stopping: the metric has not risen for `run.early_stopping_patience` evaluations."""
        return 0 < self.run.early_stopping_patience <= self.evaluations_since_best

    def compare_with_best(self, values: dict[str, float]) -> float | None:
        """Note whether this evaluation is the best so far; returns its metric, None where none is followed."""
        name = self.run.metric_for_best_model
        if not name:
            return None
        if name not in values:
            raise ValueError(f"run.metric_for_best_model is {name!r}, but an evaluation gives {', '.join(values)}")
        if math.isfinite(values[name]) and (self.best is None or values[name] > self.best):
            self.best, self.evaluations_since_best = values[name], 0
        else:
            self.evaluations_since_best += 1
        return values[name]

    def save(self, metric: float | None = None) -> None:
        """Write a checkpoint of this step, on the main process."""

        def save_model(folder: Path) -> None:
            trained = {name: p.detach().contiguous() for name, p in self.parameters.items()}
            save_file(trained, folder / TRAINED_FILE)
            for name, tensors in self.more_tensors().items():
                save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name)
            if self.save_model:
                self.save_model(folder)

        if self.dist.main_process:
            self.checkpoints.save(
                self.step_index,
                save_model=save_model,
                optimizer=self.optimizer,
                named_parameters=self.parameters.items(),
                state={
                    "best": self.best,
                    "evaluations_since_best": self.evaluations_since_best,
                    "loop": self.state(),
                },
                metric=metric,
            )
        barrier(self.dist)

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run, when there is one.

        Raises:
            CheckpointError: it is of another model.
        """
        folder = self.checkpoints.latest()
        require_same("the newest checkpoint", folder and folder.name, self.dist)
        if folder is None:
            return
        self.load_trained(folder)
        self.checkpoints.load_optimizer(folder, self.optimizer, self.parameters.items())
        manifest = read_manifest(folder)
        self.step_index = manifest["step"]
        self.best = manifest["state"]["best"]
        self.evaluations_since_best = manifest["state"]["evaluations_since_best"]
        self.load_state(manifest["state"]["loop"])
        for name, tensors in self.more_tensors().items():
            _fill(tensors, folder / "model" / name)

    def load_trained(self, folder: Path) -> None:
        """Give the trained parameters the values of a checkpoint.

        Raises:
            CheckpointError: names or shapes differ.
        """
        _fill(self.parameters, folder / "model" / TRAINED_FILE)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give tensors the values that a file holds under their names."""
    saved = load_file(path)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(f"{path} holds other parameters: resume with the configuration it was trained with")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
