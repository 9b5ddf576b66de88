"""Group attention by one dense mask over the packed axis, and layouts that reach every branch."""

from __future__ import annotations

import torch

from grpo_kernels import GroupSpans, group_attention

UNEVEN = GroupSpans([5, 1, 3, 1], [[3, 1, 0, 6], [2, 2], [], [0]])
EVEN = GroupSpans([7], [[4, 4, 4]])
ONES = GroupSpans([1, 1], [[1], [1]])
LONG = GroupSpans([150], [[140, 2, 2]])


def owners(spans: GroupSpans) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T]` group of each row, and its member (-1 in the prompt)."""
    owner, member = [], []
    for n, (prompt, lengths) in enumerate(zip(spans.prompt_lengths, spans.completion_lengths, strict=True)):
        owner += [n] * (prompt + sum(lengths))
        member += [-1] * prompt + [g for g, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(owner), torch.tensor(member)


def dense_attention(q, k, v, spans: GroupSpans, scale: float | None = None) -> torch.Tensor:
    owner, member = owners(spans)
    mask = (owner[:, None] == owner) & ((member == -1) | (member[:, None] == member))
    mask = mask.tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def make(spans: GroupSpans, heads=(4, 2), width=8, dtype=torch.float64):
    """q, k, v as leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(spans.total)
    shapes = [(spans.total, heads[0], width)] + 2 * [(spans.total, heads[1], width)]
    qkv = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
    return qkv, torch.randn(shapes[0], generator=generator, dtype=dtype)


def assert_equals_dense(spans: GroupSpans, heads=(4, 2), tolerance=1e-10, dtype=torch.float64, **options):
    qkv, upstream = make(spans, heads, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, dense = group_attention(*qkv, spans, **options), dense_attention(*wide, spans, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(out, qkv, upstream), torch.autograd.grad(dense, wide, upstream.double())
    for name, mine, want in zip("qkv", *gradients, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)
