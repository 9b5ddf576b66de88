"""`linear_logprob` against a float64 softmax: values, every gradient, bad input, bounds on memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.lm_head import _rows
from grpo_kernels.lm_head._gemm import Head
from grpo_kernels.testing.interpreter import interpret

from .cases import OUTPUTS, make, oracle, relative


def compare(T, H, V, *, dtype=torch.float32, bias=False, reference=False, frozen=False, upstream=OUTPUTS, **options):
    """Errors of values (largest absolute) and gradients (relative norm) against float64."""
    hidden, weight, targets, b, ref = make(T, H, V, dtype, bias=bias, reference=reference)
    leaves = [hidden, *([] if frozen else [weight] + ([b] if bias else []))]
    for leaf in leaves:
        leaf.requires_grad_()
    got = linear_logprob(hidden, weight, targets, bias=b, reference_hidden=ref, entropy=True, **options)
    double = [None if t is None else t.detach().double() for t in (hidden, weight, b, ref)]
    wide = [double[0], *([] if frozen else [double[1]] + ([double[2]] if bias else []))]
    for leaf in wide:
        leaf.requires_grad_()
    options = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    want = oracle(double[0], double[1], targets, double[2], reference_hidden=double[3], **options)
    g = torch.Generator().manual_seed(1)
    names = [name for name in upstream if getattr(got, name) is not None]
    coefficients = {name: torch.randn(T, generator=g) for name in names}
    sum((getattr(got, n) * coefficients[n]).sum() for n in names).backward()
    sum((want[n] * coefficients[n].double()).sum() for n in names).backward()
    values = {
        n: float((getattr(got, n).double() - want[n]).detach().abs().max())
        for n in OUTPUTS
        if getattr(got, n) is not None
    }
    gradients = [relative(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    assert all(a.grad.dtype == a.dtype for a in leaves)
    return values, gradients


@pytest.mark.parametrize("upstream", [("logprob",), ("entropy",), ("kl",), OUTPUTS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "temperature": 0.3},
        {"softcap": 5.0, "temperature": 2.0},
        {"softcap": 5.0, "bias": True, "chunk_bytes": 4096},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(options, frozen, upstream):
    values, gradients = compare(37, 19, 131, reference=True, frozen=frozen, upstream=upstream, **options)
    assert max(values.values()) < 1e-5
    assert max(gradients) < 1e-6


def test_float64_stays_float64():
    values, gradients = compare(9, 8, 33, dtype=torch.float64, reference=True, bias=True, chunk_bytes=600)
    assert max(values.values()) < 1e-12
    assert max(gradients) < 1e-12


def test_bfloat16_operands_keep_float32_accumulators():
    values, gradients = compare(40, 96, 997, dtype=torch.bfloat16, reference=True, chunk_bytes=30_000)
    assert max(values.values()) < 1e-4
    assert max(gradients) < 2e-3


def test_kernels_give_values_and_gradients_of_the_definition():
    with interpret():
        for options in (
            {"reference": True},
            {"reference": True, "bias": True, "temperature": 0.3, "chunk_bytes": 9000},
            {"softcap": 5.0, "temperature": 2.0, "upstream": ("logprob", "entropy")},
            {"frozen": True, "upstream": ("logprob",)},
        ):
            values, gradients = compare(17, 19, 131, backend="triton", **options)
            assert max(values.values()) < 1e-5
            assert max(gradients) < 1e-6


def test_frozen_bfloat16_head_rounds_its_gradient_once():
    _, gradients = compare(40, 96, 997, dtype=torch.bfloat16, frozen=True, upstream=("logprob",))
    assert max(gradients) < 2e-3


@pytest.mark.parametrize(("T", "H", "V"), [(1, 8, 1), (1, 5, 7), (3, 1, 2), (70_001, 19, 131)], ids=lambda n: str(n))
def test_odd_sizes(T, H, V):
    # T = 70,001 with H = 3, V = 5 would measure MKL, which sums the rows of so small a product in order: 7.1e-6
    values, gradients = compare(T, H, V, upstream=("logprob", "entropy"))
    assert max(values.values()) < 1e-5
    assert V == 1 or max(gradients) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-120.0, 120.0])
@pytest.mark.parametrize("given", ["logprob", "loss"])
def test_shifted_logits_keep_their_values_and_gradients(given, shift, dtype, backend):
    """On a grid of eighths, where logits are exact: what is left is the softmax's error, and no shift adds to it."""
    T, H, V = 13, 16, 131  # enough targets for the scatter of bfloat16 rounding
    hidden, weight, targets, _, reference = (
        x if x is None or not x.is_floating_point() else (x.float() * 8).round().clamp(-16, 16).to(dtype) / 8
        for x in make(T, H, V, reference=True)
    )
    hidden[:, 0] = reference[:, 0] = shift
    weight[:, 0] = 1.0  # adds the shift to every logit
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = oracle(*wide, targets, reference_hidden=reference.double())
    upstream = torch.randn(T, generator=torch.Generator().manual_seed(1))
    if given == "logprob":
        got = linear_logprob(*leaves, targets, entropy=True, reference_hidden=reference, backend=backend)
        assert max((getattr(got, n) - want[n]).abs().max() for n in OUTPUTS) < (
            1e-5 if dtype == torch.float32 else 1e-4
        )
        sum((getattr(got, n) * upstream).sum() for n in OUTPUTS).backward()
        sum((want[n] * upstream.double()).sum() for n in OUTPUTS).backward()
    else:
        linear_grpo_loss(
            *leaves, targets, upstream, loss_weight=torch.ones(T), entropy_coef=0.1, backend=backend
        ).loss.backward()
        (-upstream.double() * want["logprob"] - 0.1 * want["entropy"]).sum().backward()
    bar = 1e-6 if dtype == torch.float32 else 2e-3
    assert max(relative(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)) < bar


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("step", [1e-4, 0.3])
def test_kl_keeps_its_relative_precision_close_to_the_reference(step, softcap, backend):
    """A hundred-millionth of a nat, where a difference of log-probs would be rounding alone."""
    hidden, weight, targets, bias, _ = make(11, 19, 131, bias=True)
    reference = hidden + step * torch.randn(11, 19, generator=torch.Generator().manual_seed(2))
    hidden.requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    got = linear_logprob(
        hidden, weight, targets, bias=bias, reference_hidden=reference, softcap=softcap, backend=backend
    )
    want = oracle(wide, weight.double(), targets, bias.double(), softcap=softcap, reference_hidden=reference.double())
    got.kl.sum().backward()
    want["kl"].sum().backward()
    assert relative(got.kl.detach(), want["kl"].detach()) < (1e-6 if step == 0.3 else 1e-3)
    assert relative(hidden.grad, wide.grad) < 1e-6


