"""One packed forward with each prompt computed once gives what separate padded sequences give: values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.types import Prompt
from grpo_kernels import GroupSpans, group_attention
from tests.grpo_core.conftest import FAMILIES, make_lm

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
COMPLETIONS = [[[20, 21, 22], [23], [], [24, 25, 26, 27, 28, 29]], [[30, 31], [32, 33, 34]], [[35], [36]]]


class Projector(nn.Module):
    """Stands for a multimodal fusion: prompts become embeddings through a trained layer."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.table = embedding.weight.detach()
        self.linear = nn.Linear(self.table.shape[1], self.table.shape[1])

    def forward(self, prompts):
        return [self.linear(self.table[list(prompt.token_ids)]) for prompt in prompts]


def make_policy(family: str, lora: bool):
    model = make_lm(family, lora=lora)
    projector = Projector(model.get_input_embeddings())
    return Policy(model, projector, nn.ModuleDict({"model": model, "projector": projector}))


def separate_logprobs(policy: Policy, prompts) -> torch.Tensor:
    """`[R]` by transformers' own attention: every completion with its own copy of the prompt, right-padded."""
    embeds, targets, lengths = [], [], []
    token_embedding = policy.causal_lm.get_input_embeddings()
    for prompt, members in zip(prompts, COMPLETIONS, strict=True):
        for completion in members:
            prompt_embeds = policy.embed([prompt])[0]
            embeds.append(torch.cat([prompt_embeds, token_embedding(torch.tensor(completion, dtype=torch.long))]))
            targets.append(completion)
            lengths.append(len(prompt.token_ids))
    width = max(len(x) for x in embeds)
    padded = torch.stack([torch.cat([x, torch.full((width - len(x), x.shape[1]), 7.0)]) for x in embeds])
    mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in embeds])
    policy.causal_lm.set_attn_implementation("eager")
    logits = policy.causal_lm(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits
    logprobs = torch.log_softmax(logits, -1)
    return torch.cat(
        [
            logprobs[i, start - 1 + torch.arange(len(target)), torch.tensor(target, dtype=torch.long)]
            for i, (start, target) in enumerate(zip(lengths, targets, strict=True))
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_packed_groups_equal_separate_padded_sequences(family, lora):
    prompts = [Prompt(str(i), tuple(ids)) for i, ids in enumerate(PROMPTS)]
    direction = torch.randn(sum(len(c) for group in COMPLETIONS for c in group), generator=torch.manual_seed(1))
    results = []
    for packed in (True, False):
        policy = make_policy(family, lora)
        if packed:
            result = policy.logprobs(GroupLayout.pack(PROMPTS, COMPLETIONS), prompts).logprob
        else:
            result = separate_logprobs(policy, prompts)
        (result * direction).sum().backward()
        gradients = {name: p.grad for name, p in policy.named_parameters().items()}
        results.append((result.detach(), gradients))
    (packed, packed_gradients), (separate, gradients) = results
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    assert any(name.startswith("projector") for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def dense_attention(q, k, v, spans: GroupSpans) -> torch.Tensor:
    """The same rule as one dense mask over the packed axis, in a few lines."""
    owner, member = [], []
    for n, (prompt, lengths) in enumerate(zip(spans.prompt_lengths, spans.completion_lengths, strict=True)):
        owner += [n] * (prompt + sum(lengths))
        member += [-1] * prompt + [g for g, length in enumerate(lengths) for _ in range(length)]
    owner, member = torch.tensor(owner), torch.tensor(member)
    mask = owner[:, None] == owner
    mask &= (member == -1) | (member[:, None] == member)
    mask &= torch.ones_like(mask).tril()
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


layouts = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4).map(tuple)), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None)
@given(layouts, st.sampled_from([(2, 2), (4, 2), (4, 1)]))
def test_group_attention_equals_a_dense_mask(layout, heads):
    spans = GroupSpans([prompt for prompt, _ in layout], [lengths for _, lengths in layout])
    generator = torch.manual_seed(spans.total)
    shapes = [(spans.total, heads[0], 8)] + 2 * [(spans.total, heads[1], 8)]
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    direction = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    outputs = [attention(*qkv, spans) for attention in (group_attention, dense_attention)]
    gradients = [torch.autograd.grad((output * direction).sum(), qkv) for output in outputs]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for mine, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)


def test_a_completion_does_not_see_its_siblings_or_another_prompt():
    policy = make_policy("qwen2", lora=False)
    prompts = [Prompt(str(i), tuple(ids)) for i, ids in enumerate(PROMPTS)]
    before = policy.logprobs(GroupLayout.pack(PROMPTS, COMPLETIONS), prompts).logprob
    changed = [[[40, 41, 42], *COMPLETIONS[0][1:]], *COMPLETIONS[1:]]
    after = policy.logprobs(GroupLayout.pack(PROMPTS, changed), prompts).logprob
    torch.testing.assert_close(after[3:], before[3:], rtol=0, atol=1e-6)
    assert (after[:3] - before[:3]).abs().max() > 1e-2


def test_a_sliding_window_shorter_than_a_sequence_is_refused():
    model = make_lm("mistral", sliding_window=4)
    with pytest.raises(NotImplementedError, match="sliding_window is 4"):
        Policy(model).logprobs(GroupLayout.pack([[1, 2, 3]], [[[4, 5]]]), [Prompt("a", (1, 2, 3))])
