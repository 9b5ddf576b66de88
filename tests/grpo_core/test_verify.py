"""A model is trained and sampled as its own forward computes it, to 1e-4 nats, or refused in one sentence."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from grpo_core import families, verify
from grpo_core.config.options import OptimConfig, RolloutConfig, RunConfig, SFTConfig
from grpo_core.families import ModelRefused, is_known_right, length_limit
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy, disable_dropout
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.training.sft import Example, SFTTrainer
from grpo_core.types import Prompt
from grpo_core.verify import TOLERANCE, compare, own_logprobs, prompt_lengths, verify_model
from tests.grpo_core.conftest import FAMILIES, SIZES, make_lm
from tests.grpo_core.model_zoo import DOZEN, PAGE, measure, names_of, tiny_model
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts, sampled

FINAL_CAP = {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [9.0] * 4,
    "factor": 4.0,
}


def own_logits(lm, ids: list[int]) -> torch.Tensor:
    """Logits of one sequence by the model's own forward, float64."""
    with torch.no_grad():
        return lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def train_by_sft(policy: Policy, folder) -> SFTTrainer:
    run = RunConfig(name="sft", output_dir=folder, prompts_per_step=1)
    return SFTTrainer(policy, [Example(Prompt("a", (5, 6)), (7, 8))], SFTConfig(OptimConfig(), run))


