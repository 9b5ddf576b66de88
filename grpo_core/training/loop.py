"""Base of the training loops: what surrounds a step, from progress and evaluation to early stopping and checkpoints."""

from __future__ import annotations

import hashlib
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grpo_core.config.options import OptimConfig, RunConfig
from grpo_core.distributed import (
    Distributed,
    broadcast_parameters,
    finalize,
    max_over_ranks,
    require_same,
    run_on_main,
)
from grpo_core.distributed.stopping import StepDropped, Stopped, listen, requested, say
from grpo_core.distributed.watchdog import activity
from grpo_core.errors import DivergedError, InputError, TrainingStopped
from grpo_core.policy import Policy
from grpo_core.storage.checkpoint import (
    TRAINED_FILE,
    CheckpointError,
    CheckpointManager,
    read_manifest,
    require_finite,
)
from grpo_core.storage.files import require_space
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.training.accumulator import MetricAccumulator, PhaseClock, postfix
from grpo_core.training.guards import Guards
from grpo_core.training.optim import make_optimizer
from grpo_core.verify import verify_model


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
        if evaluate is None and run.metric_for_best_model:
            raise InputError(
                f"run.metric_for_best_model is {run.metric_for_best_model}, but nothing is evaluated in this run: "
                "leave it out, or give the run validation samples"
            )
        if evaluate is None and run.eval_steps:
            warnings.warn(
                f"run.eval_steps is {run.eval_steps}, but nothing is evaluated in this run: leave it out, or give the "
                "run validation samples",
                stacklevel=3,
            )
        # before anything is made of its weights: a model that packed groups are wrong for would be trained on noise
        verify_model(policy.causal_lm)
        self.policy, self.optim, self.run = policy, optim, run
        self.dist = dist or Distributed()
        self.save_model, self.evaluate = save_model, evaluate
        self.parameters = policy.named_parameters()
        self.optimizer = make_optimizer(self.parameters, optim)
        self.metrics = MetricAccumulator(self.dist)
        self.clock = PhaseClock(self.phases, policy.device)
        self.guards = Guards(run, self.way_out, speak=self.dist.main_process)
        self.step_index = 0
        self.saved_step = 0  # of the newest checkpoint
        self.save_due = False  # a checkpoint waits for a step with a finite gradient
        self.unevaluated: dict[str, float] | None = None
        """Metrics of the step that has been made and not yet evaluated."""
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

        Raises:
            Stopped: a signal asked to stop. A step that had not moved the weights was dropped, any other one finished,
                and the run is saved as it was before or after it.
            DivergedError: the policy's weights or logits, or the last steps' gradients, are not finite.
            CheckpointError: a checkpoint cannot be taken up.
            TrainingStopped: a guard's limit is reached, and the run is saved first; or a checkpoint cannot be written.
        """
        run, main = self.run, self.dist.main_process
        signum, saved_at = 0, time.monotonic()
        # a checkpoint holds the parameters, their two moments, and the parameters again as a model that can be loaded
        size = 4 * sum(p.numel() * p.element_size() for p in self.parameters.values())
        run_on_main(lambda: require_space(run.folder, size, "a checkpoint of this run"), self.dist)
        with listen(self.dist), ExitStack() as opened:
            if run.resume:
                self.resume()
            # After resuming: lines that a killed run wrote beyond its last checkpoint are dropped, and come again.
            writer = self.open_writer(self.step_index or None) if main else None
            if writer is not None:
                opened.callback(self.close_writer, writer)
            bar = opened.enter_context(
                tqdm(total=run.max_steps, initial=self.step_index, desc=run.name, unit="step", disable=not main)
            )
            while not signum and (self.unevaluated is not None or not self.finished):
                metric, due = None, False
                try:
                    # A run that was stopped while it evaluated has that step's metrics, and evaluates first.
                    values = self.step() if self.unevaluated is None else self.unevaluated
                    # on every rank: an evaluation samples, which all ranks do together
                    if self.evaluate is not None and run.eval_steps and self.step_index % run.eval_steps == 0:
                        self.unevaluated = values
                        activity.phase = "evaluate"
                        values = values | self.evaluate()
                    self.unevaluated = None
                except StepDropped as dropped:
                    signum = dropped.signum
                except FloatingPointError as error:  # from the sampler, which reads the policy's logits
                    raise DivergedError(f"after step {self.step_index} {error}. {self.way_out()}") from error
                else:
                    if writer is not None:
                        writer.write(self.step_index, values)
                        bar.set_postfix(postfix(values, (*self.shown, run.metric_for_best_model)))
                        bar.update()
                    # After its metrics are written, so that a run that is stopped shows why; before anything is saved.
                    try:
                        self.guards.check(self.step_index, values)
                    except TrainingStopped:  # on every rank alike
                        # The steps so far are good, unless gradients are not finite, of which `save` writes nothing.
                        self.save()
                        raise
                    if not self.steps_without_gradient:
                        metric = self.follow_best(values)
                    # One clock for all ranks, rank 0's; and a signal of any rank.
                    late = run.save_minutes > 0 and time.monotonic() - saved_at >= 60 * run.save_minutes
                    signum, by_time = max_over_ranks(
                        [requested(), int(late and main and not run.save_steps)], self.dist
                    )
                    by_step = run.save_steps > 0 and self.step_index % run.save_steps == 0
                    due = bool(by_time) or by_step or (self.finished and bool(run.save_steps or run.save_minutes))
                # Every evaluated model is saved, since it may turn out to be the best one; older ones are pruned.
                if metric is not None or due or self.save_due or signum:
                    self.save(metric)
                    saved_at = time.monotonic()
            opened.close()  # before anything is said below the progress bar
            self.guards.say_summary()
            if signum:
                self.stop(signum)
        # The file, not a copy in memory: what is returned is what a later run can load.
        if run.metric_for_best_model and (best := self.checkpoints.best()):
            self.load_trained(best)
        elif self.steps_without_gradient > 1:
            # such a model may answer nothing but noise, though its weights are numbers
            raise DivergedError(
                f"no gradient was finite in the last {self.steps_without_gradient} steps. {self.way_out()}"
            )
        require_finite(self.parameters.items(), f"after step {self.step_index}")

    @property
    def finished(self) -> bool:
        """All steps are made, or early stopping has ended the run."""
        return self.step_index >= self.run.max_steps or self.out_of_patience

    @property
    def steps_without_gradient(self) -> int:
        """Steps in a row, up to the newest, whose gradient was not finite, and so changed nothing."""
        return self.guards.counts.nonfinite_in_a_row

    def way_out(self) -> str:
        """Say what can be done about a diverged run, for an error's end."""
        kept = self.checkpoints.newest()
        back = f"{kept} is the newest checkpoint" if kept else "there is no checkpoint to go back to"
        return f"Lower optim.learning_rate (or algorithm.beta, or optim.max_grad_norm); {back}"

    def stop(self, signum: int) -> None:
        """Leave the other ranks and the program, after the run has been saved.

        Raises:
            Stopped: always.
        """
        if self.dist.main_process:
            kept = self.checkpoints.newest()
            saved = f"{kept} is saved" if kept else "no step was complete yet"
            say(f"{signal.Signals(signum).name}: {self.run.name} stops; {saved}. The same command goes on from there")
        finalize(self.dist)
        raise Stopped(signum)

    def open_writer(self, resume_step: int | None) -> MetricsWriter:
        """Open the run's metrics file, on the main process."""
        # the metrics of a step that is still to be evaluated come again, whatever a killed run wrote of them
        if resume_step is not None and self.unevaluated is not None:
            resume_step -= 1
        return MetricsWriter(self.run.folder, resume_step, self.run.trackers)

    def close_writer(self, writer: MetricsWriter) -> None:
        """Close the files that `open_writer` opened, however training ends."""
        writer.close()

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """What tells the training data from others, in JSON's types; see `describe_items`."""
        return {}

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
            InputError: the evaluation lacks the metric that the run follows.
        """
        name, run = self.run.metric_for_best_model, self.run
        if not name or self.evaluate is None or not run.eval_steps or self.step_index % run.eval_steps:
            return None
        if name not in values:
            raise InputError(f"run.metric_for_best_model is {name!r}, but an evaluation gives {', '.join(values)}")
        # NaN (nothing could be scored) is no best, but counts as an evaluation without one
        if math.isfinite(values[name]) and (self.best is None or values[name] > self.best):
            self.best, self.evaluations_since_best = values[name], 0
        else:
            self.evaluations_since_best += 1
        return values[name]

    def save(self, metric: float | None = None) -> None:
        """Write a checkpoint of the run as it is, on the main process; none where the newest one is of this moment.

        While gradients are not finite nothing is written, since it would displace checkpoints of a better time: what is
        due is written after the next step that learns something.

        Raises:
            TrainingStopped: on every rank, if it could not be written.
            DivergedError: on every rank, if the weights are not finite.
        """
        # the last step may be an exception; a run that ends in several is stopped by `train`
        self.save_due = self.steps_without_gradient > int(self.finished)
        # step 0 is what the same command makes anew
        if self.save_due or self.step_index in (0, self.saved_step):
            return

        def write_model(folder: Path) -> None:
            files = {TRAINED_FILE: self.parameters, **self.extra_tensors()}
            for name, tensors in files.items():
                save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
            if self.save_model:
                self.save_model(folder)

        activity.phase = "save"

        def write() -> None:
            unevaluated = None
            if self.unevaluated is not None:  # as text: JSON has no NaN, and a metric may be one
                unevaluated = {name: repr(float(value)) for name, value in self.unevaluated.items()}
            self.checkpoints.save(
                self.step_index,
                save_model=write_model,
                optimizer=self.optimizer,
                named_parameters=self.parameters.items(),
                state={
                    "best": self.best,
                    "evaluations_since_best": self.evaluations_since_best,
                    "guards": self.guards.state_dict(),
                    "unevaluated": unevaluated,
                    "data": dict(self.data),
                    "loop": self.extra_state(),
                },
                metric=metric,
            )

        # Also a barrier: no rank may look for a checkpoint that is still being written.
        run_on_main(write, self.dist)
        self.saved_step = self.step_index

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run, if there is one.

        Random numbers need no restoring: sampling, data order and dropout are keyed by seed and step.

        Raises:
            CheckpointError: it is of another model, or of other training data; or there are checkpoints and none is
                whole.
            RuntimeError: ranks see different checkpoints (a folder that is not shared).
        """
        folder, problem = None, None
        try:
            folder = self.checkpoints.latest()
        except CheckpointError as error:
            problem = error
        # Ranks on machines that do not share the folder would train different models from here on.
        require_same("the newest checkpoint", folder.name if folder else str(problem), self.dist)
        if problem is not None:
            raise problem
        if folder is None:
            return
        manifest = read_manifest(folder)
        self.require_same_data(folder, manifest["state"].get("data"))
        # Parameters before the optimiser: its moments are moved to where the parameters are.
        self.load_trained(folder)
        # This run's options, not the checkpoint's: they are the same, or the user has accepted the change.
        options = [
            {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.checkpoints.load_optimizer(folder, self.optimizer, self.parameters.items())
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        self.step_index = manifest["step"]
        self.best = manifest["state"]["best"]
        self.evaluations_since_best = manifest["state"]["evaluations_since_best"]
        self.guards.load_state_dict(manifest["state"].get("guards", {}))  # an older checkpoint has none
        if unevaluated := manifest["state"].get("unevaluated"):
            self.unevaluated = {name: float(text) for name, text in unevaluated.items()}
        else:
            self.saved_step = self.step_index
        self.load_extra_state(manifest["state"]["loop"])
        for name, tensors in self.extra_tensors().items():
            # absent where the run has accepted the option that needs it: it then begins as in a new run
            if (folder / "model" / name).exists():
                _load_into(tensors, folder / "model" / name)

    def require_same_data(self, folder: Path, saved: Mapping[str, Any] | None) -> None:
        """Refuse a checkpoint of other training data: its steps would be another order's, and samples be left out.

        Args:
            saved: what `data` gave; None or empty in a checkpoint of an earlier version.

        Raises:
            CheckpointError: they differ, and `run.accept_changes` does not name `data`.
        """
        now = dict(self.data)
        if not saved or saved == now or "data" in self.run.accept_changes:
            return
        raise CheckpointError(
            f"{folder} was trained on other data: {saved['items']} items then and {now['items']} now, or others by id "
            "or tokens (a clip that cannot be read is left out): give the old data, take these from here on with "
            "--run.accept_changes data, or choose another --run.name"
        )

    def load_trained(self, folder: Path) -> None:
        """Give the trained parameters the values of a checkpoint.

        Raises:
            CheckpointError: names or shapes differ.
        """
        _load_into(self.parameters, folder / "model" / TRAINED_FILE)


def describe_items(items: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """Describe training data by the number of its items, and a digest of their ids and tokens in order."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for name, token_ids in items:
        # lengths too, or "a" and "bc" would be "ab" and "c"
        digest.update(f"{len(name.encode())},{len(token_ids)};{name}".encode())
        digest.update(np.asarray(token_ids, np.int64).tobytes())
        count += 1
    return {"items": count, "digest": digest.hexdigest()}


@torch.no_grad()
def _load_into(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give tensors the values that a file holds under their names."""
    saved = load_file(path)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(f"{path} holds other parameters: resume with the configuration it was trained with")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
