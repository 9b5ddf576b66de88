"""The decoder's parts, each against a plain computation of the same thing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout import attention
from grpo_core.rollout import cache as cache_module
from grpo_core.rollout.attention import SequencePlan, decode_attention, extent
from grpo_core.rollout.backends.torch import TorchDecoder
from grpo_core.rollout.cache import fill_holes
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.rollout.sampling import SamplingParams, sample_tokens
from grpo_core.rollout.scheduler import Scheduler
from grpo_core.rollout.stopping import StopConditions
from grpo_core.rollout.weights import FusedLinear, FusedModel

from .conftest import LORA_TARGETS, make_lm
from .sampling_models import VOCABULARY, CharTokenizer, make_prompts

CPU = torch.device("cpu")


def choose(logits, uniforms=None, seen=None, forbidden=(), limit=None, **rollout):
    params = SamplingParams(
        RolloutConfig(**rollout), tuple(forbidden), limit or logits.shape[1], np.zeros(0, dtype=bool)
    )
    never_sampled = torch.from_numpy(params.never_sampled(logits.shape[1]))
    return sample_tokens(logits, uniforms, params.rollout, never_sampled, seen)


@given(st.integers(0, 5000))
def test_extent_covers_with_little_waste(length):
    columns = extent(length)
    assert length <= columns < length + (16 if length <= 256 else 512) + (length == 0)
    assert columns % (16 if length <= 256 else 512) == 0


@given(st.lists(st.booleans()))
def test_filling_holes_keeps_the_living_and_moves_no_more_than_the_dead(alive):
    alive = np.array(alive, dtype=bool)
    order = fill_holes(alive)
    assert sorted(order) == list(np.flatnonzero(alive))
    assert (order != np.arange(len(order))).sum() <= (~alive).sum()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    prefix=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 8)]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("path", ["flash", "reference"])
def test_decode_attention_equals_dense_attention_of_each_row(path, rows, prefix, heads, seed):
    """Rows of any groups in any order, groups without rows, own lengths from 1."""
    kv_heads, heads_per_kv = heads
    torch.manual_seed(seed)
    batch, width, groups = len(rows), 16, len(prefix)
    q = torch.randn(batch, kv_heads, heads_per_kv, width, dtype=torch.float64)
    prefix_k, prefix_v = torch.randn(2, groups, kv_heads, 48, width, dtype=torch.float64)
    suffix_k, suffix_v = torch.randn(2, batch, kv_heads, 16, width, dtype=torch.float64)
    own = torch.randint(1, 17, (batch,))
    mask = torch.zeros(batch, 1, 1, 16, dtype=torch.float64)
    mask.masked_fill_(torch.arange(16) >= own[:, None, None, None], -torch.inf)
    plan = SequencePlan.build(np.array(rows), prefix, torch.float64, CPU)
    with pytest.MonkeyPatch.context() as patch:
        if path == "reference":
            patch.setattr(attention, "_attend", attention._attend_reference)
        out = decode_attention(q.flatten(1, 2), prefix_k, prefix_v, suffix_k, suffix_v, mask, plan)
    for i, group in enumerate(rows):
        k = torch.cat((prefix_k[group, :, : prefix[group]], suffix_k[i, :, : own[i]]), dim=1)
        v = torch.cat((prefix_v[group, :, : prefix[group]], suffix_v[i, :, : own[i]]), dim=1)
        weights = torch.softmax(q[i] @ k.transpose(1, 2) * width**-0.5, -1)
        # scores of the reference path are float32 by design
        torch.testing.assert_close(out[i], (weights @ v).flatten(), rtol=0, atol=2e-6)


def effective(module, width):
    """The matrix that a layer applies, `[in, out]`, and its bias."""
    zero = module(torch.zeros(1, width))
    return module(torch.eye(width)) - zero, zero[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "bias": "lora_only"},
        {"modules_to_save": ["lm_head", "down_proj"]},
        {"target_modules": ["lm_head", "q_proj", "gate_proj"]},
    ],
    ids=["lora", "rslora", "dora", "lora_bias", "modules_to_save", "head"],
)
def test_fused_weights_are_what_the_adapted_layers_apply(options):
    lm = make_lm("qwen2", num_hidden_layers=1)
    if "lora_bias" in options:  # an adapter's bias needs a layer that has one
        options = options | {"target_modules": ["q_proj", "v_proj"]}
    targets = [name for name in LORA_TARGETS if name not in options.get("modules_to_save", [])]
    peft = get_peft_model(lm, LoraConfig(**({"r": 4, "lora_dropout": 0.5, "target_modules": targets} | options)))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        weights, packed = FusedModel(peft.get_base_model()), FusedModel(peft.get_base_model(), packed=True)
        for disabled in (False, True):
            peft.train()
            with peft.disable_adapter() if disabled else torch.no_grad():
                weights.refresh()
                packed.refresh()
                assert all(module.training for module in peft.modules())
                peft.eval()
                layer, model = weights.layers[0], lm.model.layers[0]
                for fused, modules in {
                    layer.qkv: [model.self_attn.q_proj, model.self_attn.k_proj, model.self_attn.v_proj],
                    layer.out: [model.self_attn.o_proj],
                    layer.gate_up: [model.mlp.gate_proj, model.mlp.up_proj],
                    layer.down: [model.mlp.down_proj],
                    weights.head: [lm.get_output_embeddings()],
                }.items():
                    width = fused.weight.shape[0]
                    expected = [effective(module, width) for module in modules]
                    torch.testing.assert_close(fused.weight, torch.cat([w for w, _ in expected], 1), rtol=0, atol=2e-6)
                    bias = torch.cat([b for _, b in expected])
                    found = torch.zeros_like(bias) if fused.bias is None else fused.bias
                    torch.testing.assert_close(found, bias, rtol=0, atol=2e-6)
                for plain, other in zip(weights._copies, packed._copies, strict=True):
                    if isinstance(plain, FusedLinear):
                        x, residual = torch.randn(5, plain.weight.shape[0]), torch.randn(5, plain.weight.shape[1])
                        torch.testing.assert_close(other(x), plain(x), rtol=0, atol=2e-5)
                        torch.testing.assert_close(other(x, residual), plain(x, residual), rtol=0, atol=2e-5)


def test_packed_weights_follow_the_model_and_frozen_ones_are_packed_once():
    lm = make_lm("qwen2")
    lm.requires_grad_(False)
    linear = FusedLinear([lm.model.layers[0].mlp.gate_proj, lm.model.layers[0].mlp.up_proj], packed=True)
    linear.refresh()
    packed = linear._packed
    linear.refresh()
    assert linear._packed is packed
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight.zero_()
    linear.refresh()
    out = linear(torch.randn(3, 32))
    assert out[:, :48].all()
    assert not out[:, 48:].any()


def test_fused_weights_stay_at_their_addresses_and_leave_frozen_layers_alone():
    lm = make_lm("llama")
    lm.requires_grad_(False)
    weights = FusedModel(lm)
    weights.refresh()
    matrix = weights.layers[1].down.weight
    address = matrix.data_ptr()
    matrix.zero_()  # a copy would undo this
    weights.refresh()
    assert not matrix.any()
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.add_(1)
    weights.refresh()
    assert torch.equal(matrix, lm.model.layers[1].mlp.down_proj.weight.t())
    assert matrix.data_ptr() == address


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    ],
    ids=str,
)
def test_drawn_frequencies_follow_transformers_warpers(settings_):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, logprobs = choose(logits.expand(draws, -1), uniforms, **settings_)
    rollout = RolloutConfig(**settings_)
    scores = logits / rollout.temperature
    torch.testing.assert_close(logprobs, torch.log_softmax(scores, -1)[0, tokens])
    if rollout.top_k:
        scores = TopKLogitsWarper(rollout.top_k)(None, scores)
    if rollout.top_p < 1:
        scores = TopPLogitsWarper(rollout.top_p)(None, scores)
    if rollout.min_p:
        scores = MinPLogitsWarper(rollout.min_p)(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy() * draws
    observed = np.bincount(tokens.numpy(), minlength=40)
    assert not observed[expected == 0].any()
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3


@given(
    size=st.integers(1, 200),
    uniform=st.one_of(st.sampled_from([0.5**33, 0.5, 1 - 0.5**33]), st.floats(1e-9, 1 - 1e-9)),
    seed=st.integers(0, 99),
    kept=st.floats(0.01, 1),
)
def test_inverse_cdf_finds_the_token_whose_share_holds_the_number(size, uniform, seed, kept):
    """For vocabularies below, at and above the block size, with tokens of weight 0 at either end too."""
    random = np.random.default_rng(seed)
    weights = random.exponential(size=(1, size)) * (random.random((1, size)) < kept)
    weights[0, random.integers(size)] = 1.0
    logits = torch.from_numpy(np.log(np.maximum(weights, 1e-300)) - 1e3 * (weights == 0)).float()
    tokens, _ = choose(logits, torch.tensor([uniform], dtype=torch.float64))
    sums = np.cumsum(weights[0]) / weights.sum()
    assert weights[0, tokens[0]] > 0
    assert sums[tokens[0]] >= uniform - 1e-5
    assert sums[tokens[0]] - weights[0, tokens[0]] / weights.sum() <= uniform + 1e-5


def test_log_prob_of_a_token_whose_probability_underflows_is_finite():
    tokens, logprobs = choose(torch.tensor([[300.0, 0.0, -5.0]]), temperature=0.0, forbidden=[0])
    assert (tokens.item(), logprobs.item()) == (1, -300.0)


def test_repetition_penalty_forbidden_tokens_and_limit_change_the_draw_and_not_the_log_prob():
    logits = torch.tensor([[3.0, 2.0, -1.0, 2.5, 9.0]])
    seen = torch.tensor([[True, False, False, False, False]])
    full = torch.log_softmax(logits, -1)[0]
    for options, expected in (
        ({"limit": 4}, 0),
        ({"limit": 4, "seen": seen, "repetition_penalty": 2.0}, 3),
        ({"limit": 4, "forbidden": [0, 3]}, 1),
        ({"limit": 4, "forbidden": [0, 3, 4, 99, -1]}, 1),
    ):
        tokens, logprobs = choose(logits, temperature=0.0, **options)
        assert tokens.tolist() == [expected]
        torch.testing.assert_close(logprobs[0], full[expected])


def stop_conditions(*strings):
    return StopConditions(make_lm(), CharTokenizer(), strings)


def test_stop_conditions_see_end_tokens_and_strings_over_token_borders():
    stop = stop_conditions("###", "ab")
    tokenizer = CharTokenizer()
    ids = {c: ord(c) - 33 for c in "#abx"}
    assert tokenizer.decode([ids["#"]]) == "#"
    completions = np.array([[ids[c] for c in text] for text in ("x###", "x##x", "xxab", "xxba")])
    lengths = np.full(4, 4)
    rows = np.arange(4)
    assert stop.check(completions[:, -1], completions, rows, lengths).tolist() == [True, False, True, False]
    assert stop.check(np.array([1, 5]), completions, rows[:2], lengths).tolist() == [True, False]
    assert [stop.text(c.tolist()) for c in completions] == ["x", "x##x", "xx", "xxba"]


def test_every_end_token_of_the_generation_config_ends():
    lm = make_lm()
    lm.generation_config.eos_token_id = [7, 9]
    end = StopConditions(lm, CharTokenizer(), ()).end_tokens
    assert np.flatnonzero(end).tolist() == [1, 7, 9]  # 1 is the tokenizer's


def sample(lm, lengths=(5, 1, 17, 9, 30, 2), memory_budget=None, **options):
    rollout = RolloutConfig(**({"group_size": 3, "max_new_tokens": 25} | options))
    sampler = GroupSampler(Policy(lm), CharTokenizer(), memory_budget=memory_budget)
    groups = sampler.sample(make_prompts(lengths), rollout)
    assert memory_budget is None or 1 < sampler.timings["slots"] < len(lengths)
    return [[completion.token_ids for completion in group.completions] for group in groups]


def test_reading_tokens_back_every_few_steps_changes_nothing(monkeypatch):
    lm = make_lm("qwen3")
    lm.generation_config.eos_token_id = [1, *range(60, 70)]
    expected = sample(lm, repetition_penalty=1.3)
    init = Scheduler.__init__

    def eight_steps(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.steps_per_read = 8

    monkeypatch.setattr(Scheduler, "__init__", eight_steps)
    assert sample(lm, repetition_penalty=1.3) == expected
    assert sample(lm, repetition_penalty=1.3, memory_budget=200_000) == expected


def test_prompts_prefilled_in_pieces_give_the_same_completions(monkeypatch):
    lm = make_lm("llama")
    expected = sample(lm)
    monkeypatch.setattr(cache_module, "PREFILL_TOKENS", 20)
    assert sample(lm) == expected


def test_attention_without_the_cpu_kernel_gives_the_same_completions(monkeypatch):
    lm = make_lm("mistral")
    expected = sample(lm)
    monkeypatch.setattr(attention, "_attend", attention._attend_reference)
    assert sample(lm) == expected


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn", "dynamic"])
def test_scaled_rotations_equal_generate(rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope != "linear":
        parameters |= {"original_max_position_embeddings": 64}
    lm = make_lm("llama", rope_parameters=parameters, max_position_embeddings=128)
    prompts = make_prompts((6, 20))
    sampler = GroupSampler(Policy(lm), CharTokenizer())
    assert isinstance(sampler.decoder, TorchDecoder) == (rope != "dynamic")
    groups = sampler.sample(prompts, RolloutConfig(group_size=1, max_new_tokens=20, temperature=0.0))
    for group in groups:
        ids = torch.tensor([group.prompt.token_ids])
        expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(group.completions[0].token_ids) == expected[0, ids.shape[1] :].tolist()


def test_bfloat16_log_probs_are_near_a_forward_of_the_same_model():
    lm = make_lm("qwen2").to(torch.bfloat16)
    prompts = make_prompts((5, 40))
    groups = GroupSampler(Policy(lm), CharTokenizer()).sample(prompts, RolloutConfig(group_size=2, max_new_tokens=20))
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logits = lm(ids).logits[0, -len(completion.token_ids) - 1 : -1].float()
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert np.abs(completion.logprobs - expected.numpy()).max() < 0.1
            assert max(completion.token_ids) < VOCABULARY
