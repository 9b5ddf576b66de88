"""A chunk of rows on the kernels: gradients over the logits' memory, large entries, scales, targets out of range."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels.lm_head import _rows
from grpo_kernels.lm_head._rows import RowStatistics, Transform, TritonRows, row_chunks
from grpo_kernels.lm_head._rows_triton import LargeEntries, RowLaunch
from grpo_kernels.testing.interpreter import interpret

from .cases import relative


@pytest.fixture(autouse=True)
def interpreted_in_blocks_of_128(monkeypatch):
    monkeypatch.setattr(_rows, "launch_rows", lambda: RowLaunch(block=128, warps=1))
    with interpret():
        yield


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("upstream", [("grad_logprob",), ("grad_entropy",), ("grad_logprob", "grad_entropy")], ids=str)
def test_row_gradient_in_the_front_of_its_float32_row(upstream):
    """The half-precision gradient of a row overlaps float32 logits of the same row that are still to be read."""
    T, V, stride = 5, 131, 136
    g = torch.Generator().manual_seed(0)
    memory = torch.full((T, stride), float("nan"))
    memory[:, :V] = torch.randn(T, V, generator=g) * 3
    logits, targets = memory[:, :V].clone().double().requires_grad_(), torch.randint(V, (T,), generator=g)
    logp = torch.log_softmax(logits / 0.7, -1)
    want = {"grad_logprob": logp.gather(1, targets[:, None])[:, 0], "grad_entropy": -(logp.exp() * logp).sum(-1)}
    factors = {name: torch.randn(T, generator=g) for name in upstream}
    sum((want[name] * factor.double()).sum() for name, factor in factors.items()).backward()
    stats = RowStatistics.empty(T, memory.device, torch.float32, entropy=True, kl=False)
    out = memory.view(torch.bfloat16)[:, :V]
    rows = TritonRows(memory[:, :V], targets, Transform(0.7), stats, out=out)
    dense, factor, large = rows.gradient_(**{"grad_logprob": torch.zeros(T)} | factors)
    assert dense.data_ptr() == memory.data_ptr()
    if "grad_entropy" in upstream:
        assert large is None
        assert relative(dense.double() * factor[:, None], logits.grad) < 3e-4
    else:
        assert torch.equal(large.token[:, 0], targets)
        assert (dense.gather(1, targets[:, None]) == 0).all()
        there = large.token >= 0
        whole = out.double().index_put((there.nonzero()[:, 0], large.token[there]), large.value[there].double())
        assert relative(whole, logits.grad) < 2e-3
    assert (stats.logprob - want["grad_logprob"]).abs().max() < 1e-5


def test_row_offsets_pass_32_bits():
    """T·V exceeds 2³¹ at T = 14,123 for V = 152,064; here two rows lie so far apart (in untouched, unreal memory)."""
    V, stride = 70, 2**31
    logits = torch.empty(stride + V, dtype=torch.bfloat16).as_strided((2, V), (stride, 1))
    logits.copy_(torch.randn(2, V))
    targets = torch.tensor([3, 4])
    want = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]
    stats = RowStatistics.empty(2, logits.device, torch.float32, entropy=False, kl=False)
    TritonRows(logits, targets, Transform(), stats).statistics_()
    assert (stats.logprob - want).abs().max() < 1e-6


def test_target_out_of_range_on_a_gpu_is_nan_not_another_rows_logit():
    stats = RowStatistics.empty(2, torch.device("cpu"), torch.float32, entropy=False, kl=False)
    TritonRows(torch.randn(2, 70), torch.tensor([-100, 3]), Transform(), stats).statistics_()
    assert stats.logprob.isnan().tolist() == [True, False]


def test_target_out_of_range_makes_its_row_nan_and_is_no_entry():
    logits, targets = noise(3, 70, seed=0), torch.tensor([4, -100, 70])
    stats = RowStatistics.empty(3, logits.device, torch.float32, entropy=False, kl=False)
    rows = TritonRows(logits, targets, Transform(), stats, out=logits.view(torch.bfloat16)[:, :70])
    dense, _, large = rows.gradient_(None)
    assert dense.isnan().all(1).tolist() == [False, True, True]
    assert large.token.tolist() == [[4, -1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("name", ["entropy", "kl"])
def test_scaled_gradients_fill_float16_and_do_not_overflow(name, spread):
    """From even rows next to their reference to confident ones that have nothing in common with it."""
    T, V = 12, 70
    logits, drift, targets = spread * noise(T, V, seed=0), spread * noise(T, V, seed=1), torch.arange(T)
    stats = RowStatistics.empty(T, logits.device, torch.float32, entropy=True, kl=True)
    rows = TritonRows(logits, targets, Transform(), stats, drift=drift, out=logits.view(torch.bfloat16)[:, :V])
    upstream = {"grad_logprob": torch.zeros(T), f"grad_{name}": 1e-6 * noise(T, seed=2)}
    dense, factor, _ = rows.gradient_(**upstream)
    assert dense.dtype == torch.float16
    assert torch.equal(factor.frexp().mantissa, torch.full((T,), 0.5))  # powers of two
    assert dense.abs().max() <= 2**14
    if not (name == "kl" and spread == 60.0):  # far from a confident row's own slope, where KL is tens of nats
        assert dense.abs().amax(1).median() > 2**-4  # ten octaves above the least that keeps eleven bits


def test_columns_past_the_vocabulary_are_no_entries():
    """A softcap makes −softcap of the −∞ they stand for, as likely here as the only token that is left."""
    logits = torch.tensor([[3.0, -3.0]])
    stats = RowStatistics.empty(1, logits.device, torch.float32, entropy=False, kl=False)
    rows = TritonRows(logits, torch.tensor([0]), Transform(softcap=1.0), stats, out=logits.view(torch.bfloat16)[:, :2])
    assert rows.gradient_(None).large_entries.token.tolist() == [[0, 1]]


def test_products_of_large_entries_are_those_of_a_dense_matrix():
    """One token of 40 rows, 20 tokens of one row each, a row without any; more features than a program takes."""
    rows, width, vocabulary = 41, 600, 70
    large = LargeEntries.none(rows, torch.device("cpu"))
    large.token[:-1, 0] = 3
    large.token[:-1:2, 1] = torch.arange(5, 25)
    large.value.copy_(noise(rows, 2, seed=0))
    large.value[-1] = torch.nan
    dense = torch.zeros(rows, vocabulary, dtype=torch.float64)
    there = large.token >= 0
    dense[there.nonzero()[:, 0], large.token[there]] = large.value[there].double()
    hidden, weight, total = (noise(n, width, seed=n) for n in (rows, vocabulary, 2 * rows))
    out = torch.empty(width, rows).t()
    large.add_product(total[:rows], weight, out)
    torch.testing.assert_close(out, (total[:rows].double() + dense @ weight.double()).float())
    total = weight.clone()
    large.add_transposed(hidden, total)
    torch.testing.assert_close(total, (weight.double() + dense.t() @ hidden.double()).float())


def test_chunks_are_the_fewest_and_of_nearly_one_size():
    def sizes(rows, row_bytes, chunk_bytes):
        chunks = row_chunks(rows, row_bytes, torch.device("cpu"), chunk_bytes)
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
        return [chunk.stop - chunk.start for chunk in chunks]

    assert sizes(10, 100, 1000) == [10]
    assert sizes(11, 100, 1000) == [6, 5]
    assert sizes(3, 100, 1) == [1, 1, 1]
    assert sizes(0, 100, 1000) == []
