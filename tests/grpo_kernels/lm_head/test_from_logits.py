"""`grpo_loss` of given logits equals the written-out mathematics, and its gradient may take the logits' memory."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import grpo_loss, linear_grpo_loss
from grpo_kernels.testing.interpreter import interpret

from .losses import MATRIX, V, batch, check


def test_every_combination_of_options_is_the_written_out_loss():
    for case in MATRIX:
        check(case, True, "torch")


def test_kernels_give_the_written_out_loss():
    with interpret():
        for case in MATRIX[1::13]:
            check(case, True, "triton", T=21)


@pytest.mark.parametrize("transform", [{"temperature": 0.3}, {"temperature": 2.0, "softcap": 5.0}], ids=str)
def test_bias_temperature_and_softcap_enter_the_loss(transform, backend):
    bias = 0.5 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    check(("clip", (0.1, "k3", False), True, 1.6, 0.05), True, backend, T=21, bias=bias, transform=transform)


@pytest.mark.parametrize("by_completion", [False, True])
def test_rows_all_masked_give_a_loss_and_gradients_of_zero(by_completion, backend):
    hidden, weight, tokens = batch(7)
    tokens |= {"loss_weight": torch.zeros(7), "targets": torch.full((7,), -100)}  # padding ids need not be valid
    if by_completion:
        tokens |= {"completion_index": torch.zeros(7, dtype=torch.int64), "num_completions": 1}
    logits = (hidden @ weight.T).requires_grad_()
    got = grpo_loss(logits, **tokens, backend=backend)
    got.loss.backward()
    assert got.loss == 0
    for field in (got.token_loss, got.logprob, got.entropy):
        assert torch.equal(field, torch.zeros(7))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("vocabulary", [0, 5])
def test_without_rows_the_loss_is_zero_and_so_are_gradients(vocabulary):
    logits, nothing = torch.zeros(0, vocabulary, requires_grad=True), torch.zeros(0)
    got = grpo_loss(logits, torch.zeros(0, dtype=torch.int64), nothing, loss_weight=nothing)
    got.loss.backward()
    assert got.loss == 0
    assert got.logprob.shape == (0,)
    assert logits.grad.shape == (0, vocabulary)


def test_a_vocabulary_of_0_holds_no_target():
    targets, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(IndexError, match="V = 0"):
        grpo_loss(torch.zeros(2, 0), targets, ones, loss_weight=ones)


def test_a_view_of_a_batch_is_the_loss_of_its_rows(backend):
    """`logits[:, :-1]`, whose rows no single stride covers."""
    hidden, weight, tokens = batch(24)
    straight = linear_grpo_loss(hidden, weight, **tokens, backend=backend)
    padded = torch.zeros(4, 7, V)
    padded[:, :-1] = (hidden @ weight.T).view(4, 6, V)
    padded.requires_grad_()
    shaped = {name: x.view(4, 6) for name, x in tokens.items()}
    view = grpo_loss(padded[:, :-1], **shaped, backend=backend)
    torch.testing.assert_close(view.loss, straight.loss)
    torch.testing.assert_close(view.logprob.flatten(), straight.logprob)
    view.loss.backward()
    assert (padded.grad[:, -1] == 0).all()
    assert (padded.grad[:, :-1].abs().sum(-1).flatten() > 0)[tokens["loss_weight"] != 0].any()


def test_in_place_the_logits_hold_the_gradient(backend):
    hidden, weight, tokens = batch(9)
    kept, lost = ((hidden @ weight.T).requires_grad_() for _ in range(2))
    grpo_loss(kept, **tokens, backend=backend).loss.backward()
    loss = grpo_loss(lost, **tokens, inplace=True, backend=backend).loss
    assert torch.equal(lost.detach(), kept.grad)
    loss.backward()
    assert torch.equal(lost.grad, kept.grad)
