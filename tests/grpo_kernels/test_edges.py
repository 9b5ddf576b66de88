"""Where float32 ends and inputs are broken, both backends say what float64 says: one table for each operation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    GroupRows,
    SampledTokens,
    SampleOptions,
    group_decode_attention,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    rms_norm,
    rope_append,
    sample_head,
    sample_row,
    selective_logprob,
    silu_mul,
)
from grpo_kernels.lm_head import grpo_loss as grpo_loss_module
from grpo_kernels.testing.interpreter import interpret

INF, NAN, LOWEST = math.inf, math.nan, torch.finfo(torch.float32).min
V = 131


# --- log-probs ---------------------------------------------------------------------------------------------------


def noise(offset: float = 0.0, spread: float = 3.0, **others: float) -> list[float]:
    """V random logits, some of them (`at_3=…`) replaced."""
    row = (spread * torch.randn(V, generator=torch.Generator().manual_seed(7)) + offset).tolist()
    for name, value in others.items():
        row[int(name.removeprefix("at_"))] = value
    return row


LOGITS = {  # logits, target, options
    "a cap that leaves 120 nats": ([60.0, -60.0, 0.0], 2, {"softcap": 30.0, "temperature": 0.5}),
    "a target 190 nats below, at the cap": ([-300.0, 200.0, 5.0, -1.0], 0, {"softcap": 50.0, "temperature": 0.5}),
    "a cap that all logits are beyond": ([90.0, 95.0, -99.0, 80.0], 1, {"softcap": 10.0}),
    "offset 120": (noise(120.0), 5, {}),
    "offset 1,000": (noise(1000.0), 5, {}),
    "offset -1,000": (noise(-1000.0), 5, {"temperature": 0.5}),
    "offset 10,000": (noise(10_000.0), 5, {}),
    "a confident target at an offset": (noise(10_000.0, at_9=10_025.0), 9, {}),
    "a target of -inf": (noise(at_5=-INF), 5, {}),
    "a target of float32's lowest": (noise(at_5=LOWEST), 5, {}),
    "-inf under a cap": (noise(at_5=-INF, at_6=-INF), 5, {"softcap": 20.0}),
    "-inf beside the target": (noise(at_6=-INF, at_7=-INF), 5, {"temperature": 2.0}),
    "the target alone is possible": ([-INF, 2.0, -INF, LOWEST], 1, {}),
    "another token alone is possible": ([-INF, 2.0, -INF], 0, {}),
    "nothing but -inf": ([-INF] * 70, 3, {}),
    "nothing but float32's lowest": ([LOWEST] * 70, 3, {}),
    "a NaN": (noise(at_100=NAN), 5, {}),
    "a target of NaN": (noise(at_5=NAN), 5, {}),
    "an inf": (noise(at_100=INF), 5, {}),
    "a target of inf": (noise(at_5=INF), 5, {}),
}


def definition(row: list[float], target: int, temperature: float = 1.0, softcap: float | None = None):
    """Log-prob, entropy, and the gradient of `logprob + entropy / 2`, written out in float64."""
    x = torch.tensor(row, dtype=torch.float32).double()
    slope = torch.full_like(x, 1 / temperature)
    if softcap is not None:
        slope /= torch.cosh(x / softcap) ** 2
        x = softcap * torch.tanh(x / softcap)
    z = x / temperature
    z = torch.where(z <= -1e30, -INF, z)
    if not z.max().isfinite():
        return NAN, NAN, torch.full_like(z, NAN)
    logp = z - torch.logsumexp(z, 0)
    # log p_y where the target has nearly all of p
    others = torch.where(torch.arange(len(z)) == target, -INF, z).logsumexp(0)
    logprob = -torch.nn.functional.softplus(others - z[target], threshold=1000.0)
    p, plogp = logp.exp(), torch.where(logp == -INF, 0.0, logp.exp() * logp)
    entropy = -plogp.sum()
    one_hot = torch.arange(len(z)) == target
    complement = torch.where(one_hot, -torch.expm1(logprob), -p)
    return float(logprob), float(entropy), slope * (complement - 0.5 * (plogp + p * entropy))


def assert_row(logprob: Tensor, entropy: Tensor, gradient: Tensor | None, name: str) -> None:
    row, target, options = LOGITS[name]
    want_logprob, want_entropy, want_gradient = definition(row, target, **options)
    tolerance = 1.5e-6 if abs(want_logprob) <= 16 else 1e-6 * abs(want_logprob)
    assert logprob.item() == pytest.approx(want_logprob, abs=tolerance, nan_ok=True), name
    if want_logprob != 0:
        assert logprob.item() == pytest.approx(want_logprob, rel=1e-5, nan_ok=True), name
    assert entropy.item() == pytest.approx(want_entropy, abs=3e-6, nan_ok=True), name
    if gradient is not None:
        assert gradient.isnan().all() if want_logprob != want_logprob else gradient.isfinite().all(), name
        error = (gradient.double() - want_gradient).norm() / want_gradient.norm().clamp(min=1e-30)
        assert want_logprob != want_logprob or error < 3e-6, (name, float(error))
        entry = gradient[target].item()  # by itself: a norm would not miss it beside another's
        assert entry == pytest.approx(want_gradient[target].item(), rel=1e-5, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("name", LOGITS)
def test_given_logits_have_the_log_prob_and_gradient_of_float64(name, backend):
    """In a batch with an ordinary row, which a broken one leaves alone."""
    row, target, options = LOGITS[name]
    ordinary = torch.linspace(-1, 1, len(row)).tolist()
    logits = torch.tensor([row, ordinary]).requires_grad_()
    got = selective_logprob(logits, torch.tensor([target, 0]), entropy=True, backend=backend, **options)
    (got.logprob + 0.5 * got.entropy).sum().backward()
    assert_row(got.logprob[0], got.entropy[0], logits.grad[0], name)
    want = definition(ordinary, 0, **options)
    assert got.logprob[1].item() == pytest.approx(want[0], abs=1e-5)  # tanh near 0, times softcap / temperature
    assert (logits.grad[1] - want[2]).abs().max() < 1e-5


@pytest.mark.parametrize("name", LOGITS)
def test_a_head_has_the_log_prob_and_gradient_of_float64(name, backend):
    """Hidden states of 0, so that the bias is the logits; with statistics alone, too, which another kernel computes."""
    row, target, options = LOGITS[name]
    hidden, weight, bias = torch.zeros(1, 16), torch.zeros(len(row), 16), torch.tensor(row).requires_grad_()
    options = options | {"entropy": True, "backend": backend}
    got = linear_logprob(hidden, weight, torch.tensor([target]), bias=bias, **options)
    (got.logprob + 0.5 * got.entropy).sum().backward()
    assert_row(got.logprob, got.entropy, bias.grad, name)
    with torch.no_grad():
        got = linear_logprob(hidden, weight, torch.tensor([target]), bias=bias, chunk_bytes=1, **options)
    assert_row(got.logprob, got.entropy, None, name)


# --- losses ------------------------------------------------------------------------------------------------------

FAR = (88.5, 100.0, 1e4, INF)
TOKENS = {  # log-ratio, advantage, options, and the slope of the loss in the log-prob: 0 where the clipped side wins
    **{f"A > 0, {d} nats": (d, 1.0, {}, 0.0) for d in FAR},
    **{f"A < 0 with a dual clip, {d} nats": (d, -1.0, {"dual_clip": 3.0}, 0.0) for d in FAR},
    **{f"A = 0, {d} nats": (d, 0.0, {}, 0.0) for d in FAR},
    **{f"cispo, A = {a}, {d} nats": (d, a, {"loss_type": "cispo"}, -5.0 * a) for d in FAR for a in (1.0, -1.0, 0.0)},
    "A < 0, -100 nats": (-100.0, -1.0, {}, 0.0),
    "A > 0, -1e4 nats": (-1e4, 1.0, {}, 0.0),
    "cispo with a lower clamp, -100 nats": (-100.0, 2.0, {"loss_type": "cispo", "clip_low": 0.2}, -1.6),
}
REFERENCES = {  # log-prob minus the reference's, and the slope of k3
    "-19 nats": (-19.0, -math.expm1(19.0)),
    "-21 nats": (-21.0, 0.0),
    "-100 nats": (-100.0, 0.0),
    "-1e4 nats": (-1e4, 0.0),
    "100 nats": (100.0, 1.0),
}


def token_slope(backend: str, by_completion: bool, logprob: Tensor, logits: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(loss, ∂ loss / ∂ log-prob of its one token), read off the target's logit."""
    leaf = logits.clone().requires_grad_()
    if by_completion:
        options |= {"completion_index": torch.zeros(1, dtype=torch.int64), "num_completions": 1}
    got = grpo_loss(leaf, torch.tensor([3]), loss_weight=torch.ones(1), backend=backend, **options)
    got.loss.backward()
    assert leaf.grad.isfinite().all()
    return got, leaf.grad[0, 3] / -torch.expm1(logprob)


