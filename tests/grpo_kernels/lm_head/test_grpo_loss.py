"""`linear_grpo_loss` equals the written-out mathematics under autograd, for every combination of options."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import linear_grpo_loss
from grpo_kernels.testing.interpreter import interpret

from .losses import MATRIX, H, T, V, batch, check


def test_every_combination_of_options_is_the_written_out_loss():
    for case in MATRIX:
        check(case, False, "torch")


def test_kernels_give_the_written_out_loss():
    with interpret():
        for case in MATRIX[1::13]:
            check(case, False, "triton", T=21)


@pytest.mark.parametrize("transform", [{"temperature": 0.3}, {"temperature": 2.0, "softcap": 5.0}], ids=str)
def test_bias_temperature_and_softcap_enter_the_loss(transform, backend):
    bias = 0.5 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    check(("clip", (0.1, "k3", False), True, 1.6, 0.05), False, backend, T=21, bias=bias, transform=transform)


@pytest.mark.parametrize("chunk_bytes", [None, 2_000_000])
def test_more_rows_than_sixteen_bits_count(chunk_bytes):
    check(("clip", (0.1, "k3", True), True, 1.6, 0.05), False, "torch", T=70_000, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("loss_type", ["clip", "cispo", "vespo"])
def test_ratios_of_completions_are_the_written_out_loss(loss_type, chunk_bytes, backend):
    index = torch.arange(T) // 9
    check(
        (loss_type, (0.1, "k3", True), True, None, 0.05),
        False,
        backend,
        completion_index=index,
        num_completions=5,
        chunk_bytes=chunk_bytes,
    )


def test_compiled_code_breaks_its_graph_at_the_loss_and_gives_the_same():
    hidden, weight, tokens = batch(12)

    def objective(h, w):
        return linear_grpo_loss(torch.sin(h), w, **tokens).loss * 2

    results = []
    for run in (objective, torch.compile(objective, backend="eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = run(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        torch.compile(objective, backend="eager", fullgraph=True)(hidden, weight)


@pytest.mark.parametrize("by_completion", [False, True])
def test_rows_all_masked_give_a_loss_and_gradients_of_zero(by_completion, backend):
    hidden, weight, tokens = batch(7)
    tokens |= {"loss_weight": torch.zeros(7), "targets": torch.full((7,), -100)}  # padding ids need not be valid
    if by_completion:
        tokens |= {"completion_index": torch.zeros(7, dtype=torch.int64), "num_completions": 1}
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    got = linear_grpo_loss(*leaves, **tokens, backend=backend)
    got.loss.backward()
    assert got.loss == 0
    for field in (got.token_loss, got.logprob, got.entropy):
        assert torch.equal(field, torch.zeros(7))
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize("vocabulary", [0, 5])
def test_without_rows_the_loss_is_zero_and_so_are_gradients(vocabulary):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(vocabulary, 4, requires_grad=True)
    nothing, targets = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    got = linear_grpo_loss(hidden, weight, targets, nothing, loss_weight=nothing)
    got.loss.backward()
    assert got.loss == 0
    assert got.logprob.shape == (0,)
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(vocabulary, 4))


def test_a_vocabulary_of_0_holds_no_target():
    targets, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(IndexError, match="V = 0"):
        linear_grpo_loss(torch.zeros(2, 4), torch.zeros(0, 4), targets, ones, loss_weight=ones)


def test_strides_do_not_matter(backend):
    """Hidden states, heads and per-token tensors with gaps between their numbers."""
    hidden, weight, tokens = batch(24)
    apart = {name: torch.stack([x, x], 1)[:, 0] for name, x in tokens.items()}
    straight = linear_grpo_loss(hidden, weight, **tokens, backend=backend)
    crooked = linear_grpo_loss(
        hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :H], **apart, backend=backend
    )
    torch.testing.assert_close(crooked.loss, straight.loss)
    torch.testing.assert_close(crooked.logprob, straight.logprob)


def test_its_backward_runs_once():
    """Gradients are scaled in place and given away."""
    hidden, weight, tokens = batch(5)
    loss = linear_grpo_loss(hidden.requires_grad_(), weight, **tokens).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()
