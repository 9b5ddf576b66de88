"""Load models and tokenizers from local folders, refusing what would be silently wrong: parts missing, code to run.

transformers draws missing weights at random, and makes an empty tokenizer where the files lack one; both train without
an error. Every loader of this project goes through `load_model` and `load_tokenizer`, which refuse these in one
sentence. Nothing is downloaded, and no code that a folder brings is run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_core.errors import InputError
from grpo_core.model_folder import ADAPTER_CONFIG, AS_SAVED, check_folder, is_adapter

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments for every `from_pretrained`: no network, no code from the folder. Left out, transformers asks at a terminal
whether to run the code, and runs it after a "y"."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_COPY = "copy the folder again, whole"


def read_config(folder: str | os.PathLike, key: str) -> PreTrainedConfig:
    """Read a model's config.json.

    Raises:
        InputError: the folder is refused (`check_folder`), the file is damaged, or the model needs code of its own.
    """
    path = check_folder(folder, key)
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {path}/config.json cannot be read ({one_line(error)}): {_COPY}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{key}: {path}/config.json holds no model's config: {_COPY}")
    # a name with a slash makes transformers fetch a kernel of that name from the Hub and run it
    for name, value in _entries(raw):
        if name.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            raise InputError(
                f"{key}: {path}/config.json sets {name} to {value!r}, which is code from the Hugging Face Hub and is "
                "never run: remove the line"
            )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **LOCAL)
    # Exception: config classes raise what they like (huggingface_hub's StrictDataclassError is no ValueError)
    except Exception as error:
        model_type = raw.get("model_type")
        if "auto_map" in raw:
            raise InputError(
                f"{key}: a model of type {model_type!r} needs code from its folder {path} (auto_map in config.json), "
                "which is never run: use a model of a type that transformers knows"
            ) from error
        raise InputError(
            f"{key}: {path}/config.json cannot be read, model type {model_type!r} ({one_line(error)}): use a model of "
            "a type that this release of transformers knows, with the config.json that it came with"
        ) from error
    return config


def check_weights(folder: str | os.PathLike, key: str, *, pickled: bool = False) -> list[Path]:
    """Check that a model's weight files are all there and whole, by their headers alone; return their paths.

    Args:
        pickled: also accept `pytorch_model.bin`, which is then read with `weights_only`, so that no code in it runs.

    Raises:
        InputError: no weights, a missing or a damaged file.
    """
    path = Path(folder)
    for name in ("model.safetensors", *(("pytorch_model.bin",) if pickled else ())):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            files = [path / name]
        elif index.is_file():
            try:
                files = [
                    path / shard for shard in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
                ]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{key}: {index} cannot be read ({one_line(error)}): {_COPY}") from error
        else:
            continue
        for file in files:
            check_weight_file(file, key)
        return files
    others = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for file in path.glob(pattern))
    if others:
        raise InputError(
            f"{key}: {path} has its weights in {others[0]}, but only safetensors are read: load it once with "
            "transformers, and save it again with save_pretrained"
        )
    raise InputError(f"{key}: {path} has no weights (model.safetensors): {AS_SAVED}")


def check_weight_file(file: Path, key: str) -> None:
    """Check by its header that a file of weights is whole.

    Raises:
        InputError: it is missing, cut off, or only the pointer that git leaves where Git LFS was not installed.
    """
    if not file.is_file():
        raise InputError(f"{key}: {file} is missing: {_COPY}")
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{key}: {file} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{key}: {file} is damaged ({one_line(error)}): copy it again") from error


def load_model(
    model_class: Any,
    folder: str | os.PathLike,
    key: str,
    *,
    config: PreTrainedConfig | None = None,
    probe: Callable[[Any], Tensor] | None = None,
    pickled: bool = False,
    **options: Any,
) -> Any:
    """Load a model in eval mode, refusing a folder that lacks a parameter which the run's forward uses.

    Args:
        model_class: a class or auto class of transformers.
        folder: local folder of config and weights.
        key: the option that names the folder, for messages.
        config: replaces the folder's.
        probe: runs the forward that the run will make, on as little input as it takes, and returns its output. It is
            asked only where parameters are in no file: those that its output does not depend on may be missing (an
            image branch, a mask embedding of pre-training). None: every parameter counts as used.
        pickled: as in `check_weights`.
        options: for `from_pretrained`.

    Raises:
        InputError: the folder, its config or its weights are refused; the message names the tensor.
    """
    path = check_folder(folder, key)
    if config is None:
        config = read_config(path, key)
    if (path / ADAPTER_CONFIG).is_file():
        # transformers would load the adapter's base instead, and put the adapter into it
        raise InputError(
            f"{key}: {path} holds a whole model and an adapter ({ADAPTER_CONFIG}): move one of them to another folder"
        )
    check_weights(path, key, pickled=pickled)
    try:
        model, info = model_class.from_pretrained(
            path,
            config=config,
            use_safetensors=None if pickled else True,
            ignore_mismatched_sizes=True,  # reported by name below; transformers' error only points to its log
            output_loading_info=True,
            **LOCAL,
            **options,
        )
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = one_line(error)
        if "conversion of the weights" in reason:  # transformers names the tensors in its log only
            reason = "tensors that are joined when they are loaded, such as a layer's experts, are missing or misshapen"
        raise InputError(
            f"{key}: {path}, a model of type {config.model_type!r}, does not load ({reason}): {AS_SAVED}"
        ) from error
    if info["mismatched_keys"]:
        name, found, needed = min(info["mismatched_keys"], key=lambda item: item[0])
        raise InputError(
            f"{key}: the weights in {path} do not fit its config.json: {name} is {list(found)}, the config says "
            f"{list(needed)}: {_COPY}"
        )
    if missing := sorted(missing_parameters(model, info["missing_keys"], probe)):
        raise InputError(
            f"{key}: the weights in {path} lack {len(missing)} tensors that a model of type {config.model_type!r} "
            f"needs, first {missing[0]}: {_COPY}"
        )
    return model


def missing_parameters(model: nn.Module, names: set[str], probe: Callable[[Any], Tensor] | None) -> set[str]:
    """Return those of the `names` that are in no file which hold a parameter that the probed forward uses.

    A parameter is used if the probe's output has a gradient with respect to it. An expert of a mixture is used by some
    tokens only: where another member of its `ModuleList` is used, it counts as used too. Buffers are computed, not
    loaded, but for the running statistics of a batch norm.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    missing = parameters.keys() | {name for name in names if name.endswith(("running_mean", "running_var"))}
    if not parameters or probe is None:
        return missing
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(True)
        output = probe(model).float().sum()
        gradients = torch.autograd.grad(output, list(model.parameters()), allow_unused=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
        return missing  # the forward needs more than the probe gives: nothing is known to be unused
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
    used_ids = {id(p) for p, g in zip(model.parameters(), gradients, strict=True) if g is not None}
    used = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in used_ids}
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    mixed = tuple(f"{name}." for name in lists if any(other.startswith(f"{name}.") for other in used))
    return {name for name in missing if name not in parameters or name in used or name.startswith(mixed or ("\0",))}


