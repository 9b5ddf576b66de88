"""AffectGPT: sizes, splicing, gradients, saving and loading, and what it says of bad input."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from affectgpt.modeling.affectgpt import CONFIG_FILE, WEIGHTS_FILE, AffectGPT, AffectGPTConfig
from affectgpt.modeling.official import from_upstream, to_upstream
from affectgpt.prompts import PLACEHOLDERS, build_prompt, build_target
from grpo_core.errors import InputError
from grpo_core.types import Prompt


@pytest.fixture
def model(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder) -> AffectGPT:
    torch.manual_seed(3)
    model = AffectGPT.create(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if "lora_B" in name:  # a fresh adapter is the identity: give it something to say
                parameter.normal_(std=0.1)
    return model.eval()


def make_features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = {"frame": 12, "face": 12, "audio": 20}
    return {name: torch.randn(8, width, generator=generator) for name, width in widths.items()}


def make_sample(name: str = "clip", subtitle: str = "I told you so.") -> SimpleNamespace:
    return SimpleNamespace(name=name, subtitle=subtitle, labels="[happy, sad]", reason="She smiles.")


def target_logprobs(model: AffectGPT, prompt: Prompt) -> torch.Tensor:
    """Log-probs `[L]` of the sample's target after a prompt."""
    target = torch.tensor(build_target(prompt.sample, model.tokenizer), device=model.device)
    embeds = torch.cat([*model.embed([prompt]), model.embed_tokens(target)])
    logits = model.llm(inputs_embeds=embeds[None]).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.fixture(scope="module")
def real_size() -> dict[str, torch.nn.Parameter]:
    """The trained parameters at upstream's sizes, without storage."""
    config = AffectGPTConfig("llm", "clip", "hubert", visual_dim=768, audio_dim=1024, hidden_size=3584)
    qwen = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(qwen, dtype=torch.bfloat16)
        return AffectGPT(config, base, _NoTokenizer()).trainable_parameters()


class _NoTokenizer:
    """Stands where only sizes matter."""

    def get_vocab(self):
        return PLACEHOLDERS

    def convert_tokens_to_ids(self, token):
        return 151665 + list(PLACEHOLDERS).index(token)


def test_real_size_has_the_published_number_of_trainable_parameters(real_size):
    lora = {name: p.numel() for name, p in real_size.items() if name.startswith("llm.")}
    fusion = {name: p.numel() for name, p in real_size.items() if name.startswith("fusion.")}
    assert (len(lora), sum(lora.values())) == (392, 40_370_176)
    assert (len(fusion), sum(fusion.values())) == (20, 16_798_468)
    assert sum(p.numel() for p in real_size.values()) == 57_168_644
    assert {p.dtype for p in real_size.values()} == {torch.float32}
    assert all(p.requires_grad for p in real_size.values())


