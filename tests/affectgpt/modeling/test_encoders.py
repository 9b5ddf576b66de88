"""Encoders against transformers' own forward passes and processors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from affectgpt.data.media import audio_clips
from affectgpt.modeling.encoders import Encoders
from grpo_core.errors import InputError

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def encoders(tiny_clip_folder, tiny_hubert_folder):
    return Encoders.from_pretrained(tiny_clip_folder, tiny_hubert_folder)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)


@pytest.fixture
def clips():
    rng = np.random.default_rng(1)
    return np.concatenate([audio_clips(rng.normal(size=n).astype(np.float32)) for n in (20_000, 70_000)])


@torch.no_grad()
def test_frames_equal_clips_own_processor_and_projection(encoders, frames, tiny_clip_folder):
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip_folder)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]
    expected = CLIPVisionModelWithProjection.from_pretrained(tiny_clip_folder).eval()(pixels).image_embeds
    features = encoders.encode_frames(frames)
    assert features.shape == (5, encoders.visual_dim) == (5, 12)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "shape"), [(96, (224, 224)), (96, (100, 180)), (256, (224, 224))])
@torch.no_grad()
def test_another_image_size_is_reached_as_clips_processor_does(tmp_path, tiny_hubert_folder, size, shape):
    config = CLIPVisionConfig(**VISION, image_size=size, patch_size=32, projection_dim=6)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, image_mean=[0.1, 0.5, 0.7])
    processor.save_pretrained(tmp_path)
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([x, y, x + y], axis=-1) / (sum(shape)) * 255
    frames = np.stack([smooth, 255 - smooth]).astype(np.uint8)
    expected = model(processor(list(frames), return_tensors="pt")["pixel_values"]).image_embeds
    features = Encoders.from_pretrained(tmp_path, tiny_hubert_folder).encode_frames(frames)
    torch.testing.assert_close(features, expected, rtol=0.01, atol=0.01 * expected.std().item())


@torch.no_grad()
def test_audio_is_the_mean_of_the_last_four_layers_over_time(encoders, clips, tiny_hubert_folder):
    model = HubertModel.from_pretrained(tiny_hubert_folder).eval()
    outputs = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in model.encoder.layers]
    last = model(torch.from_numpy(clips)).last_hidden_state
    for hook in hooks:
        hook.remove()
    layers = [output[0] if isinstance(output, tuple) else output for output in outputs]
    assert len(layers) == 5
    # of a pre-norm model only the very last state has passed the closing layer norm
    expected = torch.stack([*layers[-4:-1], last]).mean(dim=(0, 2))
    features = encoders.encode_audio(clips)
    assert features.shape == (16, encoders.audio_dim) == (16, 20)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(layers[-4:]).mean(dim=(0, 2)), expected, atol=1e-2)


def test_the_feature_extractor_adds_nothing_to_normalised_clips(clips, tiny_hubert_folder):
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tiny_hubert_folder)
    sample = clips[:8]  # given as upstream gives it: one two-dimensional array, normalised jointly
    again = extractor([sample], sampling_rate=16_000, return_attention_mask=False)["input_values"][0]
    np.testing.assert_allclose(again, sample, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(encoders, frames, clips):
    together = encoders.encode_frames(frames)
    alone = torch.cat([encoders.encode_frames(frame[None]) for frame in frames])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    together = encoders.encode_audio(clips)
    alone = torch.cat([encoders.encode_audio(clip[None]) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_size_of_a_batch_changes_nothing(tiny_clip_folder, tiny_hubert_folder, encoders, frames, clips):
    small = Encoders.from_pretrained(tiny_clip_folder, tiny_hubert_folder, batch=3)
    torch.testing.assert_close(small.encode_frames(frames), encoders.encode_frames(frames), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.encode_audio(clips), encoders.encode_audio(clips), rtol=1e-5, atol=1e-5)
    assert small.fingerprint == encoders.fingerprint


def test_encoders_are_frozen_and_leave_no_graph(encoders, frames):
    assert not encoders.encode_frames(frames).requires_grad
    assert not any(p.requires_grad for model in (encoders.visual, encoders.audio) for p in model.parameters())
    assert not encoders.visual.training
    assert not encoders.audio.training


@pytest.fixture(scope="module")
def whole_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    text = {**VISION, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**VISION, "image_size": 64, "patch_size": 32}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_whole_clip_and_its_image_half_give_the_same_and_share_a_fingerprint(
    tmp_path, whole_clip_folder, tiny_hubert_folder
):
    whole = Encoders.from_pretrained(whole_clip_folder, tiny_hubert_folder)
    whole.visual.save_pretrained(tmp_path)
    half = Encoders.from_pretrained(tmp_path, tiny_hubert_folder)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    pixels = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(list(frames), return_tensors="pt")
    expected = CLIPModel.from_pretrained(whole_clip_folder).eval().get_image_features(**pixels).pooler_output
    assert whole.visual_dim == half.visual_dim == 10
    torch.testing.assert_close(whole.encode_frames(frames), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half.encode_frames(frames), whole.encode_frames(frames))
    assert half.fingerprint == whole.fingerprint


def test_a_hubert_with_a_head_loads(tmp_path, tiny_clip_folder, tiny_hubert_folder, encoders, clips):
    config = HubertConfig.from_pretrained(tiny_hubert_folder)
    model = HubertForCTC(config)
    model.hubert.load_state_dict(encoders.audio.state_dict())
    model.save_pretrained(tmp_path)
    other = Encoders.from_pretrained(tiny_clip_folder, tmp_path)
    torch.testing.assert_close(other.encode_audio(clips), encoders.encode_audio(clips))
    assert other.fingerprint == encoders.fingerprint


def edited(folder, target, edit, file="config.json"):
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text())
    edit(content)
    (target / file).write_text(json.dumps(content))
    return target


def test_the_fingerprint_follows_what_changes_the_features(tmp_path, tiny_clip_folder, tiny_hubert_folder, encoders):
    def fingerprint(clip=tiny_clip_folder, hubert=tiny_hubert_folder, **options):
        return Encoders.from_pretrained(clip, hubert, **options).fingerprint

    other = CLIPVisionModelWithProjection.from_pretrained(tiny_clip_folder)
    with torch.no_grad():
        other.visual_projection.weight[0, 0] += 1e-3
    shutil.copytree(tiny_clip_folder, tmp_path / "weight")
    other.save_pretrained(tmp_path / "weight")
    mean = edited(
        tiny_clip_folder, tmp_path / "mean", lambda c: c.update(image_mean=[0.5] * 3), "preprocessor_config.json"
    )
    heads = edited(tiny_hubert_folder, tmp_path / "heads", lambda c: c.update(num_attention_heads=4))
    names = edited(tiny_hubert_folder, tmp_path / "names", lambda c: c.update(hidden_dropout=0.3, _name_or_path="x"))
    changed = [
        fingerprint(clip=tmp_path / "weight"),
        fingerprint(clip=mean),
        fingerprint(hubert=heads),
        fingerprint(dtype=torch.bfloat16),
    ]
    assert len({encoders.fingerprint, *changed}) == 5
    assert fingerprint(hubert=names) == encoders.fingerprint


def test_a_wrong_folder_is_named_with_the_fix(tmp_path, tiny_clip_folder, tiny_hubert_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    no_weights = tmp_path / "no_weights"
    no_weights.mkdir()
    shutil.copy(tiny_clip_folder / "config.json", no_weights)
    garbled = edited(tiny_clip_folder, tmp_path / "garbled", lambda c: None)
    (garbled / "config.json").write_text("{")
    cut = edited(tiny_clip_folder, tmp_path / "cut", lambda c: None)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    narrow = edited(tiny_clip_folder, tmp_path / "narrow", lambda c: c.update(projection_dim=11))
    deep = edited(tiny_clip_folder, tmp_path / "deep", lambda c: c.update(num_hidden_layers=2))
    for folder, words in (
        (tmp_path / "absent", "there is no folder "),
        (empty, "has no config.json"),
        (no_weights, "has no weights"),
        (garbled, "/config.json cannot be read"),
        (tiny_hubert_folder, "holds a model of type 'hubert', not CLIP: give the folder of a CLIP checkpoint"),
        (cut, "/model.safetensors is damaged"),
        (narrow, "visual_projection.weight is [12, 16], the config says [11, 16]"),
        (deep, "lack 16 tensors"),
    ):
        with pytest.raises(InputError) as caught:
            Encoders.from_pretrained(folder, tiny_hubert_folder)
        message = str(caught.value)
        assert message.startswith("model.visual_encoder: ")
        assert str(folder) in message
        assert words in message
    with pytest.raises(ValueError, match="holds a model of type 'clip_vision_model', not HuBERT"):
        Encoders.from_pretrained(tiny_clip_folder, tiny_clip_folder)


@pytest.mark.parametrize("known_type", [True, False])
def test_code_in_an_encoders_folder_is_never_run(
    tmp_path, tiny_clip_folder, tiny_hubert_folder, monkeypatch, known_type
):
    mark = tmp_path / "the code ran"
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")

    def with_code(folder: Path, name: str) -> Path:
        copied = shutil.copytree(folder, tmp_path / name)
        (copied / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
        config = json.loads((copied / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
        if not known_type:
            config["model_type"] = "evil"
        (copied / "config.json").write_text(json.dumps(config))
        return copied

    clip, hubert = with_code(tiny_clip_folder, "clip"), with_code(tiny_hubert_folder, "hubert")
    if known_type:
        Encoders.from_pretrained(clip, hubert)
    else:
        with pytest.raises(InputError, match=r"model\.visual_encoder: .*needs code from its folder .*never run"):
            Encoders.from_pretrained(clip, hubert)
        with pytest.raises(InputError, match=r"model\.audio_encoder: .*needs code from its folder .*never run"):
            Encoders.from_pretrained(tiny_clip_folder, hubert)
    assert not asked
    assert not mark.exists()


def test_a_published_hubert_without_its_mask_embedding_loads_and_one_without_a_layer_does_not(
    tmp_path, tiny_clip_folder, tiny_hubert_folder
):
    folder = shutil.copytree(tiny_hubert_folder, tmp_path / "hubert")
    state = load_file(folder / "model.safetensors")
    state.pop("masked_spec_embed", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    same = Encoders.from_pretrained(tiny_clip_folder, folder)
    clips = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0))
    expected = Encoders.from_pretrained(tiny_clip_folder, tiny_hubert_folder).encode_audio(clips)
    assert torch.equal(same.encode_audio(clips), expected)
    name = min(name for name in state if name.startswith("encoder.layers.4"))
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model\.audio_encoder: .*lack 1 tensors .*first {name}"):
        Encoders.from_pretrained(tiny_clip_folder, folder)


def test_pickled_encoder_weights_load_and_code_in_them_does_not_run(
    tmp_path, tiny_clip_folder, tiny_hubert_folder, capsys
):
    folder = shutil.copytree(tiny_hubert_folder, tmp_path / "hubert")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert Encoders.from_pretrained(tiny_clip_folder, folder).audio_dim == 20

    class Malicious:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save(state | {"masked_spec_embed": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"^model\.audio_encoder: .*does not load"):
        Encoders.from_pretrained(tiny_clip_folder, folder)
    assert "code ran" not in capsys.readouterr().out


def test_image_processing_that_cannot_be_read_is_named(tmp_path, tiny_clip_folder, tiny_hubert_folder):
    folder = shutil.copytree(tiny_clip_folder, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json is not valid JSON .*copy it again"):
        Encoders.from_pretrained(folder, tiny_hubert_folder)
