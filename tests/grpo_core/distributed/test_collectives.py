"""Two gloo processes agree, whatever work each of them has."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_core import distributed
from grpo_core.distributed import Distributed
from grpo_core.errors import InputError


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found, by running two_ranks.py once."""
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_know_their_place(ranks):
    assert [found["place"] for found in ranks] == [[0, 2, 0, "cpu", True], [1, 2, 1, "cpu", False]]


def test_gradients_are_summed_and_a_missing_one_counts_as_zeros(ranks):
    for found in ranks:
        assert found["gradients"] == [[[0, 1], [2, 3], [4, 5]], [0] * 5, None]


def test_gradients_keep_their_dtype(ranks):
    assert [found["half"] for found in ranks] == [[True, 4.0]] * 2


def test_broadcast_gives_all_ranks_rank_0s_parameters(ranks):
    torch.manual_seed(0)
    expected = [p.tolist() for p in torch.nn.Linear(4, 4).parameters()]
    assert [found["weights"] for found in ranks] == [expected] * 2


def test_counts_are_summed(ranks):
    assert [found["sum"] for found in ranks] == [[2, 10]] * 2


def test_objects_of_different_sizes_arrive_in_rank_order(ranks):
    expected = [{"rank": 0, "ids": [], "x": 0.1}, {"rank": 1, "ids": ["é"] * 3, "x": 0.1}]
    assert [found["objects"] for found in ranks] == [expected] * 2


def test_the_main_process_decides_for_all_and_its_error_is_everyones(ranks):
    main, other = (found["of_main"] for found in ranks)
    assert main == [{"rank": 0}, ["InputError", "rank 0 says no"], ["KeyError", "rank 0 has a bug"]]
    assert other == [{"rank": 0}, ["InputError", "rank 0 says no"], ["RuntimeError", "'rank 0 has a bug'"]]


def test_disagreement_stops_every_rank_and_names_the_values(ranks):
    for found in ranks:
        assert found["same"] is None
        assert found["different"] == "ranks disagree about seed: rank 0: 5, rank 1: 6"


def test_metrics_are_those_of_all_ranks_together(ranks):
    for found in ranks:
        values = found["metrics"]
        assert math.isnan(values.pop("nobody"))
        assert values == {"reward": 3.0, "length/max": 7.0, "length/min": 3.0, "tokens": 21.0}


def test_ranks_with_different_metrics_say_so(ranks):
    assert "ranks 0 and 1 registered different metrics" in ranks[0]["other_metrics"]
    assert "rank 1 has surplus, tokens" in ranks[1]["other_metrics"]


def test_a_rank_left_alone_names_itself_and_the_collective(ranks):
    assert ranks[0]["left_alone"].startswith("all_reduce_sum failed on rank 0 of 2: another rank stopped")


def test_a_single_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist = distributed.init(device="cpu")
    assert dist == Distributed(0, 1, torch.device("cpu"), 0)
    assert not torch.distributed.is_initialized()
    assert distributed.gather_objects({"x": [1]}, dist) == [{"x": [1]}]
    assert distributed.gather_rows(torch.arange(3), dist).tolist() == [[0, 1, 2]]
    distributed.barrier(dist)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_are_even_and_join_to_the_whole(n, world_size):
    shards = [distributed.shard(range(n), rank, world_size) for rank in range(world_size)]
    assert [i for part in shards for i in part] == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device is 'cuda', but torch sees no CUDA device"):
        distributed.init("cuda")
