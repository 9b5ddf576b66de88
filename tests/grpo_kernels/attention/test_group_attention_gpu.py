"""On a GPU: group attention by the flash operators equals one dense mask over the packed axis."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import GroupSpans, group_attention
from grpo_kernels.attention import group_attention as module

from .dense import EVEN, ONES, UNEVEN, dense_attention, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("package", [True, False], ids=["flash_attn", "aten"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["mha", "gqa"])
def test_flash_operators_on_a_gpu_equal_a_dense_mask(monkeypatch, heads, package):
    if package and module._flash_package() is None:
        pytest.skip("flash_attn is not installed")
    if not package:
        monkeypatch.setattr(module, "_flash_package", lambda: None)
    for spans in (UNEVEN, EVEN, ONES, GroupSpans([300, 1], [[100, 7, 1, 0], [64] * 4])):
        qkv, upstream = make(spans, heads, width=64, dtype=torch.bfloat16)
        wide = [x.detach().double().requires_grad_() for x in qkv]
        cuda = [x.detach().cuda().requires_grad_() for x in qkv]
        out, dense = group_attention(*cuda, spans), dense_attention(*wide, spans)
        pairs = [(out, dense)]
        pairs += zip(
            torch.autograd.grad(out, cuda, upstream.cuda()),
            torch.autograd.grad(dense, wide, upstream.double()),
            strict=True,
        )
        for mine, want in pairs:
            assert (mine.detach().cpu().double() - want).norm() < 1e-2 * want.norm()
