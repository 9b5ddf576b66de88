"""A resumed run trains by the options that it is given, on the data that it had, from no state of generators."""

import json
import shutil

import pytest
import torch

from grpo_core.config.fields import ConfigError
from grpo_core.errors import REFUSED, run_program
from grpo_core.storage import files
from grpo_core.storage.checkpoint import CheckpointError
from grpo_core.training.optim import learning_rate
from tests.grpo_core import toy
from tests.grpo_core.toy import lines, make_trainer, weights


def train(folder, steps, **options):
    trainer = make_trainer(folder, steps=steps, **({"save_steps": 2} | options))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    train(folder, 2)
    return folder


@pytest.fixture
def started(two_steps, tmp_path):
    """A copy of it."""
    return shutil.copytree(two_steps, tmp_path / "run")


def test_new_options_of_the_optimiser_take_effect_from_the_next_step(started):
    options = {"weight_decay": 0.3, "betas": (0.5, 0.6), "eps": 1e-4, "learning_rate": 1e-3}
    trainer = train(started, 3, **options)
    matrices, vectors = trainer.optimizer.param_groups
    for group in (matrices, vectors):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.6), 1e-4, 1e-3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert lines(started / "toy/metrics.jsonl")[-1]["learning_rate"] == pytest.approx(1e-3)
    # moments and their count go on; of the three steps the first taught nothing, so it is not counted
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {2}


def test_a_longer_schedule_goes_on_at_its_own_place(tmp_path):
    cosine = {"lr_scheduler": "cosine"}
    train(tmp_path, 2, **cosine)
    trainer = train(tmp_path, 4, **cosine)
    rates = [row["learning_rate"] for row in lines(tmp_path / "toy/metrics.jsonl")]
    scheduled = [learning_rate(step, 2 if step < 2 else 4, trainer.optim) for step in range(4)]
    assert rates == pytest.approx(scheduled, abs=1e-8)


def test_a_checkpoint_holds_no_state_of_generators_and_needs_none(two_steps, tmp_path):
    checkpoint = two_steps / "toy/checkpoints/step-000002"
    written = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert written == {"trainer_state.json", "optimizer.safetensors", "model/trained.safetensors"}
    manifest = json.loads((checkpoint / "trainer_state.json").read_text())
    assert not {"rng", "torch_rng", "cuda_rng"} & {*manifest, *manifest["state"]}
    ends = []
    for seed in (1, 2):
        folder = shutil.copytree(two_steps, tmp_path / str(seed))
        trainer = make_trainer(folder, steps=4, save_steps=2)
        torch.manual_seed(seed)
        trainer.train()
        ends.append(weights(trainer))
    assert torch.equal(*ends)


def test_controllers_that_are_accepted_later_start_as_in_a_new_run(tmp_path):
    train(tmp_path, 2, beta=0.1)
    trainer = train(tmp_path, 3, beta=0.1, kl_target=0.01, kl_horizon=64, entropy_coef=0.01, entropy_target=4.0)
    rows = lines(tmp_path / "toy/metrics.jsonl")
    assert rows[2]["beta"] == 0.1
    assert trainer.coefficients.beta(3) != 0.1


def test_a_reference_that_is_accepted_to_move_later_begins_at_the_start(tmp_path):
    first = train(tmp_path, 2, beta=0.1)
    start = {name: tensor.clone() for name, tensor in first.policy.reference_tensors().items()}
    later = make_trainer(tmp_path, steps=3, save_steps=2, beta=0.1, ref_model_sync_steps=5)
    later.resume()
    assert later.step_index == 2
    assert all(torch.equal(tensor, start[name]) for name, tensor in later.policy.reference_tensors().items())


def test_other_training_data_is_refused_unless_accepted(started, monkeypatch, capsys):
    monkeypatch.setattr(toy, "PROMPTS", toy.PROMPTS[:-1])
    with pytest.raises(CheckpointError, match=r"other data: 12 items then and 11 now.*--run.accept_changes data"):
        train(started, 3)
    # as a program ends: one line, for the data is the user's to mend
    assert run_program(lambda: train(started, 3)) == REFUSED
    assert capsys.readouterr().err.startswith("error: ")
    assert train(started, 3, accept_changes=("data",)).step_index == 3


def test_an_edited_prompt_is_other_training_data(started, monkeypatch):
    edited = [*toy.PROMPTS[:-1], toy.Prompt(toy.PROMPTS[-1].id, (5, 6))]
    monkeypatch.setattr(toy, "PROMPTS", edited)
    with pytest.raises(CheckpointError, match=r"12 items then and 12 now, or others by id or tokens"):
        train(started, 3)


def test_a_checkpoint_of_an_earlier_version_knows_nothing_of_its_data(started, monkeypatch):
    file = started / "toy/checkpoints/step-000002/trainer_state.json"
    manifest = json.loads(file.read_text())
    del manifest["state"]["data"], manifest["sha256"]
    file.write_text(json.dumps(manifest))
    assert train(started, 3).step_index == 3


def test_an_evaluation_that_cannot_happen_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"run.eval_steps is 5, but nothing is evaluated in this run"):
        make_trainer(tmp_path, eval_steps=5)
    with pytest.raises(ValueError, match=r"run.metric_for_best_model is eval/f1, but nothing is evaluated in this run"):
        make_trainer(tmp_path, eval_steps=5, metric_for_best_model="eval/f1")


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_first_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ConfigError, match=r"toy has 0 MB of free space, and a checkpoint of this run needs about"):
        trainer.train()
    assert trainer.step_index == 0
    assert list(tmp_path.iterdir()) == []
