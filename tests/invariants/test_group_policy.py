"""AffectGPT as a policy: packed groups equal separate sequences, and greedy group sampling equals `generate`."""

from types import SimpleNamespace

import pytest
import torch

from affectgpt.modeling.affectgpt import AffectGPT
from affectgpt.prompts import build_prompt, build_target
from grpo_core.config.options import RolloutConfig
from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.types import Prompt

LABELS = [["[happy]", "[sad, angry]", "[calm, proud, tired]"], ["[afraid, sad]", "[sad]"]]


@pytest.fixture
def model(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder) -> AffectGPT:
    torch.manual_seed(3)
    model = AffectGPT.create(tiny_llm_folder, tiny_clip_folder, tiny_hubert_folder, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def make_prompts(model: AffectGPT) -> list[Prompt]:
    prompts = []
    for n, subtitle in enumerate(("I told you so.", "Well.")):
        generator = torch.Generator().manual_seed(n)
        features = {name: torch.randn(8, width, generator=generator) for name, width in (("face", 12), ("audio", 20))}
        sample = SimpleNamespace(name=f"clip{n}", subtitle=subtitle, labels="[happy]", reason=None)
        prompts.append(build_prompt(sample, features, model.tokenizer))
    return prompts


def make_completions(model: AffectGPT) -> list[list[tuple[int, ...]]]:
    return [
        [build_target(SimpleNamespace(name="x", labels=labels, reason=None), model.tokenizer) for labels in group]
        for group in LABELS
    ]


def separate_logprobs(model: AffectGPT, prompts, completions) -> torch.Tensor:
    """`[R]`: every completion behind its own copy of the prompt, right-padded, by transformers' own attention."""
    rows, starts, targets = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            target = torch.tensor(completion)
            rows.append(torch.cat([*model.embed([prompt]), model.embed_tokens(target)]))
            starts.append(len(prompt.token_ids))
            targets.append(target)
    width = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logprobs = model.llm(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    return torch.cat(
        [
            logprobs[i, start - 1 + torch.arange(len(t)), t]
            for i, (start, t) in enumerate(zip(starts, targets, strict=True))
        ]
    )


def test_packed_groups_equal_separate_sequences_for_adapters_and_fusion(model):
    prompts, completions = make_prompts(model), make_completions(model)
    direction = torch.randn(sum(len(c) for group in completions for c in group), generator=torch.manual_seed(1))

    def run(logprobs: torch.Tensor):
        (logprobs * direction).sum().backward()
        gradients = {name: p.grad for name, p in model.trainable_parameters().items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return logprobs.detach(), gradients

    separate, expected = run(separate_logprobs(model, prompts, completions))
    policy = Policy(model.llm, embed=model.embed, module=model)
    layout = GroupLayout.pack([prompt.token_ids for prompt in prompts], completions)
    packed, gradients = run(policy.logprobs(layout, prompts).logprob)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    assert {name.split(".")[0] for name in gradients} == {"llm", "fusion"}
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_greedy_group_sampling_equals_generate_token_for_token(model):
    prompts = make_prompts(model)
    policy = Policy(model.llm, embed=model.embed, module=model)
    rollout = RolloutConfig(group_size=2, max_new_tokens=24, temperature=0.0)
    for prompt, group in zip(prompts, GroupSampler(policy, model.tokenizer).sample(prompts, rollout), strict=True):
        with torch.no_grad():
            embeds = model.embed([prompt])[0][None]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            reference = model.llm.generate(
                inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=24,
                pad_token_id=model.tokenizer.pad_token_id, eos_token_id=model.tokenizer.eos_token_id,
            )  # fmt: skip
        for completion in group.completions:
            assert list(completion.token_ids) == reference[0].tolist()
