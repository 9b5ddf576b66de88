"""Sampling inside the LM head gives the tokens and log-probs of sampling from its logits."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import SampleOptions, sample_head, sample_head_reference, sample_row
from grpo_kernels.testing.interpreter import interpret


def make(batch=21, width=40, vocabulary=203, dtype=torch.bfloat16):
    """Odd sizes; 21 rows are two tiles of the interpreter's 16, 203 tokens four of its 64."""
    g = torch.Generator().manual_seed(5)
    hidden = (torch.randn(batch, width, generator=g) * 2).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(dtype)
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    positions = torch.arange(batch, dtype=torch.int32) % 7
    return hidden, weight, keys, positions


def assert_same(got, want):
    assert got.token.tolist() == want.token.tolist()
    for name in ("logprob", "tempered_logprob", "raw_logprob", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-6, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("temperature", "banned", "biased"),
    [
        (1.0, False, False),
        (1.0, True, True),
        (0.4, True, False),
        (0.4, False, True),
        (0.0, True, True),
        (0.0, False, False),
    ],
)
def test_fused_kernel_equals_its_reference(temperature, banned, biased, monkeypatch):
    hidden, weight, keys, positions = make()
    bias = torch.linspace(-2, 2, 203) if biased else None
    # a whole tile of the vocabulary, and more
    forbidden = (torch.arange(203) >= 120) | (torch.arange(203) % 5 == 0) if banned else None
    options = SampleOptions(temperature=temperature)
    arguments = (hidden, weight, keys, positions, options)
    want = sample_head_reference(*arguments, bias=bias, forbidden=forbidden)
    with interpret():
        monkeypatch.setitem(sample_head.__globals__, "sample_row", None)  # fused, or it fails
        got = sample_head(*arguments, bias=bias, forbidden=forbidden, backend="triton")
    assert_same(got, want)
    assert len(set(got.token.tolist())) > 5
    if banned:
        assert not forbidden[got.token].any()


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_forced_tokens_in_the_fused_kernel(temperature, monkeypatch):
    hidden, weight, keys, positions = make()
    forced = torch.where(torch.arange(21) % 3 == 0, -1, torch.arange(21) * 9)
    forbidden = torch.arange(203) % 5 == 0
    arguments = (hidden, weight, keys, positions, SampleOptions(temperature=temperature))
    want = sample_head_reference(*arguments, forbidden=forbidden, forced=forced)
    with interpret():
        monkeypatch.setitem(sample_head.__globals__, "sample_row", None)
        got = sample_head(*arguments, forbidden=forbidden, forced=forced, backend="triton")
    assert_same(got, want)
    assert got.token[forced >= 0].tolist() == forced[forced >= 0].tolist()
    assert got.logprob.isinf().tolist() == ((forced >= 0) & (forced % 5 == 0)).tolist()


def test_a_nan_in_a_hidden_state_shows_in_its_rows_log_probs(backend):
    hidden, weight, keys, positions = make()
    hidden[3, 1] = torch.nan
    result = sample_head(hidden, weight, keys, positions, backend=backend)
    assert result.tempered_logprob.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.1}, {"repetition_penalty": 1.5}],
    ids=lambda options: next(iter(options)),
)
def test_truncation_and_penalty_go_through_whole_rows(options, backend):
    hidden, weight, keys, positions = make(batch=3)
    seen = torch.arange(203).expand(3, -1) % 3 == 0
    arguments = (hidden, weight, keys, positions, SampleOptions(**options))
    want = sample_head_reference(*arguments, seen=seen)
    assert_same(sample_head(*arguments, seen=seen, backend=backend), want)
    rows = sample_row(hidden.double() @ weight.double().T, *arguments[2:], seen=seen)
    assert_same(want, rows)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 40), (torch.bfloat16, 37)], ids=["float32", "odd width"])
def test_operands_that_tensor_descriptors_do_not_take(dtype, width, backend):
    arguments = make(batch=5, width=width, dtype=dtype)
    assert_same(sample_head(*arguments, backend=backend), sample_head_reference(*arguments))


def test_a_row_is_drawn_alike_in_any_batch(backend):
    hidden, weight, keys, positions = make()
    pick = torch.tensor([18, 2])
    whole = sample_head(hidden, weight, keys, positions, backend=backend)
    part = sample_head(hidden[pick], weight, keys[pick], positions[pick], backend=backend)
    assert torch.equal(whole.token[pick], part.token)
    torch.testing.assert_close(whole.logprob[pick], part.logprob, rtol=0, atol=1e-6)


def test_bad_input_is_refused():
    hidden, weight, keys, positions = make()
    with pytest.raises(ValueError, match=r"need hidden \[B, H\] and weight \[V, H\]"):
        sample_head(hidden[:, :8], weight, keys, positions)
    with pytest.raises(ValueError, match="pass seen"):
        sample_head(hidden, weight, keys, positions, SampleOptions(repetition_penalty=2.0))
