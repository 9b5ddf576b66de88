"""Loading from local folders: what is missing, damaged or code is one sentence; nothing random is trained."""

import ast
import builtins
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    HubertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_core.errors import InputError
from grpo_core.pretrained import (
    check_weights,
    load_causal_lm,
    load_model,
    load_tokenizer,
    missing_parameters,
    probe_text,
    read_config,
    save_model,
    stored_dtype,
)
from tests.grpo_core.conftest import LORA_TARGETS, SIZES, make_lm

KEY = "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A bfloat16 Qwen2 in float32's clothes would be twice as large: this one is stored as it should be."""
    path = tmp_path_factory.mktemp("pretrained") / "llm"
    make_lm().to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


def edit(path: Path, **changed) -> None:
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(values))


def drop(folder: Path, *names: str, file: str = "model.safetensors") -> None:
    state = {name: tensor for name, tensor in load_file(folder / file).items() if name not in names}
    save_file(state, folder / file, metadata={"format": "pt"})


def halve(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def is_one_sentence(error: InputError) -> bool:
    text = str(error)
    return "\n" not in text and not re.search(r"[.!?] [A-Z]", text) and "trust_remote_code" not in text


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer], ids=["model", "tokenizer"])
def test_what_is_no_model_folder_is_named_with_the_way_out_and_nothing_is_asked_of_the_hub(
    load, folder, tmp_path, monkeypatch
):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "empty").mkdir()
    cache = tmp_path / "models--Qwen--Qwen2.5-0.5B"
    shutil.copytree(folder, cache / "snapshots" / "abc")
    for place, words in (
        ("Qwen/Qwen2.5-0.5B", "hf download Qwen/Qwen2.5-0.5B --local-dir DIR"),
        (tmp_path / "gone", "there is no folder"),
        (tmp_path / "empty", "has no config.json"),
        (folder / "model.safetensors", "is a file"),
        (cache, f"give {cache / 'snapshots' / 'abc'}"),
    ):
        with pytest.raises(InputError) as caught:
            load(place, KEY)
        assert str(caught.value).startswith(f"{KEY}: ")
        assert str(place) in str(caught.value)
        assert words in str(caught.value)
        assert is_one_sentence(caught.value)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: drop(f, "model.layers.1.mlp.up_proj.weight"), "lack 1 tensors .*'qwen2' .*layers.1.mlp.up_proj"),
        (lambda f: drop(f, "lm_head.weight", "model.norm.weight"), "lack 2 tensors .*first lm_head.weight"),
        (lambda f: drop(f, "model.embed_tokens.weight"), "lack 1 tensors .*embed_tokens"),
        (lambda f: halve(f / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            "pointer of Git LFS.*git lfs pull",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only safetensors are read"),
        (lambda f: (f / "model.safetensors").rename(f / "weights.gguf"), "weights in weights.gguf, but only"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: edit(f / "config.json", intermediate_size=40), r"down_proj.weight is \[32, 48\], the config says"),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
            "lack 12 tensors .*layers.2",
        ),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "config.json cannot be read, model type 'qwen2'"),
        (lambda f: edit(f / "config.json", model_type="mind"), "model type 'mind'"),
        (lambda f: halve(f / "config.json"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no model's config"),
        (
            lambda f: edit(f / "config.json", attn_implementation="kernels-community/flash-attn"),
            "attn_implementation to 'kernels-community/flash-attn', which is code",
        ),
    ],
)
def test_a_folder_that_would_train_a_random_layer_or_not_load_is_refused(copied, damage, words):
    damage(copied)
    with pytest.raises(InputError, match=rf"^{KEY}: (the weights in )?{copied}.*{words}") as caught:
        load_causal_lm(copied, KEY)
    assert is_one_sentence(caught.value)


def test_a_shard_that_is_missing_or_cut_is_named(tmp_path):
    make_lm().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = check_weights(tmp_path, KEY)
    assert len(shards) > 1
    halve(shards[1])
    with pytest.raises(InputError, match=f"{shards[1].name} is damaged"):
        load_causal_lm(tmp_path, KEY)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name} is missing"):
        load_causal_lm(tmp_path, KEY)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json cannot be read"):
        load_causal_lm(tmp_path, KEY)