@pytest.mark.parametrize("by_completion", [False, True])
def test_ratios_and_kl_that_float32_cannot_hold_give_no_nan(by_completion, backend):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1))
    logprob = torch.log_softmax(logits, -1)[0, 3]
    for name, (log_ratio, advantage, options, want) in TOKENS.items():
        given = {"old_logprob": (logprob - log_ratio)[None], "advantages": torch.tensor([advantage])} | options
        got, slope = token_slope(backend, by_completion, logprob, logits, **given)
        assert got.loss.isfinite(), name
        assert got.ratio.isfinite().all(), name
        assert slope.item() == pytest.approx(want, abs=1e-6), name
    for name, (difference, want) in REFERENCES.items():
        given = {"reference_logprob": (logprob - difference)[None], "beta": 0.5, "advantages": torch.zeros(1)}
        got, slope = token_slope(backend, by_completion, logprob, logits, **given)
        bounded = max(difference, -20.0)
        assert got.kl.item() == pytest.approx(math.expm1(-bounded) + bounded, rel=1e-5), name
        assert slope.item() == pytest.approx(0.5 * want, rel=1e-5, abs=1e-6), name


def head_loss(hidden: Tensor, weight: Tensor, **tokens) -> tuple[object, list[Tensor]]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    got = linear_grpo_loss(*leaves, **tokens)
    got.loss.backward()
    return got, [leaf.grad for leaf in leaves]