def test_kl_of_a_model_far_from_its_reference_is_finite(backend):
    """Each is sure of another token, by 200 nats."""
    hidden, weight = torch.zeros(2, 70), torch.eye(70)
    hidden[0, 3] = 200.0
    reference = hidden.roll(5, 1)
    got = linear_logprob(hidden, weight, torch.tensor([3, 1]), reference_hidden=reference, backend=backend)
    torch.testing.assert_close(got.kl, torch.tensor([200.0, 0.0]))


@pytest.mark.parametrize("margin", [2.0, 17.0, 40.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_confident_tokens_keep_value_and_gradient(margin, frozen, backend):
    """Past 15 nats `z − lse` is 0 in float32; the log-prob is −exp(−margin)·(V − 1), and so is its slope."""
    V = 65
    weight = torch.eye(V).requires_grad_(not frozen)
    hidden = torch.zeros(2, V)
    hidden[:, 7] = margin
    hidden.requires_grad_()
    targets = torch.tensor([7, 3])  # the confident one, and one that it leaves behind
    got = linear_logprob(hidden, weight, targets, backend=backend).logprob
    got.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    want = oracle(wide, weight.detach().double(), targets)["logprob"]
    want.sum().backward()
    assert ((got - want) / want).abs().max() < 1e-6
    for row in (0, 1):
        assert relative(hidden.grad[row], wide.grad[row]) < 1e-6


@pytest.mark.parametrize("margin", [2.0, 17.0, 40.0])
@pytest.mark.parametrize("name", ["entropy", "kl"])
def test_confident_rows_keep_the_gradients_of_entropy_and_kl(name, margin, backend):
    """In the logit ahead it is a sum over the others, some exp(−margin), between terms that are not small."""
    g = torch.Generator().manual_seed(0)
    hidden, step = (torch.randint(-8, 9, (2, 65), generator=g) / 8 for _ in range(2))  # exact logits
    hidden[:, 7] = margin
    weight, targets = torch.eye(65), torch.tensor([7, 3])
    leaf, wide = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    got = linear_logprob(leaf, weight, targets, entropy=True, reference_hidden=leaf + step, backend=backend)
    want = oracle(wide, weight.double(), targets, reference_hidden=wide + step)
    getattr(got, name).sum().backward()
    want[name].sum().backward()
    for row in (0, 1):
        assert relative(leaf.grad[row], wide.grad[row]) < 1e-6


def test_head_tied_to_the_embedding_sums_both_gradients():
    weight = torch.randn(33, 8, dtype=torch.float64).requires_grad_()
    ids = torch.randint(33, (20,))
    linear_logprob(torch.tanh(weight[ids]), weight, ids, chunk_bytes=900).logprob.sum().backward()
    got, weight.grad = weight.grad, None
    oracle(torch.tanh(weight[ids]), weight, ids)["logprob"].sum().backward()
    assert relative(got, weight.grad) < 1e-12


def test_masked_out_tokens_have_no_probability(backend):
    hidden, weight, targets, *_ = make(6, 8, 70)
    bias = torch.where(torch.arange(70) % 3 == 0, -torch.inf, 0.0)
    targets = targets // 3 * 3 + 1
    hidden.requires_grad_()
    got = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend=backend)
    (got.logprob + got.entropy).sum().backward()
    kept = bias == 0
    wide = hidden.detach().double().requires_grad_()
    position = kept.cumsum(0)[targets] - 1
    want = oracle(wide, weight[kept].double(), position)
    (want["logprob"] + want["entropy"]).sum().backward()
    assert (got.logprob - want["logprob"]).abs().max() < 1e-5
    assert (got.entropy - want["entropy"]).abs().max() < 1e-5
    assert relative(hidden.grad, wide.grad) < 1e-6


@pytest.mark.parametrize("rows", [0, 5])
def test_without_rows_results_are_empty_and_gradients_zero(rows):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(rows, 4, requires_grad=True)
    got = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), entropy=True)
    (got.logprob.sum() + got.entropy.sum()).backward()
    assert got.logprob.shape == (0,)
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(rows, 4))


