"""Import upstream AffectGPT checkpoints (`.pth`), whose tensor names correspond one to one to ours."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from affectgpt.modeling.affectgpt import AffectGPT
from grpo_core.errors import InputError

_OURS, _UPSTREAM = "llm.", "llama_model."
_FUSION = "fusion."


def to_upstream(name: str) -> str:
    """Translate our name of a trained tensor to upstream's: `llm.…` becomes `llama_model.…`, `fusion.` is dropped."""
    if name.startswith(_OURS):
        return _UPSTREAM + name.removeprefix(_OURS)
    if name.startswith(_FUSION):
        return name.removeprefix(_FUSION)
    raise InputError(f"{name} is not a tensor of an AffectGPT: expected a name that begins with {_OURS} or {_FUSION}")


def from_upstream(name: str) -> str:
    """Translate upstream's name of a trained tensor to ours; the inverse of `to_upstream`."""
    if name.startswith(_UPSTREAM):
        return _OURS + name.removeprefix(_UPSTREAM)
    return _FUSION + name


def upstream_state_dict(model: AffectGPT) -> dict[str, Tensor]:
    """Return the trained tensors under upstream's names: 392 LoRA and 20 projection tensors at upstream's sizes."""
    return {to_upstream(name): p.detach() for name, p in model.trainable_parameters().items()}


def load_upstream(model: AffectGPT, path: str | os.PathLike) -> None:
    """Copy the weights of an upstream checkpoint (`{"model": {name: tensor}, …}`) into `model`.

    The file is a pickle; it is read with `weights_only`, which runs no code from it.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: it is not such a checkpoint, or of another size than `model`; the message names the tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the path of an upstream checkpoint_*.pth")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint of tensors: {error}") from error
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} has no dict of tensors under the key 'model': it is not an AffectGPT checkpoint")
    model.load_trained({from_upstream(name): tensor for name, tensor in state.items()}, str(path))
