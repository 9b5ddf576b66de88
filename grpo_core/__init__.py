"""GRPO Core: group-relative policy optimisation in one process per GPU. It knows nothing of emotions.

Names are loaded on first use: `import grpo_core` brings neither torch nor transformers, and options are read without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo_kernels import __version__

if TYPE_CHECKING:
    from grpo_core.algorithm.losses import LOSS_TYPES, Surrogate, register_loss
    from grpo_core.config import (
        AlgorithmConfig,
        GRPOConfig,
        OptimConfig,
        RolloutConfig,
        RunConfig,
        SFTConfig,
        load_config,
        save_config,
    )
    from grpo_core.distributed import Distributed
    from grpo_core.families import Family, register_family
    from grpo_core.layout import GroupLayout
    from grpo_core.policy import Policy
    from grpo_core.reward_adapters import load_reward
    from grpo_core.rewards import Reward, RewardOutput
    from grpo_core.rollout.sampler import GroupSampler
    from grpo_core.training.grpo import GRPOTrainer
    from grpo_core.training.sft import Example, SFTTrainer
    from grpo_core.types import Completion, Group, Prompt
    from grpo_core.verify import verify_model

_MODULES = {
    "algorithm.losses": ("LOSS_TYPES", "Surrogate", "register_loss"),
    "config": (
        "AlgorithmConfig",
        "GRPOConfig",
        "OptimConfig",
        "RolloutConfig",
        "RunConfig",
        "SFTConfig",
        "load_config",
        "save_config",
    ),
    "distributed": ("Distributed",),
    "families": ("Family", "register_family"),
    "layout": ("GroupLayout",),
    "policy": ("Policy",),
    "reward_adapters": ("load_reward",),
    "rewards": ("Reward", "RewardOutput"),
    "rollout.sampler": ("GroupSampler",),
    "training.grpo": ("GRPOTrainer",),
    "training.sft": ("Example", "SFTTrainer"),
    "types": ("Completion", "Group", "Prompt"),
    "verify": ("verify_model",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LOSS_TYPES",
    "AlgorithmConfig",
    "Completion",
    "Distributed",
    "Example",
    "Family",
    "GRPOConfig",
    "GRPOTrainer",
    "Group",
    "GroupLayout",
    "GroupSampler",
    "OptimConfig",
    "Policy",
    "Prompt",
    "Reward",
    "RewardOutput",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SFTTrainer",
    "Surrogate",
    "__version__",
    "load_config",
    "load_reward",
    "register_family",
    "register_loss",
    "save_config",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `python -m` of a module that is no program would end with status 0, having done nothing
if getattr(sys, "argv", [""])[:1] == ["-m"]:
    from grpo_kernels._module_run import refuse_module_run

    refuse_module_run(__name__, __path__[0])
