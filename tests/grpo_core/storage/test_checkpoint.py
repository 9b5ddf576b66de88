"""A checkpoint is whole or not there, and a run continued from one is the run that was never stopped."""

import copy
import errno
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo_core.errors import TrainingStopped
from grpo_core.storage import checkpoint
from grpo_core.storage import optimizer_state as training_state
from grpo_core.storage.checkpoint import CheckpointError, CheckpointManager, read_manifest


class Run:
    """A small training run with dropout, two parameter groups and a parameter that never has a gradient.

    Random numbers are keyed by the step, as in the engine's loops.
    """

    def __init__(self):
        self.steps = 0
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
        weights = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)

    def train(self, steps):
        for _ in range(steps):
            torch.manual_seed(self.steps)
            self.steps += 1
            self.optimizer.param_groups[0]["lr"] *= 0.9
            self.model(torch.randn(5, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, manager, step, **others):
        state = {"epoch": 0.1 + 0.2, "order": [3, 1]}
        arguments = {"optimizer": self.optimizer, "named_parameters": self.model.named_parameters(), "state": state}
        return manager.save(step, save_model=self.save_model, **arguments, **others)

    def save_model(self, folder):
        save_file(self.model.state_dict(), folder / "model.safetensors")

    def load(self, manager, folder):
        self.model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        manager.load_optimizer(folder, self.optimizer, self.model.named_parameters())
        self.steps = read_manifest(folder)["step"]

    def fingerprint(self):
        tensors, groups = training_state.flatten_optimizer(self.optimizer, self.model.named_parameters())
        values = {**self.model.state_dict(), **tensors}
        return {name: (value.dtype, value.tolist()) for name, value in values.items()}, groups


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints")


def names(manager):
    return sorted(path.name for path in manager.root.iterdir())


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(manager):
    whole = Run()
    whole.train(6)
    first = Run()
    first.train(3)
    first.save(manager, 3)
    resumed = Run()
    torch.manual_seed(99)
    resumed.load(manager, manager.latest())
    resumed.train(3)
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.gpu
def test_a_fused_optimizer_on_cuda_resumes_bit_for_bit(manager):
    def run():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8, device="cuda")
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def train(model, optimizer, steps):
        for step in range(steps):
            torch.manual_seed(step)
            model(torch.randn(4, 8, device="cuda")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = run()
    train(whole, optimizer, 2)
    folder = manager.save(
        2,
        save_model=lambda path: save_file(whole.state_dict(), path / "model.safetensors"),
        optimizer=optimizer,
        named_parameters=whole.named_parameters(),
        state={},
    )
    train(whole, optimizer, 2)
    resumed, optimizer = run()
    resumed.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    manager.load_optimizer(folder, optimizer, resumed.named_parameters())
    train(resumed, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_state_comes_back_exactly(manager):
    folder = Run().save(manager, 12, metric=1 / 3)
    manifest = read_manifest(folder)
    assert (folder.name, manifest["step"], manifest["metric"]) == ("step-000012", 12, 1 / 3)
    assert manifest["state"] == {"epoch": 0.1 + 0.2, "order": [3, 1]}


def test_moments_keep_a_dtype_other_than_the_parameters(manager):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.tensor([1 / 3] * 3)}
    named = [("w", parameter)]
    folder = manager.save(1, save_model=lambda _: None, optimizer=optimizer, named_parameters=named, state={})
    other = torch.optim.AdamW([parameter])
    manager.load_optimizer(folder, other, named)
    assert torch.equal(other.state[parameter]["exp_avg"], torch.tensor([1 / 3] * 3))


def test_no_file_is_a_pickle(manager):
    run = Run()
    run.train(1)
    folder = run.save(manager, 1)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"trainer_state.json", "optimizer.safetensors", "model/model.safetensors"}


class Killed(BaseException):
    """Stands for the process's end: nothing after it runs in the saver."""


