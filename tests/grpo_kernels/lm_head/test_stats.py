"""`lm_head_stats`, which writes no logits, gives the statistics of the definition."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import linear_logprob
from grpo_kernels.testing.interpreter import interpret

from .cases import make, oracle


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"softcap": 5.0}], ids=str)
def test_head_statistics_without_logits_are_those_of_the_definition(options, with_bias):
    for T, H, V, dtype in ((37, 36, 131, torch.float32), (65, 64, 64, torch.bfloat16)):
        hidden, weight, targets, bias, _ = make(T, H, V, dtype, bias=with_bias)
        with interpret(), torch.no_grad():  # one byte: never any logits
            got = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, chunk_bytes=1, **options)
        wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
        want = oracle(*wide[:2], targets, wide[2], **options)
        assert (got.logprob - want["logprob"]).abs().max() < 1e-5
        assert (got.entropy - want["entropy"]).abs().max() < 1e-5