# --- right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DOZEN)
def test_common_models_are_right_in_every_way_they_are_run(model_type):
    what, result = measure(model_type)
    assert what == "right"
    assert max(result.packed[1], result.drawn[1], result.training[1]) < TOLERANCE  # the maximum too
    assert model_type in names_of("right", PAGE.read_text())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("cohere2", {"logit_scale": 0.25}),
        ("minicpm3", {}),
        ("hyperclovax", {"logits_scaling": 0.5}),
        ("gemma2", FINAL_CAP),
    ],
)
def test_scaled_and_capped_logits_are_those_of_the_model_at_any_temperature(model_type, options):
    lm = tiny_model(model_type, **options)
    prompt, completion = [5, 6, 7, 8], [9, 30, 11]
    logits = own_logits(lm, [*prompt, *completion])[3:-1] / 0.7
    plain = lm.get_output_embeddings()(own_hidden(lm, [*prompt, *completion]))[3:-1].double() / 0.7
    assert (logits - plain).abs().max() > 1e-2  # the model does scale or cap
    made = Policy(lm).logprobs(
        GroupLayout.pack([prompt], [[completion]]), [Prompt("a", tuple(prompt))], temperature=0.7, entropy=True
    )
    expected = logits.log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(made.logprob.double(), chosen, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(made.entropy.double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)


def own_hidden(lm, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def test_a_scaled_model_draws_what_it_trains_on():
    lm = tiny_model("granite", logits_scaling=0.25)
    policy = Policy(lm)
    groups = sampled(GroupSampler(policy, CharTokenizer()), make_prompts((5, 9)), group_size=3, max_new_tokens=8)
    trained = policy.logprobs(GroupLayout.from_groups(groups), [group.prompt for group in groups]).logprob.detach()
    drawn = torch.cat([torch.from_numpy(c.logprobs) for group in groups for c in group.completions])
    assert (trained - drawn).abs().max() < 1e-5


def test_adapters_are_compared_as_they_are():
    model = get_peft_model(tiny_model("granite"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    result = verify_model(model)
    assert result.packed[1] < 1e-5
    assert verify_model(model) is None  # once in a process


def test_every_rate_of_dropout_is_switched_off():
    """OPT calls F.dropout with a rate that it keeps as a number, and skips layers by another."""
    lm = tiny_model("opt", dropout=0.5, layerdrop=0.5)
    prompts, layout = [Prompt("a", (5, 6, 7))], GroupLayout.pack([[5, 6, 7]], [[[8, 9, 10], [11]]])
    policy = Policy(lm)
    disable_dropout(policy.module)
    evaluated = policy.logprobs(layout, prompts).logprob
    policy.module.train()
    assert torch.equal(policy.logprobs(layout, prompts).logprob, evaluated)


# --- refused -----------------------------------------------------------------------------------------------------

STATE = "carry a recurrent or convolutional state"
OWN_ATTENTION = "does not use transformers' attention interface"
REFUSED = {
    "qwen3_5_text": STATE,
    "qwen3_next": STATE,
    "lfm2": STATE,
    "falcon_h1": STATE,
    "mamba": STATE,
    "recurrent_gemma": "carry a state",
    "gptj": OWN_ATTENTION,
    "falcon": OWN_ATTENTION,
    "bloom": OWN_ATTENTION,
    "gpt_oss": r"GptOssAttention has sinks \(s_aux\)",
    "deepseek_v32": r"has chosen keys \(indices\)",
    "llama4_text": "does not name its layers",
    "gemma2": r"config\.attn_logit_softcapping is 50",
    "bert": "sees later tokens",
    "bart": r"packed groups its log-probs differ from its own forward's by 0\.\d+ nats a token in the median",
    "doge": r"sampled over a cache differ from its own forward's by 0\.\d+ nats .* in the median \(0\.\d+ at most\)",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_would_be_wrong_is_refused_in_one_sentence_wherever_it_is_run(model_type, tmp_path):
    lm = tiny_model(model_type)
    lm.config._name_or_path = "/models/mine"
    messages = set()
    for run in (lambda: GroupSampler(Policy(lm), CharTokenizer()), lambda: train_by_sft(Policy(lm), tmp_path)):
        with pytest.raises(ModelRefused, match=REFUSED[model_type]) as error:
            run()
        messages.add(str(error.value))
    (message,) = messages
    assert message.startswith(f"model type {lm.config.model_type!r} (/models/mine) cannot be trained or sampled: ")
    assert message.endswith("use one of: qwen2, qwen3, llama, mistral; or another that docs/models.md lists")
    assert "\n" not in message


def test_attention_alone_of_a_hybrid_type_is_right():
    """Granite 4's class says that it is stateful, but has models of attention alone."""
    lm = tiny_model("granitemoehybrid", layer_types=["full_attention"] * 4, position_embedding_type="rope")
    assert verify_model(lm).packed[1] < 1e-5


def test_a_rank_refuses_what_another_has_found(monkeypatch):
    monkeypatch.setattr(verify.c10d, "is_initialized", lambda: True)
    monkeypatch.setattr(verify.c10d, "get_rank", lambda: 0)
    monkeypatch.setattr(verify.c10d, "get_world_size", lambda: 2)
    monkeypatch.setattr(verify, "gather_objects", lambda problem, dist: [problem, "rank 1 has seen it"])
    with pytest.raises(ModelRefused, match="rank 1 has seen it"):
        verify_model(tiny_model("granite"))


# --- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_rotations_that_change_with_the_longest_sequence_are_right_up_to_it(model_type, options):
    lm = tiny_model(model_type, max_position_embeddings=24 if model_type == "llama" else 96, **options)
    assert length_limit(lm.config).tokens == 24
    assert verify_model(lm).longest == 24
    policy = Policy(lm)
    short, long = [5, 6, 7], list(range(10, 30))
    prompts = [Prompt("short", tuple(short)), Prompt("long", tuple(long))]
    layout = GroupLayout.pack([short, long], [[[8, 9]], [[40, 41, 42, 43]]])
    made = policy.logprobs(layout, prompts).logprob[:2].detach().double()
    expected = own_logits(lm, [*short, 8, 9])[2:-1].log_softmax(-1).gather(1, torch.tensor([[8], [9]]))[:, 0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    beyond = GroupLayout.pack([short, long], [[[8, 9]], [[40, 41, 42, 43, 44]]])
    with pytest.raises(NotImplementedError, match=r"config\.original_max.*is 24.*prompt 'long'.*25 tokens"):
        policy.logprobs(beyond, prompts)
    with pytest.raises(ValueError, match=r"25 is more than config\.\w+"):
        GroupSampler(policy, CharTokenizer()).sample(prompts, RolloutConfig(group_size=2, max_new_tokens=5))


class Stretching(LlamaRotaryEmbedding):
    """Positions count half once one of them lies beyond a number in the config."""

    def forward(self, x, position_ids):
        beyond = position_ids.max() >= self.config.stretch_window
        return super().forward(x, position_ids // 2 if beyond else position_ids)


@pytest.mark.parametrize("window", [40, 400])
def test_what_changes_beyond_a_number_in_the_config_is_found(window):
    """Short sequences alone would be right."""
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 512}, stretch_window=window)
    config.model_type = "stretching"
    lm = LlamaForCausalLM(config).eval()
    lm.model.rotary_emb = Stretching(config)
    assert sorted(prompt_lengths(config)) == [5, 11, 19, window - 3]
    with pytest.raises(ModelRefused, match=r"model type 'stretching'.*nats a token in the median"):
        verify_model(lm)
    config.stretch_window = families.MOST_COMPARED + 1  # too long to compare: longer sequences are refused
    assert verify_model(lm).packed[1] < 1e-5
    assert Policy(lm).length_limit == ("config.stretch_window", families.MOST_COMPARED + 1)


def test_windows_are_approached_to_their_last_token():
    config = tiny_model("gemma3_text").config
    assert config.sliding_window == 40
    assert max(prompt_lengths(config)) + verify.NEW_TOKENS == 40


# --- what is compared --------------------------------------------------------------------------------------------


def test_a_large_model_is_compared_on_the_fewest_layers_with_one_of_each_kind(monkeypatch):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    options = {"layer_types": kinds, "num_hidden_layers": 5}
    lm = tiny_model("gemma3_text", **options).to(torch.bfloat16)
    monkeypatch.setattr(verify, "WHOLE_BYTES", 0)
    small, layers = verify.float_copy(lm)
    assert layers == 3
    assert [layer.self_attn.is_sliding for layer in small.model.layers] == [True, True, False]
    first, copied = lm.model.layers[0].mlp.up_proj.weight, small.model.layers[0].mlp.up_proj.weight
    assert copied.dtype == torch.float32
    assert torch.equal(copied, first.float())
    assert len(lm.model.layers) == 5  # the model itself is as it was
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}
    result = verify_model(lm)
    assert result.layers == 3
    assert max(result.packed[1], result.drawn[1]) < 1e-5
    with pytest.raises(ModelRefused, match="in the median"):
        verify_model(tiny_model("bart"))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_are_known_to_be_right_are(family, monkeypatch):
    lm = make_lm(family)
    result = compare(lm)
    assert max(result.packed[1], result.drawn[1], result.training[1]) < 1e-5
    assert is_known_right(lm.config)
    monkeypatch.setattr(verify, "compare", lambda *_: pytest.fail("compared all the same"))
    assert verify_model(make_lm(family)) is None


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("qwen3", {"final_logit_softcapping": 30.0}),
        ("mistral", {"logits_scaling": 8.0}),
        ("llama", {"attention_sinks": True}),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}),
    ],
)
def test_a_field_that_is_not_known_makes_a_known_type_unknown(family, options):
    config_class, _, extra = FAMILIES[family]
    assert is_known_right(config_class(**SIZES | extra))
    assert not is_known_right(config_class(**SIZES | extra | options))


