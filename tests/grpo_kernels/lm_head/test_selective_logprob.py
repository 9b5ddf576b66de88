"""`selective_logprob` of given logits against float64, any strides, in place or not."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import selective_logprob

from .. import oracles
from .cases import relative


def make(shape=(3, 5), V=131, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, V, generator=g)).to(dtype)
    return logits, torch.randint(V, shape, generator=g), torch.randn(2, *shape, generator=g)


def definition(logits, targets, upstream, temperature=1.0, softcap=None):
    """Log-prob, entropy and the gradient of both, in float64."""
    wide = logits.detach().double().requires_grad_()
    z = (wide if softcap is None else softcap * torch.tanh(wide / softcap)) / temperature
    logp = oracles.log_softmax(z.flatten(0, -2))
    logprob, entropy = logp.gather(1, targets.reshape(-1, 1))[:, 0], oracles.entropy(logp)
    ((logprob * upstream[0].flatten()).sum() + (entropy * upstream[1].flatten()).sum()).backward()
    return logprob.detach().view(targets.shape), entropy.detach().view(targets.shape), wide.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"temperature": 2.0, "softcap": 5.0}], ids=str)
def test_values_and_gradients_are_those_of_the_definition(options, inplace, backend):
    logits, targets, upstream = make()
    logprob, entropy, gradient = definition(logits, targets, upstream, **options)
    leaf = logits.clone().requires_grad_()
    got = selective_logprob(leaf, targets, entropy=True, inplace=inplace, backend=backend, **options)
    ((got.logprob * upstream[0]).sum() + (got.entropy * upstream[1]).sum()).backward()
    assert (got.logprob - logprob).abs().max() < 1e-5
    assert (got.entropy - entropy).abs().max() < 1e-5
    assert relative(leaf.grad, gradient) < 1e-6
    assert torch.equal(leaf.detach(), leaf.grad if inplace else logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_get_a_gradient_that_is_rounded_once(dtype, backend):
    logits, targets, upstream = make(shape=(15,), dtype=dtype)
    logprob, _, gradient = definition(logits, targets, upstream)
    leaf = logits.requires_grad_()
    got = selective_logprob(leaf, targets, entropy=True, backend=backend)
    ((got.logprob * upstream[0]).sum() + (got.entropy * upstream[1]).sum()).backward()
    assert got.logprob.dtype == torch.float32
    assert (got.logprob - logprob).abs().max() < 1e-5
    assert leaf.grad.dtype == dtype
    once = 1.01 * torch.finfo(dtype).eps / 2  # entry by entry: the rounding of the result, and no other
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=once, atol=1e-7)


def test_a_view_of_a_batch_is_not_copied_and_gets_its_gradient(backend):
    """`logits[:, :-1]`, whose rows no single stride covers."""
    logits, targets, upstream = make()
    logprob, _, gradient = definition(logits, targets, torch.stack([upstream[0], torch.zeros(3, 5)]))
    padded = torch.cat([logits, torch.full((3, 1, 131), torch.nan)], 1).requires_grad_()
    got = selective_logprob(padded[:, :-1], targets, backend=backend)
    (got.logprob * upstream[0]).sum().backward()
    assert (got.logprob - logprob).abs().max() < 1e-5
    assert relative(padded.grad[:, :-1], gradient) < 1e-6
    assert (padded.grad[:, -1] == 0).all()


@pytest.mark.parametrize("vocabulary", [0, 5])
def test_without_rows_results_are_empty_and_gradients_too(vocabulary):
    logits = torch.zeros(0, vocabulary, requires_grad=True)
    got = selective_logprob(logits, torch.zeros(0, dtype=torch.int64), entropy=True)
    (got.logprob.sum() + got.entropy.sum()).backward()
    assert got.logprob.shape == got.entropy.shape == (0,)
    assert logits.grad.shape == (0, vocabulary)


def test_bad_input_is_refused_with_the_reason():
    logits, targets, _ = make()
    with pytest.raises(ValueError, match=r"need logits \[..., V\] and targets \[...\]"):
        selective_logprob(logits, targets[:, :-1])
    with pytest.raises(TypeError, match="logits must be float16"):
        selective_logprob(logits.long(), targets)
    with pytest.raises(IndexError, match="V = 0"):
        selective_logprob(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature must be positive"):
        selective_logprob(logits, targets, temperature=0.0)
