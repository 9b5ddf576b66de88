"""The fused GRPO loss equals the written-out mathematics under autograd, for every combination of options."""

from __future__ import annotations

import itertools

import pytest
import torch

from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import importance_ratio, policy_loss
from grpo_kernels import grpo_loss, linear_grpo_loss, selective_logprob
from grpo_kernels.testing.interpreter import interpret

T, H, V = 45, 12, 67
CLIP, CAP = {"clip_low": 0.1, "clip_high": 0.28}, 1.4


def relative(value, reference):
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def batch(T=T, H=H, V=V, seed=0):
    """Hidden states, a head, targets, and per-token inputs that reach both sides of every clip; some weights are 0."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    targets = torch.randint(V, (T,), generator=g)
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return (
        hidden,
        weight,
        {
            "targets": targets,
            "advantages": torch.randn(T, generator=g),
            "loss_weight": torch.rand(T, generator=g) * (torch.rand(T, generator=g) > 0.2) / T,
            "old_logprob": logprob + 0.5 * torch.randn(T, generator=g),
            "reference_logprob": logprob + 0.3 * torch.randn(T, generator=g),
        },
    )


def written_out(
    logits, tokens, *, loss_type, dual_clip, beta, kl_estimator, kl_times_ratio, entropy_coef, sequence_index=None
):
    """The loss by `grpo_core.losses` on log-probs of a plain softmax, in float64."""
    logp = torch.log_softmax(logits, -1)
    logprob = logp.gather(1, tokens["targets"][:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    old = tokens["old_logprob"].double() if tokens["old_logprob"] is not None else logprob.detach()
    advantages, weight = tokens["advantages"].double(), tokens["loss_weight"].double()
    index, level = torch.zeros_like(tokens["targets"]), "token"
    if sequence_index is not None:  # a row of weight 0 belongs to no sequence
        level, index = "sequence", torch.where(weight != 0, sequence_index, sequence_index.max() + 1)
    members = int(index.max()) + 1
    kind = {"clip": "grpo", "cispo": "cispo"}[loss_type]
    surrogate = policy_loss(
        kind, logprob, old, advantages, index, members, ratio_level=level, delta=dual_clip, cispo_cap=CAP, **CLIP
    )
    loss = surrogate.loss
    if beta:
        ratio = importance_ratio(logprob, old, index, members, level) if kl_times_ratio else None
        loss = loss + beta * kl_penalty(logprob, tokens["reference_logprob"].double(), kl_estimator, ratio)
    loss = loss - entropy_coef * entropy
    return (loss * weight).sum(), {"logprob": logprob, "entropy": entropy, "surrogate": surrogate}


KLS = [(0.0, "k3", False), *((0.1, name, times) for name in ("k1", "k2", "k3") for times in (False, True))]
MATRIX = list(itertools.product(("clip", "cispo"), KLS, (True, False), (None, 1.6), (0.0, 0.05)))


def transformed(logits, temperature=1.0, softcap=None):
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def check(case, given_logits, backend, T=T, bias=None, transform=None, **extra):
    transform = transform or {}
    loss_type, (beta, estimator, times_ratio), with_old, dual_clip, entropy_coef = case
    hidden, weight, tokens = batch(T)
    if not with_old:
        tokens["old_logprob"] = None
    options = {
        "loss_type": loss_type,
        "dual_clip": dual_clip,
        "beta": beta,
        "kl_estimator": estimator,
        "kl_times_ratio": times_ratio,
        "entropy_coef": entropy_coef,
    }
    scale = transform.get("temperature", 1.0)  # z = logits / temperature of one size: their rounding grows with it
    hidden, bias = hidden * scale, None if bias is None else bias * scale
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    wide = [x.double().requires_grad_() for x in inputs]
    wide_logits = wide[0] @ wide[1].T + (0.0 if bias is None else wide[2])
    if transform:  # log-probs that samplers of this very temperature would have given
        logprob = torch.log_softmax(transformed(wide_logits.detach(), **transform), -1)
        logprob = logprob.gather(1, tokens["targets"][:, None])[:, 0].float()
        for name in ("old_logprob", "reference_logprob"):
            tokens[name] = logprob + 0.4 * torch.randn(T, generator=torch.Generator().manual_seed(len(name)))
    index = extra.get("sequence_index")
    want, details = written_out(transformed(wide_logits, **transform), tokens, **options, sequence_index=index)
    want.backward()
    if given_logits:
        logits = wide_logits.detach().float().requires_grad_()
        got = grpo_loss(logits, **tokens, **options, **CLIP, cispo_cap=CAP, **transform, **extra, backend=backend)
        got.loss.backward()
        gradients = [(logits.grad.double() @ weight.double(), wide[0].grad)]
    else:
        leaves = [x.clone().requires_grad_() for x in inputs]
        extra |= transform | ({} if bias is None else {"bias": leaves[2]})
        got = linear_grpo_loss(*leaves[:2], **tokens, **options, **CLIP, cispo_cap=CAP, **extra, backend=backend)
        got.loss.backward()
        gradients = [(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    assert float(got.loss.detach() - want.detach()) == pytest.approx(0.0, abs=2e-6)
    assert max(relative(*pair) for pair in gradients) < 1e-6
    live = tokens["loss_weight"] != 0
    for name in ("logprob", "entropy"):
        assert (getattr(got, name) - details[name].detach())[live].abs().max() < 1e-5
        assert (getattr(got, name)[~live] == 0).all()
    assert torch.equal(got.clipped_low, details["surrogate"].clipped_low & live)
    assert torch.equal(got.clipped_high, details["surrogate"].clipped_high & live)
    if loss_type == "clip" and with_old and index is None and backend == "torch":
        assert got.clipped_low.any()
        assert got.clipped_high.any()
    if beta:
        kl = kl_penalty(details["logprob"].detach(), tokens["reference_logprob"].double(), estimator)
        assert (got.kl - kl)[live].abs().max() < 1e-5


@pytest.mark.parametrize("given_logits", [False, True], ids=["linear", "logits"])
def test_every_combination_of_options_is_the_written_out_loss(given_logits):
    for case in MATRIX:
        check(case, given_logits, "torch")


@pytest.mark.parametrize("chunk_bytes", [None, 2_000_000])
def test_more_rows_than_sixteen_bits_count(chunk_bytes):
    check(("clip", (0.1, "k3", True), True, 1.6, 0.05), False, "torch", T=70_000, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("given_logits", [False, True], ids=["linear", "logits"])
def test_kernels_give_the_written_out_loss(given_logits):
    with interpret():
        for case in MATRIX[1::13]:
            check(case, given_logits, "triton", T=21)


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
def test_sequence_ratios_are_the_written_out_loss(loss_type, chunk_bytes, backend):
    index = torch.arange(T) // 9
    check(
        (loss_type, (0.1, "k3", True), True, None, 0.05),
        False,
        backend,
        sequence_index=index,
        num_sequences=5,
        chunk_bytes=chunk_bytes,
    )


@pytest.mark.parametrize("given_logits", [False, True], ids=["linear", "logits"])
@pytest.mark.parametrize("transform", [{"temperature": 0.3}, {"temperature": 2.0, "softcap": 5.0}], ids=str)
def test_bias_temperature_and_softcap_enter_the_loss(transform, given_logits, backend):
    bias = 0.5 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    check(("clip", (0.1, "k3", False), True, 1.6, 0.05), given_logits, backend, T=21, bias=bias, transform=transform)


@pytest.mark.parametrize("sequences", [False, True])
def test_rows_all_masked_give_a_loss_and_gradients_of_zero(sequences, backend):
    hidden, weight, tokens = batch(7)
    tokens |= {"loss_weight": torch.zeros(7), "targets": torch.full((7,), -100)}  # padding ids need not be valid
    if sequences:
        tokens |= {"sequence_index": torch.zeros(7, dtype=torch.int64), "num_sequences": 1}
    leaves = [x.requires_grad_() for x in (hidden, weight, (hidden @ weight.T).detach())]
    for got in (
        linear_grpo_loss(*leaves[:2], **tokens, backend=backend),
        grpo_loss(leaves[2], **tokens, backend=backend),
    ):
        got.loss.backward()
        assert got.loss == 0
        for field in (got.token_loss, got.logprob, got.entropy):
            assert torch.equal(field, torch.zeros(7))
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize("vocabulary", [0, 5])
def test_without_rows_the_loss_is_zero_and_so_are_gradients(vocabulary):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(vocabulary, 4, requires_grad=True)
    logits, nothing = torch.zeros(0, vocabulary, requires_grad=True), torch.zeros(0)
    targets = torch.zeros(0, dtype=torch.int64)
    linear = linear_grpo_loss(hidden, weight, targets, nothing, loss_weight=nothing)
    given = grpo_loss(logits, targets, nothing, loss_weight=nothing)
    selected = selective_logprob(logits, targets, entropy=True)
    (linear.loss + given.loss + selected.logprob.sum() + selected.entropy.sum()).backward()
    assert linear.loss == given.loss == 0
    assert linear.logprob.shape == given.logprob.shape == selected.logprob.shape == (0,)
    assert hidden.grad.shape == (0, 4)
    assert logits.grad.shape == (0, vocabulary)
    assert torch.equal(weight.grad, torch.zeros(vocabulary, 4))


@pytest.mark.parametrize("call", ["linear", "logits", "selective"])
def test_a_vocabulary_of_0_holds_no_target(call):
    targets, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    calls = {
        "linear": lambda: linear_grpo_loss(torch.zeros(2, 4), torch.zeros(0, 4), targets, ones, loss_weight=ones),
        "logits": lambda: grpo_loss(torch.zeros(2, 0), targets, ones, loss_weight=ones),
        "selective": lambda: selective_logprob(torch.zeros(2, 0), targets),
    }
    with pytest.raises(IndexError, match="V = 0"):
        calls[call]()


def test_strides_and_views_of_logits_do_not_matter(backend):
    """`logits[:, :-1]` of a batch, and hidden states, heads and per-token tensors with gaps between their numbers."""
    hidden, weight, tokens = batch(24)
    apart = {name: torch.stack([x, x], 1)[:, 0] for name, x in tokens.items()}
    straight = linear_grpo_loss(hidden, weight, **tokens, backend=backend)
    crooked = linear_grpo_loss(
        hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :H], **apart, backend=backend
    )
    padded = torch.zeros(4, 7, V)
    padded[:, :-1] = (hidden @ weight.T).view(4, 6, V)
    padded.requires_grad_()
    shaped = {name: x.view(4, 6) for name, x in tokens.items()}
    view = grpo_loss(padded[:, :-1], **shaped, backend=backend)
    for got in (crooked, view):
        torch.testing.assert_close(got.loss, straight.loss)
        torch.testing.assert_close(got.logprob.flatten(), straight.logprob)
    view.loss.backward()
    assert (padded.grad[:, -1] == 0).all()
    assert (padded.grad[:, :-1].abs().sum(-1).flatten() > 0)[tokens["loss_weight"] != 0].any()


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