def test_trainable_names_map_one_to_one_to_upstream(real_size):
    upstream = {to_upstream(name) for name in real_size}
    modules = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    projections = [
        "image_llama_proj",
        "video_attention_mlp",
        "affectgpt_proj",
        "audio_attention_mlp",
        "audio_llama_proj",
        "multi_audio_embs",
        "multi_video_embs",
        "attention_mlp",
        "fc_att",
        "multi_llama_proj",
    ]
    assert upstream == {
        f"llama_model.base_model.model.model.layers.{layer}.{module}.lora_{side}.default.weight"
        for layer in range(28)
        for module in modules
        for side in "AB"
    } | {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
    assert {from_upstream(name) for name in upstream} == set(real_size)


def test_only_adapter_and_fusion_require_gradients(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.trainable_parameters())


def test_trained_tensors_are_fp32_over_a_bf16_base(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder):
    model = AffectGPT.create(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    prompt = build_prompt(make_sample(), make_features(), model.tokenizer)
    assert model.embed([prompt])[0].dtype == torch.bfloat16


def test_placeholders_are_single_special_tokens_and_add_no_embedding_rows(model):
    rows = model.embed_tokens.weight.shape[0]
    ids = model.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
    assert ids == list(range(rows, rows + 5))
    assert model.tokenizer.decode([*ids, 70], skip_special_tokens=True) == model.tokenizer.decode([70])


def test_embed_is_token_embeddings_except_at_placeholders(model):
    prompt = build_prompt(make_sample(), make_features(), model.tokenizer)
    (embeds,) = model.embed([prompt])
    rows = model.embed_tokens.weight.shape[0]
    spliced = torch.tensor([token >= rows for token in prompt.token_ids])
    assert spliced.sum() == 3
    plain = model.embed_tokens(torch.tensor(prompt.token_ids)[~spliced])
    torch.testing.assert_close(embeds[~spliced], plain, rtol=0, atol=0)

    face, audio = prompt.features["face"], prompt.features["audio"]
    fusion = model.fusion
    multi = torch.stack([fusion.multi_video_embs(face.mean(0)), fusion.multi_audio_embs(audio.mean(0))])
    multi = fusion.fc_att(fusion.attention_mlp(multi.flatten())) @ multi
    expected = torch.stack(
        [
            fusion.multi_llama_proj(multi),
            fusion.audio_llama_proj(fusion.audio_attention_mlp(audio)[:, 0] @ audio),
            fusion.affectgpt_proj(fusion.video_attention_mlp(face)[:, 0] @ face),
        ]
    )
    torch.testing.assert_close(embeds[spliced], expected)


def test_embedding_many_prompts_equals_embedding_each(model):
    choices = ["multiface_audio_face_frame_text", "textonly", "multiframe_audio_frame_text", "faceonly", "frame"]
    prompts = [
        build_prompt(make_sample(f"clip {i}", "so " * i), make_features(i), model.tokenizer, face_or_frame=choice)
        for i, choice in enumerate(choices)
    ]
    together = model.embed(prompts)
    for prompt, embeds in zip(prompts, together, strict=True):
        assert embeds.shape == (len(prompt.token_ids), 32)
        torch.testing.assert_close(embeds, model.embed([prompt])[0])


def test_gradients_reach_every_fusion_tensor_that_was_used(model):
    prompt = build_prompt(make_sample(), make_features(), model.tokenizer, face_or_frame="multiface_audio_face_text")
    target_logprobs(model, prompt).sum().backward()
    for name, parameter in model.trainable_parameters().items():
        if "image_llama_proj" in name:
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def _without(modality: str, model: AffectGPT) -> Prompt:
    choice = {"audio": "face_text", "video": "audio_text", "subtitle": "face"}[modality]
    sample = make_sample(subtitle="" if modality == "subtitle" else make_sample().subtitle)
    return build_prompt(sample, make_features(), model.tokenizer, face_or_frame=choice)


@pytest.mark.parametrize("modality", ["audio", "video", "subtitle"])
@torch.no_grad()
def test_dropping_a_modality_changes_the_logprobs(model, modality):
    whole = target_logprobs(model, build_prompt(make_sample(), make_features(), model.tokenizer, face_or_frame="face"))
    assert (whole - target_logprobs(model, _without(modality, model))).abs().max() > 1e-3


@pytest.mark.parametrize(("modality", "choice"), [("audio", "face"), ("face", "face"), ("frame", "frame")])
@torch.no_grad()
def test_swapping_a_clips_media_changes_the_logprobs_of_the_same_text(model, modality, choice):
    features = make_features()
    swapped = features | {modality: make_features(1)[modality]}
    first, second = (build_prompt(make_sample(), f, model.tokenizer, face_or_frame=choice) for f in (features, swapped))
    assert first.token_ids == second.token_ids
    assert (target_logprobs(model, first) - target_logprobs(model, second)).abs().max() > 1e-3


@torch.no_grad()
def test_save_and_load_give_the_same_model(model, tmp_path):
    prompt = build_prompt(make_sample(), make_features(), model.tokenizer)
    expected = target_logprobs(model, prompt)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    loaded = AffectGPT.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    torch.testing.assert_close(target_logprobs(loaded, prompt), expected, rtol=0, atol=0)


def test_loaded_model_has_no_dropout_and_training_mode_has(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AffectGPT.from_pretrained(tmp_path)
    prompt = build_prompt(make_sample(), make_features(), loaded.tokenizer)
    with torch.no_grad():
        assert torch.equal(target_logprobs(loaded, prompt), target_logprobs(loaded, prompt))
        loaded.train()
        assert not torch.equal(target_logprobs(loaded, prompt), target_logprobs(loaded, prompt))


def test_a_tree_of_base_and_checkpoint_can_be_moved(model, tiny_llm_folder, tmp_path):
    shutil.copytree(tiny_llm_folder, tmp_path / "a" / "llm")
    model.config = dataclasses.replace(model.config, llm=str(tmp_path / "a" / "llm"))
    model.save_pretrained(tmp_path / "a" / "saved")
    (tmp_path / "a").rename(tmp_path / "b")
    assert AffectGPT.from_pretrained(tmp_path / "b" / "saved").config.llm == str(tmp_path / "b" / "llm")


def test_an_interrupted_save_keeps_the_former_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()

    def half(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("affectgpt.modeling.affectgpt.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace_features(p, drop="audio"), "'clip' has <MultiHere> but no 'audio' feature"),
        (lambda p: replace_features(p, image=torch.zeros(1, 12)), "'clip' has features image but no placeholder"),
        (lambda p: replace_features(p, audio=torch.zeros(8, 21)), r"'clip': feature 'audio' has shape \[8, 21\]"),
        (lambda p: dataclasses.replace(p, token_ids=p.token_ids * 2), "'clip' has <MultiHere> more than once"),
        (lambda p: dataclasses.replace(p, token_ids=(70,)), "features audio, face but no placeholder"),
    ],
)
def test_embed_names_the_prompt_and_feature_that_do_not_fit(model, change, message):
    prompt = build_prompt(make_sample(), make_features(), model.tokenizer)
    with pytest.raises(ValueError, match=message):
        model.embed([change(prompt)])


def replace_features(prompt: Prompt, drop: str | None = None, **features: torch.Tensor) -> Prompt:
    kept = {name: value for name, value in (prompt.features | features).items() if name != drop}
    return dataclasses.replace(prompt, features=kept)


def test_a_missing_base_llm_is_named(model, tmp_path):
    model.config = dataclasses.replace(model.config, llm=str(tmp_path / "gone"))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"model\.llm: there is no folder .*gone.*if it was moved, give its new path"):
        AffectGPT.from_pretrained(tmp_path / "saved")


def test_a_moved_base_llm_can_be_given(model, tiny_llm_folder, tmp_path):
    model.config = dataclasses.replace(model.config, llm=str(tmp_path / "gone"))
    model.save_pretrained(tmp_path / "saved")
    assert AffectGPT.from_pretrained(tmp_path / "saved", llm=tiny_llm_folder).config.llm == str(tiny_llm_folder)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_incomplete_base_weights_are_refused(model, tiny_llm_folder, tmp_path, fault):
    shutil.copytree(tiny_llm_folder, tmp_path / "llm")
    state = load_file(tmp_path / "llm" / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del state[key]
    else:
        state[key] = state[key][:10].clone()
    save_file(state, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"model\.llm: .*{tmp_path}/llm .*{key}"):
        AffectGPT.from_pretrained(tmp_path / "saved", llm=tmp_path / "llm")


def test_a_base_without_safetensors_is_refused(model, tiny_llm_folder, tmp_path):
    shutil.copytree(tiny_llm_folder, tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").rename(tmp_path / "llm" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"its weights in pytorch_model\.bin, but only safetensors are read"):
        AffectGPT.from_pretrained(tmp_path / "saved", llm=tmp_path / "llm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fusion.fc_att.bias"), "lacks 1 of the 48 tensors this model needs, first fusion.fc_att.bias"),
        (lambda s: s.update({"fusion.more": torch.zeros(1)}), "model lacks, first fusion.more"),
        (
            lambda s: s.update({"fusion.fc_att.bias": torch.zeros(3)}),
            r"fusion.fc_att.bias is \[3\], but this model needs \[2\]",
        ),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS_FILE)
    change(state)
    save_file(state, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}.*{message}"):
        AffectGPT.from_pretrained(tmp_path)


def test_a_truncated_checkpoint_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} is damaged"):
        AffectGPT.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} is missing"):
        AffectGPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(lora_rank=3), "unknown keys lora_rank"),
        (lambda c: c.pop("audio_dim"), "lacks audio_dim"),
        (lambda c: c.update(hidden_size=64), "has hidden size 32, but this model was made for 64"),
        (lambda c: c.update(lora_r=5), r"lora_A.default.weight is \[4, 32\], but this model needs \[5, 32\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    change(values)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AffectGPT.from_pretrained(tmp_path)


def test_a_folder_that_holds_no_model_is_named(tmp_path, tiny_llm_folder):
    for folder, words in (
        (tmp_path, f"{CONFIG_FILE} is missing, so .* holds no AffectGPT: give one that"),
        (tiny_llm_folder, "holds no AffectGPT: if it is a causal LM, give it as model.llm"),
        ("Qwen/Qwen2.5-7B-Instruct", "there is no folder Qwen/Qwen2.5-7B-Instruct"),
    ):
        with pytest.raises(InputError, match=rf"^model\.path: .*{words}"):
            AffectGPT.from_pretrained(folder)
    for text in ("{", "[]"):
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(InputError, match=r"^model\.path: .*save the model again"):
            AffectGPT.from_pretrained(tmp_path)


def test_an_adapters_folder_is_no_llm(model, tmp_path, tiny_clip_folder, tiny_hubert_folder):
    """A second adapter around the first would be trained, and one of the two saved."""
    model.llm.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"^model\.llm: .*adapter holds an adapter, not a whole model"):
        AffectGPT.create(tmp_path / "adapter", tiny_clip_folder, tiny_hubert_folder)


def test_an_llm_without_a_tokenizer_is_refused(tiny_llm_folder, tmp_path, tiny_clip_folder, tiny_hubert_folder):
    shutil.copytree(tiny_llm_folder, tmp_path / "llm", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match=r"^model\.llm: .*holds no tokenizer"):
        AffectGPT.create(tmp_path / "llm", tiny_clip_folder, tiny_hubert_folder)


def test_create_refuses_an_encoder_of_another_kind(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder):
    with pytest.raises(ValueError, match=r"model\.visual_encoder: .* has no projection_dim: need a CLIP vision model"):
        AffectGPT.create(tiny_llm_folder, tiny_hubert_folder, tiny_hubert_folder)
