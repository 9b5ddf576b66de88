"""Sampling from rows of logits: kept sets against a sort, log-probs against a softmax, tokens of given counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_kernels import SampledTokens, SampleOptions, sample_row, sample_row_reference
from grpo_kernels.testing.interpreter import interpret

V = 301
OPTIONS = {
    "whole": {},
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 7, "temperature": 1.7},
    "top_p": {"top_p": 0.8, "temperature": 2.0},
    "top_k, then top_p": {"top_k": 20, "top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
    "greedy, penalty": {"temperature": 0.0, "repetition_penalty": 5.0},
}


def make(batch=24, spread=2.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(batch, V, generator=g) * spread).to(dtype)
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    positions = torch.arange(batch, dtype=torch.int32) % 5
    seen = torch.rand(batch, V, generator=g) < 0.2
    return logits, keys, positions, seen


def kept(logits, options: SampleOptions, seen, forbidden=None):
    """`[V]` probabilities of one row, by sorting one list in NumPy: transformers' order of processors."""
    x = logits.double().numpy().copy()
    if options.repetition_penalty != 1:
        penalised = np.where(x > 0, x / options.repetition_penalty, x * options.repetition_penalty)
        x = np.where(seen.numpy(), penalised, x)
    if forbidden is not None:
        x[forbidden.numpy()] = -np.inf
    x = x / (options.temperature or 1)
    if options.top_k:
        x[x < np.sort(x)[-options.top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if options.top_p < 1:
        drop = [i for i in range(V) if p[p > p[i]].sum() >= options.top_p]
        p[drop] = 0
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


def compare(got: SampledTokens, want: SampledTokens):
    assert got.token.tolist() == want.token.tolist()
    assert got.token.dtype == torch.int64
    for name in ("logprob", "tempered_logprob", "raw_logprob", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-6, atol=4e-6, msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernel_and_reference_draw_the_same_tokens(options):
    options = SampleOptions(**options)
    ban = torch.arange(V) % 7 == 0 if options.min_p or options.top_k else None
    logits, keys, positions, seen = make(batch=3)
    want = sample_row_reference(logits, keys, positions, options, seen=seen, forbidden=ban)
    with interpret():
        got = sample_row(logits, keys, positions, options, seen=seen, forbidden=ban, backend="triton")
    compare(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logprobs_are_those_of_the_kept_distribution_of_the_whole_and_at_temperature_1(options):
    logits, keys, positions, seen = make()
    forbidden = torch.arange(V) % 7 == 0
    options = SampleOptions(**options)
    result = sample_row(logits, keys, positions, options, seen=seen, forbidden=forbidden)
    whole = torch.log_softmax(logits.double() / (options.temperature or 1), -1)
    raw = torch.log_softmax(logits.double(), -1)
    for row, token in enumerate(result.token.tolist()):
        p = kept(logits[row], options, seen[row], forbidden)
        assert result.logprob[row].exp() == pytest.approx(p[token], rel=1e-6)
        if options.temperature == 0:
            assert token == p.argmax()
        assert result.tempered_logprob[row] == pytest.approx(whole[row, token].item(), abs=1e-6)
        assert result.raw_logprob[row] == pytest.approx(raw[row, token].item(), abs=1e-6)
        assert result.entropy[row] == pytest.approx(-(whole[row].exp() * whole[row]).sum().item(), rel=1e-6)


def test_ties_are_kept_together_and_greedy_takes_the_first(backend):
    rows = 64 if backend == "torch" else 5
    logits = torch.full((rows, V), -3.0)
    logits[:, [250, 40, 41, 200]] = 1.0
    logits[:, 99] = -0.0
    logits[:, 98] = 0.0
    keys, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    result = sample_row(logits, keys, positions, SampleOptions(top_k=2), backend=backend)
    assert set(result.token.tolist()) <= {40, 41, 200, 250}
    torch.testing.assert_close(result.logprob, torch.full((rows,), -np.log(4.0)).float(), rtol=1e-6, atol=0)
    result = sample_row(logits, keys, positions, SampleOptions(top_k=5, temperature=10), backend=backend)
    assert {98, 99} & set(result.token.tolist())
    tied = 1 / (2 + 4 * np.exp(0.1))  # −0 ties with 0
    torch.testing.assert_close(result.logprob.exp().min(), torch.tensor(tied).float())
    result = sample_row(logits, keys, positions, SampleOptions(temperature=0.0), backend=backend)
    assert set(result.token.tolist()) == {40}


@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_shifted_logits_and_infinite_ones(backend, shift):
    logits, keys, positions, _ = make(batch=4)
    logits[logits.log_softmax(-1) < -7] = -torch.inf
    assert logits.isinf().any()
    base = sample_row_reference(logits, keys, positions, SampleOptions(top_p=0.9))
    logits = logits + shift
    result = sample_row(logits, keys, positions, SampleOptions(top_p=0.9), backend=backend)
    assert result.token.tolist() == base.token.tolist()
    torch.testing.assert_close(result.logprob, base.logprob, rtol=0, atol=2e-4)
    assert result.entropy.isfinite().all()


def test_a_forbidden_token_that_outweighs_all_others(backend):
    logits, keys, positions, _ = make(batch=4)
    logits[:, 5] = 500.0
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[5] = True
    result = sample_row(logits, keys, positions, SampleOptions(temperature=0.5), forbidden=forbidden, backend=backend)
    without = logits.clone()
    without[:, 5] = -torch.inf
    want = torch.log_softmax(without / 0.5, -1).gather(1, result.token[:, None])[:, 0]
    torch.testing.assert_close(result.logprob, want, rtol=1e-5, atol=1e-5)
    assert (result.tempered_logprob < -900).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strided_rows(backend, dtype):
    logits, keys, positions, _ = make(batch=3, dtype=dtype)
    wide = torch.full((3, V + 40), 99.0, dtype=dtype)
    wide[:, :V] = logits
    chosen = None if dtype == torch.float64 else backend
    result = sample_row(wide[:, :V], keys, positions, SampleOptions(top_k=9), backend=chosen)
    compare(result, sample_row_reference(logits, keys, positions, SampleOptions(top_k=9)))


def test_frequencies_are_those_of_the_softmax():
    """Pooled over 20,000 draws that differ in their counters alone."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, 50, generator=g) * 1.5).expand(20_000, -1)
    positions = torch.arange(20_000) % 100
    keys = torch.arange(20_000) // 100 + (1 << 40)
    for options in (SampleOptions(), SampleOptions(temperature=0.7, top_p=0.9)):
        result = sample_row(logits, keys, positions, options)
        p = np.exp(result.logprob.double().numpy())
        counts = np.bincount(result.token, minlength=50)
        drawn = np.flatnonzero(counts)
        expected = np.zeros(50)
        expected[result.token.numpy()] = p * 20_000
        assert expected.sum() == pytest.approx(20_000, rel=2e-3)
        chi_square = ((counts[drawn] - expected[drawn]) ** 2 / expected[drawn]).sum()
        freedom = len(drawn) - 1
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_a_row_is_drawn_alike_in_any_batch(backend):
    logits, keys, positions, _ = make(batch=8)
    pick = torch.tensor([7, 0, 3])
    whole = sample_row(logits, keys, positions, backend=backend)
    part = sample_row(logits[pick], keys[pick], positions[pick], backend=backend)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[pick], b)
    other = sample_row(logits, keys, positions + 1, backend=backend)
    assert (other.token != whole.token).sum() > 4


def test_bad_input_is_refused():
    logits, keys, positions, seen = make()
    with pytest.raises(ValueError, match="temperature must be ≥ 0"):
        SampleOptions(temperature=-1)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
        SampleOptions(top_p=0.0)
    with pytest.raises(ValueError, match="pass seen"):
        sample_row(logits, keys, positions, SampleOptions(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="int64 keys"):
        sample_row(logits, keys.int(), positions)
    with pytest.raises(ValueError, match="forbidden must be bool"):
        sample_row(logits, keys, positions, forbidden=seen[0, :5])


def forced_case(V, batch):
    """Forced tokens: none, an ordinary one, the last one, one that is forbidden; and what `forbidden` is."""
    forced = torch.full((batch,), -1)
    forced[1], forced[2], forced[3] = 11, V - 1, 7
    return forced, torch.arange(V) == 7


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}], ids=str
)
def test_a_forced_token_is_taken_and_its_log_probs_are_those_of_a_draw(options, backend):
    logits, keys, positions, _ = make(batch=4)
    logits[1, 11] = 9.0  # within what top-k keeps
    forced, forbidden = forced_case(V, 4)
    options = SampleOptions(**options)
    free = sample_row(logits, keys, positions, options, forbidden=forbidden, backend=backend)
    got = sample_row(logits, keys, positions, options, forbidden=forbidden, forced=forced, backend=backend)
    want = sample_row_reference(logits, keys, positions, options, forbidden=forbidden, forced=forced)
    compare(got, want)
    assert got.token.tolist() == [free.token[0], 11, V - 1, 7]
    whole = torch.log_softmax(logits.double() / (options.temperature or 1), -1).gather(1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.tempered_logprob, whole.float(), rtol=1e-6, atol=4e-6)
    assert got.logprob[3] == -torch.inf  # forbidden: it could not have been drawn


def test_a_nan_logit_shows_in_the_log_probs(backend):
    logits, keys, positions, _ = make(batch=3)
    logits[1, 200] = torch.nan
    result = sample_row(logits, keys, positions, backend=backend)
    assert result.tempered_logprob.isnan().tolist() == [False, True, False]
