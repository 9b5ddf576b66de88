"""Upstream checkpoints: names both ways, import and its refusals."""

import pickle

import pytest
import torch

from affectgpt.modeling.affectgpt import AffectGPT
from affectgpt.modeling.official import from_upstream, load_upstream, to_upstream, upstream_state_dict


@pytest.fixture
def make_model(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder):
    def make(seed: int, **lora) -> AffectGPT:
        torch.manual_seed(seed)
        model = AffectGPT.create(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, **lora)
        with torch.no_grad():
            for parameter in model.trainable_parameters().values():
                parameter.normal_()
        return model

    return make


@pytest.mark.parametrize(
    ("ours", "upstream"),
    [
        (
            "llm.base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight",
            "llama_model.base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight",
        ),
        ("fusion.affectgpt_proj.bias", "affectgpt_proj.bias"),
    ],
)
def test_names_translate_both_ways(ours, upstream):
    assert to_upstream(ours) == upstream
    assert from_upstream(upstream) == ours


def test_a_name_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match=r"visual_encoder\.weight is not a tensor of an AffectGPT"):
        to_upstream("visual_encoder.weight")


def test_an_upstream_checkpoint_loads_exactly(make_model, tmp_path):
    source, target = make_model(1), make_model(2)
    # as upstream writes it: half-trained state of other things stands beside the weights
    torch.save(
        {
            "model": upstream_state_dict(source),
            "optimizer": {"state": {}},
            "config": {"run": {"seed": 42}},
            "epoch": 35,
        },
        tmp_path / "checkpoint.pth",
    )
    load_upstream(target, tmp_path / "checkpoint.pth")
    expected = source.trainable_parameters()
    for name, parameter in target.trainable_parameters().items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad


def test_a_checkpoint_of_another_size_is_refused_and_changes_nothing(make_model, tmp_path):
    source, target = make_model(1, lora_r=8), make_model(2)
    before = {name: p.detach().clone() for name, p in target.trainable_parameters().items()}
    torch.save({"model": upstream_state_dict(source)}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint.pth: llm.*lora_A.default.weight is \[8, 32\]"):
        load_upstream(target, tmp_path / "checkpoint.pth")
    assert all(torch.equal(p, before[name]) for name, p in target.trainable_parameters().items())


class _Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(_Malicious(), protocol=2)), "cannot be read as a checkpoint"),
        (lambda path: torch.save({"model": _Malicious()}, path), "cannot be read as a checkpoint"),
        (lambda path: torch.save({"weights": {}}, path), "no dict of tensors under the key 'model'"),
        (lambda path: torch.save([1, 2], path), "no dict of tensors under the key 'model'"),
        (lambda path: torch.save({"model": {}}, path), "lacks 48 of the 48 tensors"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused_unexecuted(make_model, tmp_path, capsys, write, message):
    path = tmp_path / "checkpoint.pth"
    write(path)
    with pytest.raises(ValueError, match=message):
        load_upstream(make_model(1), path)
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.pth is missing"):
        load_upstream(make_model(1), tmp_path / "gone.pth")
