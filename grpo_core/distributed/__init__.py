"""One process per device: set-up under torchrun, and the few collectives that a step needs."""

from grpo_core.distributed.collectives import (
    Distributed,
    all_reduce_gradients,
    all_reduce_sum,
    barrier,
    broadcast_parameters,
    finalize,
    gather_objects,
    gather_rows,
    init,
    max_over_ranks,
    require_same,
    run_on_main,
    send_to_main,
    shard,
)

__all__ = [
    "Distributed",
    "all_reduce_gradients",
    "all_reduce_sum",
    "barrier",
    "broadcast_parameters",
    "finalize",
    "gather_objects",
    "gather_rows",
    "init",
    "max_over_ranks",
    "require_same",
    "run_on_main",
    "send_to_main",
    "shard",
]