def head_loss_in_chunks(hidden: Tensor, weight: Tensor, **tokens) -> tuple[object, list[Tensor]]:
    return head_loss(hidden, weight, chunk_bytes=1000, **tokens)


def logits_loss(hidden: Tensor, weight: Tensor, *, inplace: bool = False, **tokens) -> tuple[object, list[Tensor]]:
    logits = (hidden @ weight.T).requires_grad_()
    got = grpo_loss(logits, **tokens, inplace=inplace)
    got.loss.backward()
    return got, [logits.grad]


def logits_loss_in_place(hidden: Tensor, weight: Tensor, **tokens) -> tuple[object, list[Tensor]]:
    return logits_loss(hidden, weight, inplace=True, **tokens)


@pytest.mark.parametrize(("by_completion", "options"), [(False, {"softcap": 4.0, "entropy_coef": 0.1}), (True, {})])
@pytest.mark.parametrize("loss", [logits_loss, logits_loss_in_place, head_loss, head_loss_in_chunks])
def test_rows_of_weight_0_are_left_out_whatever_they_hold(loss: Callable, by_completion, options, backend, monkeypatch):
    """Logits, states and every number of a token; on a GPU, too, where such rows are not dropped first."""
    monkeypatch.setattr(grpo_loss_module, "_live_rows", lambda *_: None)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(70, 8, generator=g)
    tokens = {name: torch.randn(6, generator=g) for name in ("advantages", "old_logprob", "reference_logprob")}
    tokens |= {"loss_weight": torch.rand(6, generator=g) + 0.1, "targets": torch.arange(6)}
    dead, live = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    settings = {"beta": 0.1, "kl_times_ratio": True, "backend": backend, **options}
    if by_completion:
        settings["num_completions"] = 2
        tokens["completion_index"] = torch.arange(6) // 3
    want, gradients = loss(hidden[live], weight, **{name: x[live] for name, x in tokens.items()}, **settings)
    poison = {name: x.clone() for name, x in tokens.items()}
    poison["loss_weight"][dead] = 0.0
    poison["targets"][dead] = -100
    for name, value in (("advantages", NAN), ("old_logprob", INF), ("reference_logprob", NAN)):
        poison[name][dead] = value
    states = hidden.clone()
    states[dead] = torch.tensor([NAN, INF, -INF])[:, None]
    got, poisoned = loss(states, weight, **poison, **settings)
    torch.testing.assert_close(got.loss, want.loss)
    for mine, theirs in zip(poisoned, gradients, strict=True):
        rows = len(mine) == 6
        torch.testing.assert_close(mine[live] if rows else mine, theirs, rtol=1e-5, atol=1e-7)
        assert not rows or (mine[dead] == 0).all()
    for name, field in got._asdict().items():
        if name != "loss":
            torch.testing.assert_close(field[live], getattr(want, name))
            assert (field[dead] == 0).all(), name