def kill_at(patch, moment):
    """Let `moment` file operations happen, and die in place of the next."""
    done = 0

    def mortal(operation):
        def run(*args, **kwargs):
            nonlocal done
            if done == moment:
                raise Killed
            done += 1
            return operation(*args, **kwargs)

        return run

    operations = [(os, "fsync"), (Path, "rename"), (Path, "write_text"), (checkpoint, "save_file"), (shutil, "rmtree")]
    for owner, name in operations:
        patch.setattr(owner, name, mortal(getattr(owner, name)))


@pytest.mark.parametrize("same_step", [False, True], ids=["a later step", "the same step again"])
def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, same_step):
    first, second = Run(), Run()
    second.train(2)
    states = [first.fingerprint(), second.fingerprint()]
    kills = 0
    for moment in range(1000):
        manager = CheckpointManager(tmp_path / str(moment), keep_last=1)
        first.save(manager, 1)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            try:
                second.save(manager, 1 if same_step else 2)
            except Killed:
                kills += 1
            else:
                break
        found = Run()
        found.load(manager, manager.latest())
        assert found.fingerprint() in states
        second.save(manager, 3)
        assert names(manager) == ["step-000003"]
    assert kills > 10


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(manager, name, damage):
    run = Run()
    run.train(1)
    good = run.save(manager, 1)
    bad = run.save(manager, 2) / name
    content = bytearray(bad.read_bytes())
    if damage == "missing":
        bad.unlink()
    else:
        content[len(content) // 2] ^= 1
        cut = {"cut": content[: len(content) * 2 // 3], "flip": content, "empty": b""}[damage]
        bad.write_bytes(cut)
    if (name, damage) == ("trainer_state.json", "flip"):
        bad.write_text(bad.read_text(errors="replace").replace('"step"', '"stop"'))
    with pytest.warns(UserWarning, match=f"damaged checkpoint.*{Path(name).name}"):
        assert manager.latest() == good


def test_every_flipped_bit_of_trainer_state_is_noticed_or_changes_nothing(manager):
    run = Run()
    run.train(1)
    run.save(manager, 3)
    bad = run.save(manager, 4, metric=0.5) / "trainer_state.json"
    content, manifest = bad.read_bytes(), read_manifest(bad.parent)
    noticed = 0
    for place in range(0, len(content), 7):  # an odd stride: digits, names, quotes, spaces, and the digest itself
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 7)
        bad.write_bytes(flipped)
        try:
            assert read_manifest(bad.parent) == manifest
        except CheckpointError:
            noticed += 1
    assert noticed > 0.8 * len(content) / 7  # the rest are spaces, and the name of the digest
    bad.write_bytes(content.replace(b'"step": 4', b'"step": 5'))
    with pytest.warns(UserWarning, match="has changed since it was written"):
        assert manager.latest().name == "step-000003"


def test_a_manifest_without_a_digest_is_read_and_must_be_of_its_folders_step(manager):
    path = Run().save(manager, 4) / "trainer_state.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]  # as earlier versions wrote it
    path.write_text(json.dumps(manifest, indent=1))
    assert manager.latest() == path.parent
    path.write_text(json.dumps(manifest | {"step": 5}, indent=1))
    with pytest.raises(CheckpointError, match="it says step 5"):
        read_manifest(path.parent)


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_keeps_them(manager):
    run = Run()
    files = [run.save(manager, step) / name for step, name in ((1, "optimizer.safetensors"), (2, "trainer_state.json"))]
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    with warnings.catch_warnings(action="ignore"), pytest.raises(CheckpointError) as error:
        manager.latest()
    assert str(error.value).startswith(f"none of the 2 checkpoints in {manager.root} is whole")
    assert all(str(file) in str(error.value) for file in files)
    assert names(manager) == ["step-000001", "step-000002"]


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*arguments, **options):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [
        (checkpoint, "save_file", no_space_in_rust),
        (Path, "write_text", no_space),
        (os, "fsync", no_space),
        (Path, "rename", no_space),
        (Path, "mkdir", no_space),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint_and_no_half_one(
    manager, monkeypatch, owner, name, failure
):
    run = Run()
    run.train(1)
    good = run.save(manager, 1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises(TrainingStopped) as error:
            run.save(manager, 2)
    message = str(error.value)
    assert message.startswith(f"the checkpoint of step 2 cannot be written into {manager.root} (")
    assert "No space left on device" in message
    assert "step-000001 is the newest one: make room" in message
    assert "\n" not in message
    assert manager.latest() == good
    assert names(manager) == ["step-000001"]


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(TrainingStopped, match=r"cannot be written into .*checkpoints \(.*there is no earlier one"):
        Run().save(CheckpointManager(tmp_path / "checkpoints"), 1)


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_part_of_one(manager, monkeypatch):
    run = Run()
    for step in (1, 2):
        run.save(manager, step)
    with monkeypatch.context() as patch:
        # a kill in the middle: the first file of the tree is gone
        patch.setattr(shutil, "rmtree", lambda path, **options: (path / "trainer_state.json").unlink(missing_ok=True))
        run.save(manager, 3)
    assert [folder.name for folder in manager._folders()] == ["step-000002", "step-000003"]
    run.save(manager, 4)
    assert names(manager) == ["step-000003", "step-000004"]


def test_an_unfinished_folder_is_not_a_checkpoint(manager):
    assert manager.latest() is None
    (manager.root / ".writing-step-000009").mkdir(parents=True)
    (manager.root / "step-notes").mkdir()
    assert manager.latest() is None
    Run().save(manager, 1)
    assert names(manager) == ["step-000001", "step-notes"]


def test_the_last_and_the_best_are_kept(manager):
    run = Run()
    for step, metric in enumerate([0.2, 0.9, math.nan, 0.9, 0.1, None], start=1):
        run.save(manager, step, metric=metric)
    assert names(manager) == ["step-000002", "step-000005", "step-000006"]
    assert manager.best().name == "step-000002"


def test_the_best_is_a_whole_one(manager):
    run = Run()
    for step, metric in enumerate([0.5, 0.9, 0.1], start=1):
        run.save(CheckpointManager(manager.root, keep_last=3), step, metric=metric)
    (manager.root / "step-000002" / "optimizer.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000002"):
        assert manager.best().name == "step-000001"


def test_a_run_that_went_back_leaves_its_later_checkpoints_behind(manager):
    run = Run()
    for step in (2, 4, 6):
        run.save(manager, step, metric=step)
    run.save(manager, 5, metric=0)
    assert names(manager) == ["step-000004", "step-000005"]


def test_a_checkpoint_of_another_model_is_refused_naming_the_parameters(manager):
    run = Run()
    run.train(1)
    folder = run.save(manager, 1)
    other = copy.deepcopy(run)
    other.model[2] = torch.nn.Linear(9, 1, bias=False)
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    before = copy.deepcopy(other.fingerprint())
    with pytest.raises(CheckpointError) as error:
        manager.load_optimizer(folder, other.optimizer, other.model.named_parameters())
    assert "step-000001 does not fit the model" in str(error.value)
    assert "2.weight is [1, 8] in the checkpoint and [1, 9] here" in str(error.value)
    assert "2.bias is [1] in the checkpoint and absent here" in str(error.value)
    assert other.fingerprint() == before


def test_regrouped_parameters_are_refused(manager):
    run = Run()
    folder = run.save(manager, 1)
    regrouped = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(CheckpointError, match="another order or grouping"):
        manager.load_optimizer(folder, regrouped, run.model.named_parameters())


def test_a_parameter_without_a_name_is_refused(manager):
    run = Run()
    with pytest.raises(ValueError, match=r"lacks an optimised parameter of shape \[8, 4\]"):
        manager.save(1, save_model=run.save_model, optimizer=run.optimizer, named_parameters=[], state={})


def test_state_that_json_cannot_hold_is_refused_and_harms_nothing(manager):
    run = Run()
    run.save(manager, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        manager.save(
            2,
            save_model=run.save_model,
            optimizer=run.optimizer,
            named_parameters=run.model.named_parameters(),
            state={"kl": math.nan},
        )
    assert manager.latest().name == "step-000001"


def test_manifest_describes_every_file(manager):
    folder = Run().save(manager, 1)
    files = json.loads((folder / "trainer_state.json").read_text())["files"]
    assert {name: size for name, (size, _) in files.items()} == {name: (folder / name).stat().st_size for name in files}
    assert len(files) == 2