def test_a_vocabulary_of_0_holds_no_target():
    with pytest.raises(IndexError, match="V = 0"):
        linear_logprob(torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, "flatten batch"),
        ({"hidden": torch.zeros(3, 5)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "hidden must be float"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, "one id per row"),
        ({"targets": torch.zeros(3)}, TypeError, "int64"),
        ({"targets": torch.tensor([0, -100, 1])}, IndexError, r"\[0, 7\)"),
        ({"targets": torch.tensor([0, 7, 1])}, IndexError, "weight of 0"),
        ({"bias": torch.zeros(6)}, ValueError, "bias"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"reference_hidden": torch.zeros(2, 4)}, ValueError, "reference_hidden"),
        ({"backend": "cuda"}, ValueError, "unknown backend"),
        ({"backend": "triton"}, ValueError, "TRITON_INTERPRET"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "weight is on meta"),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_the_reason(change, error, says):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=says):
        linear_logprob(**arguments | change)


def test_strides_do_not_matter(backend):
    hidden, weight, targets, *_ = make(12, 16, 70)
    straight = linear_logprob(hidden, weight, targets, backend=backend).logprob
    spread = torch.zeros(12, 2, dtype=torch.int64)
    spread[:, 0] = targets
    wide = torch.zeros(70, 32)
    wide[:, :16] = weight
    crooked = linear_logprob(hidden.t().contiguous().t(), wide[:, :16], spread[:, 0], backend=backend).logprob
    assert (crooked - straight).abs().max() < 1e-6