# --- sampling ----------------------------------------------------------------------------------------------------

BROKEN = {
    "a NaN": {100: NAN},
    "an inf": {100: INF},
    "a NaN and an inf": {3: INF, 4: NAN, 5: -INF},
    "nothing but -inf": dict.fromkeys(range(131), -INF),
    "nothing but float32's lowest": dict.fromkeys(range(131), LOWEST),
}
SAMPLING = {
    "whole": {},
    "greedy": {"temperature": 0.0},
    "top-p": {"top_p": 0.8, "temperature": 0.7},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
}
LOGPROBS = ("logprob", "tempered_logprob", "raw_logprob")


@pytest.mark.parametrize(
    ("name", "with_forced"), [*((name, False) for name in SAMPLING), ("greedy", True), ("top-p", True)]
)
def test_a_broken_row_harms_no_other(name, with_forced, backend):
    """Each kind of broken row between ordinary ones, and one whose every token is forbidden or impossible."""
    g, options = torch.Generator().manual_seed(3), SAMPLING[name]
    size, count = 131, len(BROKEN)
    logits = torch.randn(count + 3, size, generator=g) * 2
    forbidden = torch.arange(size) % 7 == 0
    ordinary, broken, hopeless = torch.tensor([0, count + 1]), torch.arange(count) + 1, count + 2
    for row, values in zip(broken.tolist(), BROKEN.values(), strict=True):
        logits[row, list(values)] = torch.tensor(list(values.values()))
    logits[hopeless, ~forbidden] = -INF
    keys, positions = torch.arange(len(logits)) + 50, torch.arange(len(logits)) % 4
    settings = {"seen": torch.rand(logits.shape, generator=g) < 0.2, "forbidden": forbidden}
    forced = torch.full((len(logits),), -1)
    if with_forced:
        forced[1:] = 11
        settings["forced"] = forced
    got = sample_row(logits, keys, positions, SampleOptions(**options), backend=backend, **settings)
    assert got.token[broken].tolist() == [11 if with_forced else 0] * count
    for name in (*LOGPROBS, "entropy"):
        assert getattr(got, name)[broken].isnan().all(), name
    assert got.token[hopeless] == (11 if with_forced else 0)
    assert got.entropy[hopeless].isfinite()
    for name in LOGPROBS:  # a forced token of probability 0, or none at all
        value = getattr(got, name)[hopeless].item()
        assert value == -INF if with_forced else math.isnan(value), name
    settings["seen"] = settings["seen"][ordinary]
    if with_forced:
        settings["forced"] = forced[ordinary]
    alone = sample_row(
        logits[ordinary], keys[ordinary], positions[ordinary], SampleOptions(**options), backend=backend, **settings
    )
    want = sample_row(
        logits[ordinary].double(), keys[ordinary], positions[ordinary], SampleOptions(**options), **settings
    )
    assert got.token[ordinary].tolist() == want.token.tolist()
    for mine, theirs, exact in zip(got, alone, want, strict=True):
        assert torch.equal(mine[ordinary], theirs)
        torch.testing.assert_close(theirs, exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("with_forced", [False, True])
def test_a_broken_row_harms_no_other_in_the_fused_head(with_forced, backend):
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(6, 32, generator=g), torch.randn(150, 32, generator=g)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    keys, positions = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    forced = torch.tensor([-1, 11, 11, 11, 11, 11]) if with_forced else None

    def draw(hidden: Tensor, **options) -> SampledTokens:
        return sample_head(hidden, weight, keys, positions, forced=forced, backend=backend, **options)

    whole = draw(hidden)
    spoiled = hidden.clone()
    spoiled[2], spoiled[4] = NAN, INF
    got = draw(spoiled)
    assert got.token[[2, 4]].tolist() == [11 if with_forced else 0] * 2
    for mine, theirs in zip(got, whole, strict=True):
        assert torch.equal(mine[[0, 1, 3, 5]], theirs[[0, 1, 3, 5]])
    for name in (*LOGPROBS, "entropy"):
        assert getattr(got, name)[[2, 4]].isnan().all(), name

    got = draw(hidden, bias=torch.full((150,), -INF))  # nothing is possible
    assert got.token[1:].tolist() == [11 if with_forced else 0] * 5
    assert all(getattr(got, name).isnan().all() for name in (*LOGPROBS, "entropy"))
    got = draw(hidden, forbidden=torch.ones(150, dtype=torch.bool))  # nothing may be drawn
    assert got.token[1:].tolist() == [11 if with_forced else 0] * 5
    torch.testing.assert_close(got.entropy, whole.entropy)
    if with_forced:
        assert (got.logprob[1:] == -INF).all()
        torch.testing.assert_close(got.raw_logprob[1:], whole.raw_logprob[1:])
    else:
        assert all(getattr(got, name).isnan().all() for name in LOGPROBS)
    bias = torch.zeros(150)
    bias[11] = -INF
    got = draw(hidden, bias=bias)
    assert (got.token[1:] == 11).all() == with_forced
    assert all((getattr(got, name)[1:] == -INF).all() == with_forced for name in LOGPROBS)


# --- refused -----------------------------------------------------------------------------------------------------


def overlapping() -> dict[str, Tensor]:
    """Logits `[4, 1, 9]` whose rows share memory."""
    return {
        "expand": torch.randn(1, 1, 9).expand(4, 1, 9),
        "unfold": torch.randn(12).unfold(0, 9, 1)[:, None],
        "as_strided": torch.randn(40).as_strided((4, 1, 9), (8, 40, 1)),
    }


@pytest.mark.parametrize("kind", ["expand", "unfold", "as_strided"])
def test_a_gradient_over_rows_that_share_memory_is_refused(kind, backend):
    logits, targets, ones = overlapping()[kind], torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    says = "inplace=True would write several rows' gradients to one place.*pass inplace=False, or logits.contiguous"
    with pytest.raises(ValueError, match=says):
        grpo_loss(logits.requires_grad_(), targets, ones, loss_weight=ones, inplace=True, backend=backend)
    with pytest.raises(ValueError, match=says):
        selective_logprob(logits, targets, inplace=True, backend=backend)
    leaf = logits.detach().clone().requires_grad_()
    for x in (logits.detach().requires_grad_(), leaf):  # without it they are as good as a copy
        selective_logprob(x, targets, backend=backend).logprob.sum().backward()
        torch.testing.assert_close(x.grad.sum(), leaf.grad.sum() if leaf.grad is not None else x.grad.sum())


def test_a_second_derivative_is_refused(backend):
    """Also where nothing upstream has a graph, and a gradient would silently be a constant."""
    leaf, targets, ones = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for call in (
        lambda x: selective_logprob(x, targets, backend=backend).logprob,
        lambda x: linear_logprob(x, leaf, targets, backend=backend).logprob,
        lambda x: linear_logprob(leaf, x, targets, backend=backend, entropy=True).entropy,
        lambda x: grpo_loss(x, targets, ones, loss_weight=ones, backend=backend).loss,
        lambda x: linear_grpo_loss(x, leaf, targets, ones, loss_weight=ones, backend=backend).loss,
    ):
        for finish in (torch.sum, lambda x: x.square().sum()):
            x = leaf.clone().requires_grad_()
            with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph"):
                torch.autograd.grad(finish(call(x)), x, create_graph=True)


def test_a_kernel_without_a_backward_refuses_inputs_that_need_one():
    """Plain torch gives their gradient; the kernel's output would be a constant."""
    x = torch.randn(3, 8, requires_grad=True)
    cache = [torch.zeros(3, 1, 4, 8) for _ in range(4)]
    ones, rows = torch.ones(3, dtype=torch.int64), GroupRows.sort(torch.full((3,), -1), 3, 1)
    angles = torch.ones(4, 4)
    calls = {
        "rms_norm": lambda x, **options: rms_norm(x, torch.ones(8), 1e-6, **options),
        "silu_mul": silu_mul,
        "rope_append": lambda x, **options: rope_append(
            (x * 1.0)[:, None].expand(3, 3, 8).contiguous(), angles, angles, ones, *cache[:2], ones, **options
        ),
        "group_decode_attention": lambda x, **options: group_decode_attention(
            x[:, None], *cache[:2], ones, *cache[2:], ones, rows, **options
        ),
    }
    for name, call in calls.items():
        with interpret():
            with pytest.raises(ValueError, match=f"{name} has no gradient on Triton: call it under torch.no_grad"):
                call(x)
            with torch.no_grad():
                call(x)


@pytest.mark.parametrize("layout", ["transposed batch", "every second row of a view"])
def test_rows_that_share_no_memory_may_be_written_over(layout, backend):
    logits = {
        "transposed batch": torch.randn(3, 4, 9).transpose(0, 1),
        "every second row of a view": torch.randn(8, 5, 9)[::2, 1:4],
    }[layout]
    targets, ones = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3)
    kept = logits.clone().requires_grad_()
    grpo_loss(kept, targets, ones, loss_weight=ones, backend=backend).loss.backward()
    lost = logits.requires_grad_()
    grpo_loss(lost, targets, ones, loss_weight=ones, inplace=True, backend=backend).loss.backward()
    torch.testing.assert_close(lost.detach(), kept.grad)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": INF}, "temperature must be positive and finite, got inf"),
        ({"temperature": NAN}, "temperature must be positive and finite, got nan"),
        ({"softcap": INF}, "softcap must be positive and finite, or None, got inf"),
        ({"softcap": -1.0}, "softcap must be positive and finite, or None, got -1.0"),
    ],
    ids=str,
)
def test_a_softmax_of_no_meaning_is_refused(options, says):
    logits, targets, ones = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for call in (
        lambda: selective_logprob(logits, targets, **options),
        lambda: grpo_loss(logits, targets, ones, loss_weight=ones, **options),
        lambda: linear_logprob(logits, logits, targets, **options),
        lambda: linear_grpo_loss(logits, logits, targets, ones, loss_weight=ones, **options),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_indices_of_completions_that_do_not_exist_are_refused():
    logits, targets, ones = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for index, count, error, says in (
        (torch.tensor([0, 2]), 2, IndexError, r"completion_index must lie in \[0, 2\), got 0..2"),
        (torch.tensor([-1, 1]), 2, IndexError, r"completion_index must lie in \[0, 2\), got -1..1"),
        (torch.tensor([0.0, 1.0]), 2, TypeError, "completion_index must be int64 or int32, got torch.float32"),
    ):
        with pytest.raises(error, match=says):
            grpo_loss(logits, targets, ones, loss_weight=ones, completion_index=index, num_completions=count)
    with pytest.raises(ValueError, match="vespo weighs whole completions: give completion_index and num_completions"):
        grpo_loss(logits, targets, ones, loss_weight=ones, loss_type="vespo")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 2.5}, "top_k must be an integer ≥ 0, got 2.5"),
        ({"temperature": INF}, "temperature must be ≥ 0 and finite, got inf"),
        ({"temperature": NAN}, "temperature must be ≥ 0 and finite, got nan"),
        ({"top_p": NAN}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": INF}, "repetition_penalty must be > 0 and finite, got inf"),
    ],
    ids=str,
)
def test_sampling_of_no_meaning_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        SampleOptions(**options)