def test_random_tokens_are_none_that_the_config_names():
    config = tiny_model("gemma3").config
    assert {0, 1} <= verify.special_tokens(config)
    assert config.image_token_index in verify.special_tokens(config)


def test_own_logprobs_are_those_of_one_sequence_alone():
    lm = make_lm("llama")
    (group,) = sampled(GroupSampler(Policy(lm), CharTokenizer()), make_prompts((7,)), group_size=2, max_new_tokens=4)
    with torch.no_grad():
        found = own_logprobs(lm, group)
    ids = [*group.prompt.token_ids, *group.completions[0].token_ids]
    expected = own_logits(lm, ids).log_softmax(-1)[torch.arange(6, len(ids) - 1), torch.tensor(ids[7:])]
    torch.testing.assert_close(found[: len(expected)], expected)


# --- prompts with images -----------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
IMAGE = 96  # the placeholder's id


class Images:
    """Puts a model's own image features in place of placeholders, as its forward does."""

    def __init__(self, lm):
        self.lm = lm

    def __call__(self, prompts):
        rows = []
        for prompt in prompts:
            ids = torch.tensor(prompt.token_ids)
            embeds = self.lm.get_input_embeddings()(ids).clone()
            features = self.lm.get_image_features(prompt.features["image"]).pooler_output
            embeds[ids == IMAGE] = torch.cat(list(features)).view(-1, embeds.shape[-1])
            rows.append(embeds)
        return rows


