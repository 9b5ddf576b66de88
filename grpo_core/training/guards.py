"""Watch a run for failures that repeat from step to step: count them, say so, and stop the run at a limit.

A guard looks at the metrics that a step returned. They are over all ranks, so every rank decides alike and none is left
waiting. Every limit is an option of `RunConfig`; docs/reliability.md has the table.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.config.options import RunConfig
from grpo_core.errors import DivergedError, TrainingStopped
from grpo_core.storage.files import write_text

if TYPE_CHECKING:
    from grpo_core.training.batch import Experience, Update

logger = logging.getLogger(__name__)

Failure = tuple[str, int, str]
"""Prompt, member, and what happened."""


@dataclass
class Counts:
    """How often something went wrong: steps of the whole run, and steps in a row up to the newest one."""

    steps: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    idle: int = 0
    idle_in_a_row: int = 0
    unjudged: int = 0
    unjudged_in_a_row: int = 0
    failed_rewards: int = 0


class Guards:
    """Counters of a run, its warnings and its stops.

    Args:
        run: has the limits.
        way_out: says what can be done about a diverged run, for an error's end.
        speak: log warnings; True on the main process alone.
    """

    def __init__(self, run: RunConfig, way_out: Callable[[], str], speak: bool = True):
        self.run, self.way_out, self.speak = run, way_out, speak
        self.masks_truncated = False
        """Whether completions that were cut off are left out of the loss (`algorithm.mask_truncated_completions`)."""
        self.counts = Counts()
        self.failures: Sequence[Mapping[str, Sequence[Failure]]] = ()
        """Some of the newest step's, by rank and reward, on the main process; elsewhere only their share is known."""
        self._silent: dict[str, int] = {}
        """Steps in a row in which a reward judged nothing although others did."""
        self._idle_reasons: dict[str, int] = {}

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Look at what step `step`, counted from 1, returned.

        Args:
            values: its metrics over all ranks; those that a kind of training does not have are not looked at.

        Raises:
            TrainingStopped: a limit is reached, on every rank alike.
        """
        self.counts.steps += 1
        self._check_failures(step, values)
        self._check_unjudged(step, values)
        self._check_gradient(step, values)
        self._check_idle(step, values)
        self.failures = ()

    def _check_failures(self, step: int, values: Mapping[str, float]) -> None:
        shares = {name: values[f"rewards/{name}/failed"] for name in _rewards(values)}
        self.counts.failed_rewards += any(share > 0 for share in shares.values())
        for name, share in shares.items():
            if not share > 0:
                continue
            text = f"reward {name!r} failed on {100 * share:.3g} % of the completions of step {step}"
            if some := [failure for of_rank in self.failures for failure in of_rank.get(name, ())]:
                prompt, member, problem = some[0]
                text += f", such as prompt {prompt!r}, completion {member}: {problem}"
            else:
                text += "; the main process says which, and how"
            if share > self.run.max_reward_failures:
                raise TrainingStopped(
                    f"{text}. A step may have {100 * self.run.max_reward_failures:.3g} % (run.max_reward_failures)"
                )
            self._warn(f"{text}. They were left out")

    def _check_unjudged(self, step: int, values: Mapping[str, float]) -> None:
        if "reward" not in values:
            return
        none = math.isnan(values["reward"])  # no reward judged any completion
        self.counts.unjudged += none
        self.counts.unjudged_in_a_row = self.counts.unjudged_in_a_row + 1 if none else 0
        # a run that is shorter than the limit must not end as if it had trained
        names, limit = _rewards(values), min(self.run.max_unjudged_steps, self.run.max_steps)
        if limit and self.counts.unjudged_in_a_row >= limit:
            raise TrainingStopped(
                f"no completion was judged in {limit} steps in a row, up to step {step}: every value of "
                f"{', '.join(names)} was None or NaN. Look for a missing return, or for samples without what the "
                "reward reads (run.max_unjudged_steps)"
            )
        for name in names:
            silent = math.isnan(values[f"rewards/{name}/mean"]) and not none
            self._silent[name] = self._silent.get(name, 0) + 1 if silent else 0
            if self._silent[name] == self.run.warn_after_idle_steps > 0:
                self._warn(
                    f"reward {name!r} has judged no completion in {self._silent[name]} steps in a row: the others "
                    "alone are trained on"
                )

    def _check_gradient(self, step: int, values: Mapping[str, float]) -> None:
        bad = not math.isfinite(values.get("grad_norm", 0.0))
        counts, limit = self.counts, self.run.max_nonfinite_steps
        counts.nonfinite += bad
        counts.nonfinite_in_a_row = counts.nonfinite_in_a_row + 1 if bad else 0
        if not bad:
            return
        if limit and counts.nonfinite_in_a_row >= limit:
            raise DivergedError(
                f"no gradient was finite in {limit} steps in a row (run.max_nonfinite_steps), up to step {step}. "
                f"{self.way_out()}"
            )
        if counts.nonfinite_in_a_row == 1:
            self._warn(
                f"step {step}: the gradient is not finite, so the step changed nothing; until one is, no checkpoint is "
                f"written. The first such batch of the run is in {self.run.folder}/nonfinite-step-*.json"
            )

    def _check_idle(self, step: int, values: Mapping[str, float]) -> None:
        reason = self._why_idle(values)
        counts = self.counts
        counts.idle += reason is not None
        counts.idle_in_a_row = counts.idle_in_a_row + 1 if reason else 0
        if reason:
            self._idle_reasons[reason] = self._idle_reasons.get(reason, 0) + 1
            if counts.idle_in_a_row == self.run.warn_after_idle_steps > 0:
                self._warn(f"the last {counts.idle_in_a_row} steps, up to step {step}, taught nothing: {reason}")

    def _why_idle(self, values: Mapping[str, float]) -> str | None:
        """Say why a step taught nothing; None if it did, or if its gradient is not finite."""
        norm = values.get("grad_norm", 1.0)
        if not math.isfinite(norm) or (norm != 0 and values.get("effective_groups", 1) > 0):
            return None
        if math.isnan(values.get("reward", 0.0)):
            return "no reward judged a completion"
        if values.get("entropy", 1.0) < 1e-6:
            return (
                "the policy's entropy is 0, so a prompt's completions are all the same: it has collapsed or diverged "
                "(look at the learning rate, the cold start and rollout.temperature)"
            )
        if values.get("effective_groups") == 0:
            return "in every group all rewards were equal, so no completion is better than another"
        if self.masks_truncated and values.get("completions/clipped_ratio") == 1:
            return (
                "every completion was cut off at rollout.max_new_tokens, and algorithm.mask_truncated_completions "
                "leaves such out"
            )
        return "the gradient was 0"

    def _warn(self, text: str) -> None:
        if self.speak:
            logger.warning(text)

    def summary(self) -> dict[str, int]:
        """Counts of the whole run for a report, by name; empty if nothing went wrong."""
        counts = self.counts
        found = {
            "steps_that_taught_nothing": counts.idle,
            "steps_without_a_judgement": counts.unjudged,
            "steps_with_a_gradient_that_is_not_finite": counts.nonfinite,
            "steps_with_failed_rewards": counts.failed_rewards,
        }
        return {name: count for name, count in found.items() if count}

    def say_summary(self) -> None:
        """Log what went wrong in the whole run, if anything did; called when training ends."""
        counts = self.counts
        if counts.idle:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in self._idle_reasons.items())
            self._warn(f"{counts.idle} of {counts.steps} steps taught nothing: {reasons}")
            if counts.idle == counts.steps:
                self._warn("no step taught anything: the model is no better than the one that training began with")
        if counts.nonfinite:
            self._warn(f"{counts.nonfinite} of {counts.steps} steps had a gradient that was not finite: dropped")
        if counts.failed_rewards:
            self._warn(f"a reward failed in {counts.failed_rewards} of {counts.steps} steps: see rewards/*/failed")

    def state_dict(self) -> dict[str, Any]:
        """Counters, for a run that is resumed: a limit of steps in a row holds across restarts."""
        return {**asdict(self.counts), "silent": self._silent, "idle_reasons": self._idle_reasons}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; from nothing for a checkpoint that was written without counters."""
        counts = {name: value for name, value in state.items() if name in Counts.__dataclass_fields__}
        self.counts = Counts(**counts)
        self._silent, self._idle_reasons = dict(state.get("silent", {})), dict(state.get("idle_reasons", {}))