def test_tied_weights_are_not_missing(tmp_path):
    make_lm(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_causal_lm(tmp_path, KEY)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_parts_that_the_forward_never_calls_may_be_missing(tmp_path, tiny_hubert_folder):
    """A mask embedding of pre-training, and an image branch; with one tensor of what is called, they are refused."""
    hubert = shutil.copytree(tiny_hubert_folder, tmp_path / "hubert")
    drop(hubert, "masked_spec_embed")

    def probe_audio(model):
        return model(torch.zeros(1, 4000)).last_hidden_state

    assert load_model(HubertModel, hubert, KEY, probe=probe_audio).config.model_type == "hubert"
    with pytest.raises(InputError, match="masked_spec_embed"):
        load_model(HubertModel, hubert, KEY)  # nothing is known to be unused
    drop(hubert, "encoder.layers.0.attention.k_proj.weight")
    with pytest.raises(InputError, match=r"lack 1 tensors .*first encoder.layers.0.attention.k_proj.weight"):
        load_model(HubertModel, hubert, KEY, probe=probe_audio)

    text = Qwen2Config(**SIZES)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", "image_size": 28, **vision}
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    names = load_file(tmp_path / "llava" / "model.safetensors").keys()
    drop(tmp_path / "llava", *(name for name in names if "vision_tower" in name or "projector" in name))
    load_model(LlavaForConditionalGeneration, tmp_path / "llava", KEY, probe=probe_text)
    drop(
        tmp_path / "llava",
        next(name for name in names if "layers.0.self_attn.q_proj.weight" in name and "lang" in name),
    )
    with pytest.raises(InputError, match=r"lack 1 tensors .*q_proj"):
        load_model(LlavaForConditionalGeneration, tmp_path / "llava", KEY, probe=probe_text)


def test_an_expert_that_two_tokens_do_not_reach_is_not_optional(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1}
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=1)).save_pretrained(tmp_path)
    lost = [name for name in load_file(tmp_path / "model.safetensors") if "experts" in name]
    for name in (lost[0], lost[-1]):
        copied = shutil.copytree(tmp_path, tmp_path / "copied", dirs_exist_ok=True, ignore=lambda *_: ["copied"])
        drop(copied, name)
        with pytest.raises(InputError, match="experts"):
            load_causal_lm(copied, KEY)


def test_the_probe_leaves_what_is_trained_as_it_was():
    model = make_lm(lora=True)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = {name for name in before if "layers.0.mlp" in name}
    assert missing_parameters(model, names | {"rotary.inv_freq"}, probe_text) == names
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "holds no tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: halve(f / "tokenizer.json"), "the tokenizer in .* does not load"),
        (lambda f: halve(f / "tokenizer_config.json"), "the tokenizer in .* does not load"),
    ],
)
def test_a_folder_without_a_whole_tokenizer_is_refused(copied, damage, words):
    """transformers makes a Qwen2 tokenizer of one token where the files are missing."""
    damage(copied)
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(copied, KEY)
    assert str(copied) in str(caught.value)
    assert is_one_sentence(caught.value)


