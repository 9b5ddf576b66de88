"""On a GPU: the head kernels against float64, without host synchronisation, and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import grpo_loss, linear_grpo_loss, linear_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def batch(T, H, V, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(T, H, generator=g, device="cuda", dtype=dtype)
    weight = torch.randn(V, H, generator=g, device="cuda", dtype=dtype) / H**0.5
    return hidden, weight, torch.randint(V, (T,), generator=g, device="cuda")


def relative(value, reference):
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("upstream", ["logprob", "entropy", "kl"])
@pytest.mark.parametrize("chunk_bytes", [None, 3_000_000])
@pytest.mark.parametrize(("T", "H", "V"), [(1, 896, 1000), (333, 896, 151_936), (200, 3584, 152_064), (70, 100, 997)])
def test_values_and_gradients_follow_float64(T, H, V, chunk_bytes, upstream):
    hidden, weight, targets = batch(T, H, V)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    factor = torch.randn(T, device="cuda")
    reference = hidden.detach() + 0.3 * torch.randn_like(hidden)
    options = {"temperature": 0.9, "chunk_bytes": chunk_bytes, "reference_hidden": reference}
    got = linear_logprob(*leaves, targets, entropy=True, **options)
    (getattr(got, upstream) * factor).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    logp = torch.log_softmax(wide[0] @ wide[1].T / 0.9, -1)
    logprob, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    logq = torch.log_softmax(reference.double() @ wide[1].detach().T / 0.9, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    ({"logprob": logprob, "entropy": entropy, "kl": kl}[upstream] * factor).sum().backward()
    assert (got.logprob - logprob).abs().max() < 1e-4
    assert (got.entropy - entropy).abs().max() < 1e-4
    assert (got.kl - kl).abs().max() < 1e-4
    assert all(relative(a.grad, b.grad) < 2e-3 for a, b in zip(leaves, wide, strict=True))
    with torch.no_grad():
        bare = linear_logprob(*leaves, targets, entropy=True, temperature=0.9, chunk_bytes=1)  # lm_head_stats
    assert (bare.logprob - logprob).abs().max() < 1e-4
    assert (bare.entropy - entropy).abs().max() < 1e-4


@pytest.mark.parametrize("given_logits", [False, True])
def test_loss_follows_plain_torch_on_the_same_device(given_logits):
    hidden, weight, targets = batch(257, 512, 32_000, torch.float32)
    tokens = {"advantages": torch.randn(257, device="cuda"), "loss_weight": torch.rand(257, device="cuda")}
    tokens["loss_weight"][::5] = 0
    tokens["old_logprob"] = linear_logprob(hidden, weight, targets).logprob + 0.3 * torch.randn(257, device="cuda")
    tokens["reference_logprob"] = tokens["old_logprob"] + 0.2 * torch.randn(257, device="cuda")
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        options = {"beta": 0.1, "entropy_coef": 0.01, "dual_clip": 2.0, "backend": backend, **tokens}
        if given_logits:
            result = grpo_loss(leaves[0] @ leaves[1].T, targets, **options, inplace=True)
        else:
            result = linear_grpo_loss(*leaves, targets, **options)
        result.loss.backward()
        results.append([result.loss.detach(), result.logprob, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_more_rows_than_a_grid_axis_and_an_int32_hold():
    logits = torch.randn(70_000, 40_000, device="cuda", dtype=torch.bfloat16)  # 2.8e9 elements
    targets = torch.randint(40_000, (70_000,), device="cuda")
    ones = torch.ones(70_000, device="cuda")
    want = torch.log_softmax(logits[-3:].float(), -1).gather(1, targets[-3:, None])[:, 0]
    result = grpo_loss(logits.requires_grad_(), targets, ones, loss_weight=ones, inplace=True)
    assert (result.logprob[-3:] - want).abs().max() < 1e-4


def test_nothing_synchronises_and_the_forward_can_be_captured():
    hidden, weight, targets = batch(128, 256, 8192)
    ones = torch.ones(128, device="cuda")
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def run():
        logprob = linear_logprob(*leaves, targets, entropy=True)
        return logprob, linear_grpo_loss(*leaves, targets, ones, loss_weight=ones, live_rows=128)

    run()[1].loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, loss = run()
        loss.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logprob, loss = run()
    graph.replay()
    eager = run()
    torch.testing.assert_close(logprob.logprob, eager[0].logprob)
    torch.testing.assert_close(loss.loss, eager[1].loss)