def _rewards(values: Mapping[str, float]) -> list[str]:
    """Names of the rewards whose metrics these are."""
    prefix, suffix = "rewards/", "/failed"
    names = [key[len(prefix) : -len(suffix)] for key in values if key.startswith(prefix) and key.endswith(suffix)]
    # a reward may log a metric of such a name, which the main process alone has
    return [name for name in names if f"{prefix}{name}/seconds" in values]


def dump_batch(folder: Path, step: int, rank: int, experience: Experience, updates: Sequence[Update]) -> None:
    """Write a GRPO step whose gradient is not finite, see `dump_once`.

    Token ids, log-probs, rewards and advantages, and for each micro-batch its loss and how many log-probs are not
    finite.
    """
    scores = experience.scores
    groups = [
        {
            "prompt_id": group.id,
            "prompt_token_ids": list(group.prompt.token_ids),
            "completions": [
                {
                    "text": completion.text,
                    "token_ids": list(completion.token_ids),
                    "sampler_logprobs": completion.logprobs.tolist(),
                    "finish_reason": completion.finish_reason,
                    "rewards": dict(zip(scores.names, scores.by_reward[:, n, member].tolist(), strict=True)),
                    "advantage": float(experience.advantages[n, member]),
                }
                for member, completion in enumerate(group.completions)
            ],
        }
        for n, group in enumerate(experience.groups)
    ]
    optimizer_steps = [
        {
            "grad_norm": float(update.grad_norm),
            "learning_rate": update.learning_rate,
            "micro_batches": [
                {
                    "loss": float(made.loss),
                    "tokens": made.logprob.numel(),
                    "nonfinite_logprobs": int((~made.logprob.isfinite()).sum()),
                }
                for made in update.passes
            ],
        }
        for update in updates
    ]
    dump_once(folder, step, rank, {"optimizer_steps": optimizer_steps, "groups": groups})


def dump_once(folder: Path, step: int, rank: int, content: Mapping[str, Any]) -> None:
    """Write the first batch of a run whose gradient is not finite, `nonfinite-step-000012-rank0.json`.

    The first one shows the cause, and a run that diverges would fill the disk. A disk that cannot take it is no reason
    to stop.
    """
    if any(folder.glob(f"nonfinite-step-*-rank{rank}.json")):
        return
    path = folder / f"nonfinite-step-{step:06d}-rank{rank}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # NaN and infinities as Python writes them: they are what one looks for
        text = json.dumps({"step": step, "rank": rank, **content}, indent=1, ensure_ascii=False)
        write_text(path, text + "\n")
    except OSError as error:
        logger.warning(f"the batch of step {step} could not be written to {path}: {error}")
