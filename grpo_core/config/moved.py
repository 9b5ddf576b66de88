"""Map option keys that moved to their new keys, and translate configs that were saved before the move."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING
from typing import Any

from grpo_core.config.fields import options

MOVED_KEYS: dict[str, str] = {
    "algorithm.epsilon": "algorithm.loss.epsilon",
    "algorithm.epsilon_high": "algorithm.loss.epsilon_high",
    "algorithm.delta": "algorithm.loss.delta",
    "algorithm.cispo_cap": "algorithm.loss.cispo_cap",
    "algorithm.sapo_temperature_pos": "algorithm.loss.temperature_pos",
    "algorithm.sapo_temperature_neg": "algorithm.loss.temperature_neg",
    "run.tensorboard": "run.trackers",
}
"""Old key → new key. A package with options of its own adds to it where it declares them: `MOVED_KEYS.update(...)`."""


def translate_saved_config(saved: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Translate a config that an earlier version saved to the form of today's `to_dict`, so that both can be compared.

    Moved keys go to their new places; an option of an entry that the config does not choose is dropped, as it had no
    effect. Options that the earlier version did not have get today's default, with which they behave as before.

    Args:
        saved: nested dicts as `yaml.safe_load` reads them from a run's `config.yaml`; not changed.
        cls: the config's dataclass.
    """
    from grpo_core.config.loader import to_dict  # the loader imports MOVED_KEYS from here

    result = deepcopy(dict(saved))
    if _get(result, "run.tensorboard") is not MISSING:  # it was true or false
        _put(result, "run.tensorboard", ["tensorboard"] * bool(_get(result, "run.tensorboard")))
    # taken out here, and put back below only if the chosen entry has the option
    moved = {new: _pop(result, old) for old, new in MOVED_KEYS.items() if _get(result, old) is not MISSING}
    names = {
        key: name
        for key, option in options(cls).items()
        if option.selects and isinstance(name := _get(result, key), str) and name in option.choices
    }
    # keys that today's classes lack are left in, so that a comparison shows them
    for key, option in options(cls, names).items():
        if _get(result, key) is MISSING:
            value = moved.get(key, MISSING)
            if value is MISSING and option.default is not MISSING:
                value = to_dict(option.default)
            if value is not MISSING:
                _put(result, key, value)
    return result


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name, MISSING) if isinstance(tree, dict) else MISSING
    return tree


def _pop(tree: dict[str, Any], key: str) -> Any:
    parent, _, leaf = key.rpartition(".")
    return (_get(tree, parent) if parent else tree).pop(leaf)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[leaf] = value
