"""On a GPU: sampling against float64 at the sizes of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import SampleOptions, sample_head, sample_row, sample_row_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = pytest.mark.parametrize(
    ("width", "inner", "heads", "kv_heads", "head_dim"),
    [(896, 4864, 14, 2, 64), (3584, 18944, 28, 4, 128)],
    ids=["0.5B", "7B"],
)


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@MODELS
@pytest.mark.parametrize("batch", [1, 48, 200])
def test_sampling(width, inner, heads, kv_heads, head_dim, batch):
    vocabulary = 151_936
    hidden, weight = randn(batch, width), randn(vocabulary, width, seed=1) / width**0.5 * 3
    keys, positions = torch.arange(batch, device="cuda") + (1 << 40), torch.arange(batch, device="cuda")
    forbidden = torch.arange(vocabulary, device="cuda") >= 151_665
    forced = torch.where(keys % 5 == 0, 77, -1)
    logits = hidden.double() @ weight.double().T
    for options in (SampleOptions(temperature=0.8), SampleOptions(top_k=50, top_p=0.9), SampleOptions(temperature=0.0)):
        got = sample_head(hidden, weight, keys, positions, options, forbidden=forbidden, forced=forced)
        want = sample_row_reference(logits, keys, positions, options, forbidden=forbidden, forced=forced)
        same = got.token == want.token  # two scores may race within rounding
        assert same.float().mean() > 0.98
        for name in ("logprob", "tempered_logprob", "raw_logprob", "entropy"):
            torch.testing.assert_close(getattr(got, name)[same], getattr(want, name)[same], rtol=1e-4, atol=1e-4)
    rows = sample_row(logits.float(), keys, positions, SampleOptions(temperature=0.8), forbidden=forbidden)
    whole = sample_head(hidden, weight, keys, positions, SampleOptions(temperature=0.8), forbidden=forbidden)
    assert (rows.token == whole.token).float().mean() > 0.98
