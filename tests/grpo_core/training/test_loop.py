"""What surrounds a step: a signal loses nothing, a save changes nothing, and a diverged run keeps what was good."""

import math
import os
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from grpo_core.config.options import OptimConfig, RunConfig, SFTConfig
from grpo_core.errors import DivergedError
from grpo_core.policy import Policy
from grpo_core.storage import checkpoint
from grpo_core.storage.checkpoint import CheckpointError, read_manifest
from grpo_core.training import loop
from grpo_core.training.sft import Example, SFTTrainer
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.toy import PROMPTS, lines, make_trainer, weights

STEPS = 4
OPTIONS = {
    "steps": STEPS,
    "beta": 0.05,
    "num_iterations": 2,
    "eval_steps": 2,
    "metric_for_best_model": "eval/f1",
    "max_tokens_per_micro_batch": 30,
}


def grpo(folder, **changed):
    """A GRPO run that evaluates every second step, by sampling with the policy as it is."""

    def evaluate():
        groups = trainer.sample(PROMPTS[:2])
        return {"eval/f1": sum(map(len, (c.token_ids for g in groups for c in g.completions))) + trainer.step_index}

    trainer = make_trainer(folder, evaluate=evaluate, **(OPTIONS | changed))
    return trainer


def sft(folder, **changed):
    """A supervised run with dropout."""
    torch.manual_seed(0)
    model = make_lm("qwen2", lora=True, hidden_size=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    examples = [Example(prompt, (*range(3, 5 + i % 4), 1)) for i, prompt in enumerate(PROMPTS)]
    optim = OptimConfig(learning_rate=changed.pop("learning_rate", 1e-2), max_tokens_per_micro_batch=10)
    options = {"max_steps": STEPS, "prompts_per_step": 4} | changed
    return SFTTrainer(Policy(model), examples, SFTConfig(optim, RunConfig(name="toy", output_dir=folder, **options)))


def result(folder, trainer):
    """Everything that must be the same but for times."""
    rows = [
        {key: value for key, value in row.items() if "time" not in key and "second" not in key}
        for name in ("metrics.jsonl", "completions.jsonl")
        if (folder / "toy" / name).exists()
        for row in lines(folder / "toy" / name)
    ]
    return weights(trainer).tolist(), rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of each kind of run that nobody stops, which writes no checkpoint before its end."""
    results = {}
    for make in (grpo, sft):
        folder = tmp_path_factory.mktemp(make.__name__)
        trainer = make(folder)
        trainer.train()
        results[make] = result(folder, trainer)
    return results


@contextmanager
def signal_at(monkeypatch, owner, name, call, signum):
    """Send this process a signal in the `call`-th call of a function, before it does its work."""
    function, calls = getattr(owner, name), 0

    def with_signal(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signum)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, with_signal)
        yield
    assert calls >= call


def stop(make, folder, signum, monkeypatch, where):
    """Train until the signal at `where(trainer)`; return the step that was saved last, None for none."""
    trainer = make(folder)
    owner, name, call = where(trainer)
    with signal_at(monkeypatch, owner, name, call, signum), pytest.raises(SystemExit) as leaving:
        trainer.train()
    assert leaving.value.code == 128 + signum
    newest = trainer.checkpoints.newest()
    return read_manifest(newest)["step"] if newest else None


@pytest.mark.parametrize(
    ("where", "saved"),
    [
        (lambda t: (t, "sample", 2), 1),  # the first sample() of step 2: dropped, and its start saved
        (lambda t: (t.sampler.decoder, "step", 8), 1),  # between two blocks of decode steps
        (lambda t: (t, "score", 3), 2),
        (lambda t: (t.policy, "reference_logprobs", 5), 1),
        (lambda t: (t.policy, "logprobs", 2), None),  # the first step's first epoch: there is nothing to save
        (lambda t: (loop, "postfix", 1), 1),  # at a step's end
        (lambda t: (t, "report", 3), 3),  # the weights have moved: the step is finished
        (lambda t: (t, "evaluate", 1), 2),  # between a step and its evaluation, which comes after the resume
        (lambda t: (t, "follow_best", 4), 4),  # after the last step
        (lambda t: (checkpoint, "save_file", 1), 2),  # while it saves
    ],
    ids=["sample", "decode", "score", "reference", "first step", "end of step", "moved", "evaluate", "last", "save"],
)
def test_a_signal_at_any_moment_loses_no_step_and_changes_no_number(
    tmp_path, monkeypatch, capsys, uninterrupted, where, saved
):
    assert stop(grpo, tmp_path, signal.SIGTERM, monkeypatch, where) == saved
    assert "SIGTERM: toy stops" in capsys.readouterr().err
    resumed = grpo(tmp_path)
    resumed.train()
    assert result(tmp_path, resumed) == uninterrupted[grpo]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_supervised_training_stops_between_micro_batches_at_any_signal(tmp_path, monkeypatch, uninterrupted, signum):
    # two micro-batches a step or more: the sixth is in the second step or the third
    saved = stop(sft, tmp_path, signum, monkeypatch, lambda trainer: (trainer.policy, "logprobs", 6))
    assert saved in (1, 2)
    resumed = sft(tmp_path)
    resumed.train()
    assert result(tmp_path, resumed) == uninterrupted[sft]


def test_a_second_signal_in_the_evaluation_that_was_caught_up_loses_nothing(tmp_path, monkeypatch, uninterrupted):
    def during_evaluation(trainer):
        return trainer, "evaluate", 1

    for _ in range(2):
        assert stop(grpo, tmp_path, signal.SIGTERM, monkeypatch, during_evaluation) == 2
    # killed after the caught-up step's metrics are written, and before it is saved again
    killed = grpo(tmp_path)
    killed.save = None
    with pytest.raises(TypeError):
        killed.train()
    resumed = grpo(tmp_path)
    resumed.train()
    assert result(tmp_path, resumed) == uninterrupted[grpo]


def test_a_signal_in_the_last_save_is_delivered_after_it(tmp_path, monkeypatch):
    trainer, heard = sft(tmp_path), []
    earlier = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(trainer.checkpoints.newest().name))
    try:
        with signal_at(monkeypatch, checkpoint, "save_file", 1, signal.SIGTERM):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert heard == [f"step-{STEPS:06d}"]


def test_handlers_are_as_before_and_an_ignored_signal_stays_ignored(tmp_path):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    try:
        trainer = sft(tmp_path, max_steps=1)
        step = trainer.step

        def step_after_hangup():
            os.kill(os.getpid(), signal.SIGHUP)
            return step()

        trainer.step = step_after_hangup
        trainer.train()
        after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
        assert after == before
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_checkpoints_come_by_the_clock_where_no_steps_are_set_and_change_nothing(tmp_path, monkeypatch, uninterrupted):
    seconds = iter(range(0, 10_000, 400))  # a step takes 400 s or more by this clock
    saved = []
    trainer = sft(tmp_path, save_minutes=5)
    save = trainer.checkpoints.save
    monkeypatch.setattr(trainer.checkpoints, "save", lambda step, **rest: (saved.append(step), save(step, **rest)))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        trainer.train()
    assert saved == [1, 2, 3, 4]
    assert result(tmp_path, trainer) == uninterrupted[sft]
    sft(tmp_path / "never", save_minutes=0).train()
    assert not (tmp_path / "never/toy/checkpoints").exists()


def test_a_run_without_options_is_saved_at_its_end_and_every_ten_minutes(tmp_path):
    assert (RunConfig().save_steps, RunConfig().save_minutes) == (0, 10)
    trainer = sft(tmp_path)
    trainer.train()
    assert trainer.checkpoints.newest().name == f"step-{STEPS:06d}"


def diverge_from(trainer, step):
    """Make every gradient after `step` steps NaN."""
    made = trainer.policy.logprobs

    def logprobs(*arguments, **options):
        found = made(*arguments, **options)
        if trainer.step_index >= step and torch.is_grad_enabled():
            found = found._replace(logprob=found.logprob * math.nan)
        return found

    trainer.policy.logprobs = logprobs


def test_a_run_whose_gradients_stay_nan_keeps_its_good_checkpoints_and_gives_no_model(tmp_path, caplog):
    trainer = sft(tmp_path, save_steps=1)
    diverge_from(trainer, 2)
    with pytest.raises(DivergedError) as error:
        trainer.train()
    assert "step 3: the gradient is not finite" in caplog.text
    kept = sorted(path.name for path in trainer.checkpoints.root.iterdir())
    assert kept == ["step-000001", "step-000002"]
    assert "no gradient was finite in the last 2 steps. Lower optim.learning_rate" in str(error.value)
    assert "step-000002 is the newest checkpoint" in str(error.value)


def test_a_checkpoint_that_is_due_at_a_nan_gradient_is_written_after_the_next_good_step(tmp_path):
    trainer, saved = sft(tmp_path, save_steps=2), []
    save = trainer.checkpoints.save
    trainer.checkpoints.save = lambda step, **rest: (saved.append(step), save(step, **rest))
    step = trainer.step
    trainer.step = lambda: step() | ({"grad_norm": math.nan} if trainer.step_index == 2 else {})
    trainer.train()
    assert saved == [3, 4]


def test_logits_that_are_not_finite_stop_the_run_with_one_sentence(tmp_path):
    trainer = make_trainer(tmp_path, steps=3, save_steps=1, learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"after step 2 the policy's logits.*Lower optim.learning_rate"):
        trainer.train()


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed_from_nor_given_as_a_result(tmp_path):
    trainer = sft(tmp_path, max_steps=1)
    trainer.train()
    good = trainer.checkpoints.newest()
    parameter = next(iter(trainer.parameters.values()))
    parameter.data[0] = math.inf
    trainer.step_index, before = 2, sorted(trainer.checkpoints.root.iterdir())
    with pytest.raises(DivergedError, match=r"the weights at step 2 are not finite \(.*lower optim.learning_rate"):
        trainer.save()
    assert sorted(trainer.checkpoints.root.iterdir()) == before
    without_saves = sft(tmp_path / "other", save_minutes=0, max_steps=1)
    next(iter(without_saves.parameters.values())).data[0] = math.inf
    with warnings.catch_warnings(action="ignore"), pytest.raises(DivergedError, match="after step 1 are not finite"):
        without_saves.train()

    # as an earlier version may have written it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "require_finite", lambda *_: None)
        trainer.save()
    again = sft(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match=r"passing over.*step-000002.*not finite"):
        again.resume()
    assert again.step_index == 1
    shutil.rmtree(good)
    with warnings.catch_warnings(action="ignore"), pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        sft(tmp_path, max_steps=1).resume()


def test_a_second_interrupt_ends_the_process_even_where_python_is_stuck(tmp_path):
    child = os.fork()
    if child == 0:  # no test runs in here: whatever happens, the process ends
        try:
            trainer = sft(tmp_path)
            # a wait in C, as for a rank that hangs: no Python handler runs in it
            trainer.step = lambda: (os.kill(os.getpid(), signal.SIGINT), torch.zeros(1), _stuck())
            trainer.train()
        finally:
            os._exit(1)
    time.sleep(0.2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        os.kill(child, signal.SIGINT)
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("two interrupts did not end it")
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT


def _stuck():
    """Wait for a lock in C, again and again after each signal."""
    import threading

    held = threading.Lock()
    held.acquire()
    held.acquire()
