"""A policy that FSDP2 has sharded over two gloo processes samples what it samples whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grpo_core import distributed
from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout.backends.triton import TritonDecoder
from grpo_core.rollout.sampler import GroupSampler
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.sampling_models import CharTokenizer, make_prompts

ROOT = Path(__file__).parents[2]
ROLLOUT = RolloutConfig(group_size=3, max_new_tokens=12)


def completions(lm, sharded: bool, kernels: bool) -> list:
    """Of two rollouts with a change of weights between them."""
    if sharded:
        base = lm.get_base_model()
        for module in (base.get_input_embeddings(), *base.model.layers, base.lm_head, lm):
            fully_shard(module)
        assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    policy = Policy(lm)
    sampler = GroupSampler(policy, CharTokenizer())
    if kernels:
        sampler.decoder = TritonDecoder(sampler.model)
    found = []
    for step in range(2):
        groups = sampler.sample(make_prompts((5, 17, 1)), ROLLOUT, step=step)
        found.append([[[*c.token_ids], c.logprobs.tolist()] for group in groups for c in group.completions])
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora_B" in name or "norm" in name or "embed" in name:
                    parameter.mul_(1.3)
    return found


def work(folder: str) -> None:
    dist = distributed.init(device="cpu", timeout_seconds=60)
    torch.set_num_threads(1)
    found = [completions(make_lm("qwen3", lora=True), True, kernels) for kernels in (False, True)]
    Path(folder, f"{dist.rank}.json").write_text(json.dumps(found))
    distributed.finalize(dist)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys; from tests.invariants.test_sharded_sampling import work; work(sys.argv[1])",
    ]
    ranks = [
        subprocess.Popen(
            [*command, str(folder)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_completions_equal_the_whole_policys(sharded, kernels):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = completions(make_lm("qwen3", lora=True), False, kernels)
    torch.set_num_threads(threads)
    assert [tokens for tokens, _ in whole[0]] != [tokens for tokens, _ in whole[1]]
    for rank in sharded:
        assert rank[kernels] == whole