def test_same_call_gives_the_same_bits(backend):
    hidden, weight, targets, *_ = make(12, 16, 70)
    first, second = (compare_bits(hidden, weight, targets, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def compare_bits(hidden, weight, targets, backend):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    got = linear_logprob(*leaves, targets, entropy=True, backend=backend, chunk_bytes=2000)
    (got.logprob.sum() + got.entropy.sum()).backward()
    return got.logprob.detach(), got.entropy.detach(), *(leaf.grad for leaf in leaves)


def test_no_more_logits_than_chunk_bytes_at_a_time():
    hidden, weight, targets, *_ = make(64, 16, 500)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    for entropy in (False, True):
        with LargestTensor() as largest:
            got = linear_logprob(*leaves, targets, entropy=entropy, chunk_bytes=16_000)
            (got.logprob.sum() + (got.entropy.sum() if entropy else 0)).backward()
        assert largest.elements * 4 <= max(16_000, weight.numel() * 4)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_of_one_chunk_are_computed_once_and_those_of_several_twice(backend, monkeypatch):
    computed = []
    logits = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda head, hidden, out: computed.append(len(out)) or logits(head, hidden, out)
    )
    hidden, weight, targets, *_ = make(12, 8, 40)
    gradients = []
    for chunk_bytes in (None, 4 * 40 * 4):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with interpret():
            out = linear_logprob(*leaves, targets, entropy=True, chunk_bytes=chunk_bytes, backend=backend)
            (out.logprob.sum() + 0.3 * out.entropy.sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert computed == [12] + 2 * [4, 4, 4]
    for one, several in zip(*gradients, strict=True):
        torch.testing.assert_close(one, several)


def test_a_second_backward_gives_the_same_gradient():
    hidden, weight, targets, *_ = make(9, 8, 40)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = (linear_logprob(*leaves, targets, entropy=True).entropy ** 2).sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_kept_logits_go_with_the_results(monkeypatch):
    chunks = []

    def watched(*arguments, **options):
        chunks.append(_rows.TorchRows(*arguments, **options))
        return chunks[-1]

    monkeypatch.setitem(_rows.ROWS, "torch", watched)
    hidden, weight, targets, *_ = make(9, 8, 40)
    results = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets, entropy=True)
    kept = weakref.ref(chunks.pop())
    assert kept() is not None
    gc.disable()  # a cycle would keep [T, V] logits until the collector comes by
    try:
        del results
        assert kept() is None
    finally:
        gc.enable()


def test_operands_keep_their_precision_under_autocast():
    hidden, weight, targets, *_ = make(12, 16, 70)
    straight = compare_bits(hidden, weight, targets, None)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprob(*leaves, targets, entropy=True, chunk_bytes=2000)
        (got.logprob.sum() + got.entropy.sum()).backward()
    assert torch.equal(got.logprob, straight[0])
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, straight[2:], strict=True))


def test_checkpointing_and_compile_change_nothing():
    hidden, weight, targets, *_ = make(12, 16, 70)

    def head(h, w):
        got = linear_logprob(torch.sin(h), w, targets, entropy=True, chunk_bytes=2000)
        return got.logprob.sum() + got.entropy.sum()

    results = []
    compiled = torch.compile(head, backend="eager")
    for run in (head, lambda h, w: checkpoint(head, h, w, use_reentrant=False), compiled):
        leaves = [torch.arcsin(hidden.clamp(-0.9, 0.9)).requires_grad_(), weight.clone().requires_grad_()]
        run(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_fullgraph_is_refused_with_the_reason():
    hidden, weight, targets, *_ = make(12, 16, 70)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        torch.compile(lambda h: linear_logprob(h, weight, targets), backend="eager", fullgraph=True)(hidden)