def probe_text(model: Any) -> Tensor:
    """Run a causal LM over two tokens, as a `probe` of `load_model`; returns the logits."""
    logits: Tensor = model(input_ids=torch.tensor([[0, 1]]), use_cache=False).logits
    return logits


def load_causal_lm(folder: str | os.PathLike, key: str, **options: Any) -> PreTrainedModel | PeftModel:
    """Load a causal LM or, from an adapter's folder, its base with the adapter in it, ready to be trained on.

    Args:
        folder: of a model, or of an adapter in PEFT's format whose base is in a local folder.
        key: the option that names the folder, for messages.
        options: for the model's `from_pretrained`, such as `dtype`.

    Raises:
        InputError: the folder is refused, or the adapter's base.
    """
    # absolute: an adapter saved later names this folder, and may be loaded from another working directory
    path = Path(os.path.abspath(folder))
    if not is_adapter(path):
        check_folder(folder, key)
        model: PreTrainedModel = load_model(AutoModelForCausalLM, path, key, probe=probe_text, **options)
        return model
    config, base_folder = read_adapter(path, key)
    base = load_model(
        AutoModelForCausalLM, base_folder, f"{key} (base of the adapter {path})", probe=probe_text, **options
    )
    config.base_model_name_or_path = str(base_folder)
    config.inference_mode = False
    try:
        adapted: PeftModel = PeftModel.from_pretrained(base, path, config=config, is_trainable=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{key}: the adapter in {path} does not fit its base ({one_line(error)}): {_COPY}") from error
    with safe_open(path / _ADAPTER_WEIGHTS, "pt") as file:
        stored = set(file.keys())
    # PEFT only warns, and leaves fresh weights where the file has none
    if missing := sorted(get_peft_model_state_dict(adapted).keys() - stored):
        raise InputError(
            f"{key}: {path / _ADAPTER_WEIGHTS} lacks {len(missing)} tensors of its adapter, first {missing[0]}: {_COPY}"
        )
    return adapted


def read_adapter(folder: str | os.PathLike, key: str) -> tuple[PeftConfig, Path]:
    """Read an adapter's config, and find its base.

    Raises:
        InputError: the config is damaged, the weights are, the base is no local folder, or the adapter is of a kind
            that is not a change of the model's weights (prompt tuning).
    """
    path = Path(folder)
    try:
        config = PeftConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{key}: {path / ADAPTER_CONFIG} cannot be read ({one_line(error)}): {_COPY}") from error
    if config.is_prompt_learning:
        raise InputError(f"{key}: {path} holds an adapter of type {config.peft_type}: only LoRA's kind is trained")
    check_weight_file(path / _ADAPTER_WEIGHTS, key)
    named = config.base_model_name_or_path or ""
    candidates = [Path(named), path / named] if named else []
    base = next((base for base in candidates if (base / "config.json").is_file()), None)
    if base is None:
        raise InputError(
            f"{key}: {path} holds an adapter of {named!r}, and there is no such folder: write the folder of its base "
            f"as base_model_name_or_path into {path / ADAPTER_CONFIG}"
        )
    return config, Path(os.path.abspath(base))


def load_tokenizer(folder: str | os.PathLike, key: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder or, if an adapter's folder has none, that of its base.

    Raises:
        InputError: there is none, or it is damaged, or needs code from the folder.
    """
    path = Path(folder)
    if is_adapter(path):
        path = path if _has_tokenizer(path) else read_adapter(path, key)[1]
    else:
        read_config(path, key)  # for its messages: transformers' tokenizer loader reads the config too
    if not _has_tokenizer(path):
        raise InputError(
            f"{key}: {path} holds no tokenizer: save it there too (tokenizer.save_pretrained), or copy tokenizer.json "
            "and tokenizer_config.json from the model that it was made of"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **LOCAL)
    # Exception: the parser of tokenizer.json, written in Rust, raises no narrower class
    except Exception as error:
        raise InputError(f"{key}: the tokenizer in {path} does not load ({one_line(error)}): {_COPY}") from error
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern))


def save_model(model: Any, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a model as `save_pretrained` does, its floating-point weights in `dtype`.

    Adapters are written as they are: they are small, and their float32 is what was trained.

    Args:
        dtype: None keeps the weights' own.
    """
    if dtype is None or isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    # tied weights are one tensor under two names: converted once, or each would be written
    converted: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        same = (tensor.data_ptr(), tensor.shape)
        state[name] = converted.setdefault(same, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model.save_pretrained(folder, state_dict=state)
    # save_pretrained writes the dtype of the weights in memory into the config, which the next loader believes
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_dtype(folder: str | os.PathLike, key: str) -> torch.dtype:
    """Return the dtype of a checkpoint: its config's or, where that names none, that of its first tensor of floats."""
    path = Path(folder)
    dtype = read_config(path, key).dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    for file in check_weights(path, key):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point():
                    return tensor.dtype
    return torch.float32


def one_line(error: BaseException) -> str:
    """Return an error's first sentence, without line breaks, for a message of one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0].rstrip(".:")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Walk the entries of nested JSON objects."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _entries(inner)