# --- code in the folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known_type", [True, False])
def test_code_in_a_folder_is_neither_run_nor_asked_about(copied, tmp_path, monkeypatch, known_type):
    mark = tmp_path / "the code ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (copied / "evil.py").write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoFeatureExtractor")
    auto_map = {name: "evil.Thing" for name in names} | {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}
    edit(copied / "config.json", auto_map=auto_map, **({} if known_type else {"model_type": "evil"}))
    edit(copied / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Thing")

    def asked(*_):
        raise AssertionError("the user was asked")

    monkeypatch.setattr(builtins, "input", asked)
    for load in (load_causal_lm, load_tokenizer, read_config):
        if known_type:
            load(copied, KEY)  # by transformers' own class
        else:
            with pytest.raises(InputError, match=r"'evil' needs code from its folder .*, which is never run") as caught:
                load(copied, KEY)
            assert is_one_sentence(caught.value)
    assert not mark.exists()


def test_every_load_in_the_sources_takes_local_files_only_and_no_code():
    """All go through this module, or hand its arguments on; our own classes and PEFT's load no code."""
    root = Path(__file__).parents[2]
    files = [path for room in ("grpo_core", "model", "recipes", "bench") for path in (root / room).rglob("*.py")]
    assert len(files) > 80
    calls = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr == "from_pretrained" and owner not in ("AffectGPT", "Encoders", "cls"):
                    given = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
                    calls.append((f"{path.name}: {owner}", given))
    assert len(calls) >= 5
    for call, given in calls:
        assert "LOCAL" in given or call.endswith((": PeftModel", ": PeftConfig")), call


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_a_bf16_checkpoint_trained_in_float32_is_written_as_bf16(folder, tmp_path):
    model = load_causal_lm(folder, KEY, dtype="float32")
    assert stored_dtype(folder, KEY) == torch.bfloat16
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    save_model(model, tmp_path / "auto", stored_dtype(folder, KEY))
    saved = load_file(tmp_path / "auto" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert (tmp_path / "auto" / "model.safetensors").stat().st_size <= (
        folder / "model.safetensors"
    ).stat().st_size + 64
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "auto")  # by the dtype that its config names
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert model.dtype == torch.float32  # the model in memory stays as it was
    save_model(model, tmp_path / "whole")
    assert {tensor.dtype for tensor in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}


def test_tied_weights_are_written_once_in_another_dtype(tmp_path):
    model = make_lm(tie_word_embeddings=True)
    save_model(model, tmp_path, torch.float16)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert saved["model.embed_tokens.weight"].dtype == torch.float16


def test_a_config_without_a_dtype_is_answered_by_the_weights(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["dtype"]
    (copied / "config.json").write_text(json.dumps(config))
    assert stored_dtype(copied, KEY) == torch.bfloat16


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    base = load_causal_lm(folder, KEY)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_model(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_folder_is_its_base_with_the_adapter_ready_to_be_trained_on(adapter, folder, tmp_path):
    model = load_causal_lm(adapter, KEY)
    stored = load_file(adapter / "adapter_model.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(stored) == 2 * 7 * 2
    for name, parameter in trained.items():
        assert torch.equal(parameter, stored[name.replace(".default", "")]), name
    assert load_tokenizer(adapter, KEY).decode(load_tokenizer(folder, KEY)("sad").input_ids) == "sad"  # the base's
    save_model(model, tmp_path / "again", torch.bfloat16)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert load_causal_lm(tmp_path / "again", KEY).get_base_model().config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a: halve(a / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (
            lambda a: drop(
                a,
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
                file="adapter_model.safetensors",
            ),
            "lacks 1 tensors of its adapter, first .*layers.0.mlp.up_proj.lora_B",
        ),
        (lambda a: edit(a / "adapter_config.json", r=5), "does not fit its base"),
        (lambda a: edit(a / "adapter_config.json", base_model_name_or_path="Qwen/Q"), "adapter of 'Qwen/Q', and there"),
        (lambda a: edit(a / "adapter_config.json", base_model_name_or_path=None), "there is no such folder"),
        (lambda a: halve(a / "adapter_config.json"), "adapter_config.json cannot be read"),
    ],
)
def test_a_damaged_adapter_or_one_without_its_base_is_refused(adapter, damage, words):
    damage(adapter)
    with pytest.raises(InputError, match=words) as caught:
        load_causal_lm(adapter, KEY)
    assert str(adapter) in str(caught.value)
    assert is_one_sentence(caught.value)


def test_an_adapter_is_no_whole_model_and_beside_one_it_is_ambiguous(adapter, copied):
    with pytest.raises(InputError, match="holds an adapter, not a whole model"):
        load_model(AutoModelForCausalLM, adapter, KEY)
    for file in adapter.iterdir():
        shutil.copy(file, copied)
    with pytest.raises(InputError, match="holds a whole model and an adapter"):
        load_causal_lm(copied, KEY)


def test_a_folder_that_is_whole_gives_the_model_that_was_saved(folder):
    model = load_causal_lm(folder, KEY)
    assert isinstance(model, Qwen2ForCausalLM)
    assert not model.training
    for name, tensor in make_lm().to(torch.bfloat16).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