def test_llava_reads_an_image_as_its_own_forward_does():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    lm = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE)
    ).eval()
    prompts = [Prompt(f"p{i}", (5, 6, *[IMAGE] * 4, 7, 8 + i), {"image": torch.randn(1, 3, 8, 8)}) for i in range(2)]
    policy = Policy(lm, embed=Images(lm))
    sampler = GroupSampler(policy, CharTokenizer(), forbidden_tokens=[IMAGE])
    groups = sampled(sampler, prompts, group_size=2, max_new_tokens=5)
    with torch.no_grad():
        packed = policy.logprobs(GroupLayout.from_groups(groups), prompts).logprob
    drawn = torch.cat([torch.from_numpy(c.logprobs) for group in groups for c in group.completions])
    own = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = lm(input_ids=ids, pixel_values=group.prompt.features["image"]).logits[0, 7:-1]
            own.append(logits.log_softmax(-1).gather(1, ids[0, 8:, None])[:, 0])
    assert (packed - torch.cat(own)).abs().max() < 1e-5
    assert (drawn - torch.cat(own)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    ],
)
def test_images_of_models_with_positions_of_their_own_are_refused_and_their_text_is_right(config_class, model_class):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = config_class(
        text_config=SIZES | {"bos_token_id": 2, "head_dim": 8, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=IMAGE,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )
    lm = model_class(config).eval()
    with pytest.raises(ModelRefused, match=r"mrope_section, so an image's tokens have positions of three dimensions"):
        Policy(lm, embed=Images(lm))
    assert verify_model(lm).packed[1] < 1e-5


def test_images_of_a_model_that_is_not_known_to_splice_them_are_refused():
    lm = tiny_model("gemma3")
    with pytest.raises(ModelRefused, match="of models with an image or audio part only llava are known"):
        Policy(lm, embed=Images(lm))
    assert verify_model(lm).packed[1] < 1e-5  # its text is right


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_causal_lm_of_transformers_is_right_or_refused():
    page = PAGE.read_text()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what, result = measure(model_type)
        if result is not None:
            assert what == "right", model_type
            assert max(result.packed[0], result.drawn[0], result.training[0]) <= TOLERANCE, model_type
        kind = what.partition(":")[0]
        assert kind in ("right", "refused", "not built"), model_type
        assert model_type in names_of(kind, page), (model_type, what)


def test_models_load_as_their_folder_says(tmp_path):
    """The folder that a refusal names is the one that was loaded."""
    tiny_model("gpt_oss").save_pretrained(tmp_path / "oss")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "oss")
    with pytest.raises(ModelRefused, match=rf"\({tmp_path}/oss\)"):
        verify_model(lm)


def test_a_model_that_gives_no_numbers_is_refused():
    lm = tiny_model("granite")
    nn.init.constant_(lm.model.norm.weight, math.nan)
    with pytest.raises(ModelRefused, match="not finite"):
        verify_model(lm)
