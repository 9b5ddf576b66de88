"""Options of a run: their dataclasses, and how they are read from YAML, the command line and Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_core.config.fields import ConfigError, ConfigSection, check_value, chosen_by, option, plugin_files
    from grpo_core.config.loader import load_config, save_config, to_dict
    from grpo_core.config.moved import MOVED_KEYS, translate_saved_config
    from grpo_core.config.options import (
        AlgorithmConfig,
        GRPOConfig,
        OptimConfig,
        RolloutConfig,
        RunConfig,
        SFTConfig,
        check_grpo_options,
    )
    from grpo_core.config.plugins import load_plugin

_MODULES = {
    "fields": ("ConfigError", "ConfigSection", "check_value", "chosen_by", "option", "plugin_files"),
    "loader": ("load_config", "save_config", "to_dict"),
    "moved": ("MOVED_KEYS", "translate_saved_config"),
    "options": (
        "AlgorithmConfig",
        "GRPOConfig",
        "OptimConfig",
        "RolloutConfig",
        "RunConfig",
        "SFTConfig",
        "check_grpo_options",
    ),
    "plugins": ("load_plugin",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MOVED_KEYS",
    "AlgorithmConfig",
    "ConfigError",
    "ConfigSection",
    "GRPOConfig",
    "OptimConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "check_grpo_options",
    "check_value",
    "chosen_by",
    "load_config",
    "load_plugin",
    "option",
    "plugin_files",
    "save_config",
    "to_dict",
    "translate_saved_config",
]


def __getattr__(name: str) -> Any:
    # loaded on first use: `options` imports the losses, which are config sections themselves and import `fields`
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
