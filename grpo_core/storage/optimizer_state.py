"""Convert an optimiser's state to named tensors and plain options, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grpo_core.errors import InputError

NamedParameters = Iterable[tuple[str, Tensor]]


def flatten_optimizer(
    optimizer: Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split an optimiser's state into named tensors and JSON-serialisable groups.

    Args:
        named_parameters: name and parameter of at least everything that the optimiser holds.

    Returns:
        tensors: `<parameter name>/<state name>`, e.g. `fusion.weight/exp_avg`; none for a parameter that has had no
            step.
        groups: for each parameter group its options (learning rate, betas, …) and its parameters' names and shapes.

    Raises:
        ValueError: a parameter has no name.
    """
    # tensors hash by identity, so this finds the very parameter that the optimiser holds
    names = {parameter: name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(f"named_parameters lacks an optimised parameter of shape {list(parameter.shape)}")
            # get: the state is a defaultdict, in which a lookup by [] would make an entry
            for state_name, value in optimizer.state.get(parameter, {}).items():
                # as_tensor: some optimisers count steps in a plain int; safetensors stores contiguous tensors only
                tensors[f"{names[parameter]}/{state_name}"] = torch.as_tensor(value).detach().contiguous()
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        groups.append(
            {
                # a learning rate is a tensor where the optimiser's step is captured in a CUDA graph
                "options": {name: v.item() if isinstance(v, Tensor) else v for name, v in options.items()},
                "parameters": _names_and_shapes(group["params"], names),
            }
        )
    return tensors, groups


def restore_optimizer(
    optimizer: Optimizer,
    named_parameters: NamedParameters,
    tensors: dict[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Undo `flatten_optimizer`, bit for bit: dtypes stay as saved, which `Optimizer.load_state_dict` does not promise.

    Raises:
        InputError: names, shapes, groups or order of the parameters differ; the optimiser is then unchanged.
    """
    names = {parameter: name for name, parameter in named_parameters}
    _require_same_parameters(
        [group["parameters"] for group in groups],
        [_names_and_shapes(group["params"], names) for group in optimizer.param_groups],
    )
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, state_name = key.rpartition("/")  # from the right: a parameter's name may hold a slash
        states.setdefault(name, {})[state_name] = tensor
    # a parameter without saved state must have none afterwards either: AdamW then starts its moments and step count
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for option, value in saved["options"].items():
            # JSON has turned tuples, such as AdamW's betas, into lists
            group[option] = tuple(value) if isinstance(value, list) else value
        # AdamW keeps `step` on the host, where reading it does not wait for the GPU, except in these two modes
        counts_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            state = states.get(names[parameter], {})
            moved = {k: v if k == "step" and not counts_on_device else v.to(parameter.device) for k, v in state.items()}
            if moved:  # no entry for a parameter that has had no step, as before the save
                optimizer.state[parameter] = moved


def _names_and_shapes(parameters: Iterable[Tensor], names: dict[Tensor, str]) -> list[list]:
    return [[names.get(parameter, "(unnamed)"), list(parameter.shape)] for parameter in parameters]


def _require_same_parameters(saved: list[list[list]], present: list[list[list]]) -> None:
    """Compare the lists of (name, shape), group by group."""
    # order counts too: gradient norms are summed in it, so another order would round differently from here on
    if saved == present:
        return
    was, now = ({name: shape for group in side for name, shape in group} for side in (saved, present))
    differing = [
        f"{name} is {was.get(name, 'absent')} in the checkpoint and {now.get(name, 'absent')} here"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    if not differing:
        raise InputError("the optimiser's groups hold the same parameters in another order or grouping")
    # four at most: a wrong LoRA rank differs in hundreds of matrices
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise InputError(f"{'; '.join(differing[:4])}{more}. Resume with the configuration it was trained with")
