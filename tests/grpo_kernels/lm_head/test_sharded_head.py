"""A head that FSDP2 has sharded gives the values and gradients of data parallelism with a whole one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from grpo_kernels import linear_grpo_loss, linear_logprob

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
g = torch.Generator().manual_seed(0)
weight, hidden = torch.randn(30, 8, generator=g), torch.randn(world, 12, 8, generator=g)
targets, advantages = torch.randint(30, (world, 12), generator=g), torch.randn(world, 12, generator=g)
ones = torch.full((12,), 1 / 12)


def logprob(h, w, rank):
    return (linear_logprob(h, w, targets[rank]).logprob * advantages[rank]).mean()


def loss(h, w, rank):
    return linear_grpo_loss(h, w, targets[rank], advantages[rank], loss_weight=ones).loss


for objective in (logprob, loss):
    head = torch.nn.Linear(8, 30, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    fully_shard(head)
    h = hidden[rank].clone().requires_grad_()
    objective(h, head.weight, rank).backward()  # outside the module's forward: a DTensor

    whole = weight.clone().requires_grad_()
    parts = hidden.clone().requires_grad_()
    torch.stack([objective(parts[r], whole, r) for r in range(world)]).mean().backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), whole.grad)
    torch.testing.assert_close(h.grad, parts.grad[rank] * world)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_sharded_head_gives_the_mean_of_its_ranks_gradients():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
