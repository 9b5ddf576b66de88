"""Define `AffectGPT`: an LLM with LoRA adapters whose prompts contain fusion vectors of video, audio and images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from affectgpt.modeling.fusion import Fusion, FusionInput
from affectgpt.prompts import PLACEHOLDERS, placeholder_features
from grpo_core.errors import InputError
from grpo_core.pretrained import check_weight_file, load_model, load_tokenizer, probe_text, read_config
from grpo_core.storage.files import write_file, write_text
from grpo_core.types import Prompt

CONFIG_FILE = "affectgpt.json"
WEIGHTS_FILE = "affectgpt.safetensors"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AffectGPTConfig:
    """Contents of `affectgpt.json`. In memory the three folders are absolute paths.

    Attributes:
        llm: folder of the base LLM and its tokenizer; never written to.
        visual_encoder: folder of a CLIP vision model with projection.
        audio_encoder: folder of a HuBERT.
        visual_dim, audio_dim, hidden_size: widths of the encoders' outputs and of the LLM.
        lora_r, lora_alpha, lora_dropout, lora_targets: as in `peft.LoraConfig`.
    """

    llm: str
    visual_encoder: str
    audio_encoder: str
    visual_dim: int
    audio_dim: int
    hidden_size: int
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = LORA_TARGETS

    @classmethod
    def load(cls, folder: str | os.PathLike) -> AffectGPTConfig:
        """Read `folder/affectgpt.json`; relative folders in it are relative to `folder`.

        Raises:
            InputError: the folder holds no AffectGPT, or the file is damaged.
        """
        path = Path(folder).resolve() / CONFIG_FILE
        if not Path(folder).is_dir():
            raise InputError(
                f"model.path: there is no folder {folder}: give one that AffectGPT.save_pretrained wrote; nothing is "
                "downloaded"
            )
        if not path.is_file():
            llm = (path.parent / "config.json").is_file()
            advice = (
                "if it is a causal LM, give it as model.llm" if llm else "give one that AffectGPT.save_pretrained wrote"
            )
            raise InputError(f"model.path: {path} is missing, so {folder} holds no AffectGPT: {advice}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: {path} is not valid JSON ({error}): save the model again") from error
        if not isinstance(values, dict):
            raise InputError(f"model.path: {path} is no config of an AffectGPT: save the model again")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if unknown := sorted(values.keys() - fields.keys()):
            raise InputError(f"model.path: {path} has unknown keys {', '.join(unknown)}: known are {', '.join(fields)}")
        if missing := sorted(required - values.keys()):
            raise InputError(f"model.path: {path} lacks {', '.join(missing)}: save the model again")
        for name in ("llm", "visual_encoder", "audio_encoder"):
            # an absolute path replaces `path.parent`; normpath and not resolve, which would follow symbolic links
            values[name] = os.path.normpath(path.parent / values[name])
        if "lora_targets" in values:
            values["lora_targets"] = tuple(values["lora_targets"])  # a list in JSON, and lists are not hashable
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Write `folder/affectgpt.json` atomically.

        Folders inside the parent of `folder` are written relative to `folder`, so that the tree can be moved as a
        whole; others are written as absolute paths.
        """
        values = dataclasses.asdict(self)
        folder = folder.resolve()
        for name in ("llm", "visual_encoder", "audio_encoder"):
            if Path(values[name]).is_relative_to(folder.parent):
                values[name] = os.path.relpath(values[name], folder)
        write_text(folder / CONFIG_FILE, json.dumps(values, indent=2) + "\n")


class AffectGPT(nn.Module):
    """LLM with LoRA and fusion. The encoders are in `modeling.encoders`: a prompt's features are their outputs.

    The trained tensors, LoRA and fusion, are float32 whatever the dtype of the base LLM; the base is frozen.

    Args:
        config: sizes, adapter settings, and the folders of the frozen models.
        base: the causal LM, before any adapter.
        tokenizer: the LLM's tokenizer; the five placeholder tokens are added to it if it lacks them. The LLM's
            embeddings are not resized, as `embed` looks up no row for placeholders.

    Attributes:
        llm: `peft.PeftModel` around `base`, adapter `default`.
        fusion: the projections.
        tokenizer: the tokenizer with placeholders.
        config: the argument.
    """

    def __init__(self, config: AffectGPTConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        if base.config.hidden_size != config.hidden_size:
            raise InputError(
                f"the LLM in {config.llm} has hidden size {base.config.hidden_size}, but this model was made for "
                f"{config.hidden_size}: give the folder of the LLM it was trained with as llm="
            )
        self.config = config
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_targets),
            task_type="CAUSAL_LM",
        )
        # autocast_adapter_dtype: LoRA in float32, where AdamW's small updates do not vanish in bfloat16's rounding
        self.llm: PeftModel = get_peft_model(base, lora, adapter_name="default", autocast_adapter_dtype=True)
        self.fusion = Fusion(config.visual_dim, config.audio_dim, config.hidden_size).float()
        self.tokenizer = tokenizer
        add_placeholders(tokenizer)  # before the ids are looked up in the next line
        self._placeholder_of = {tokenizer.convert_tokens_to_ids(token): token for token in PLACEHOLDERS}

    @classmethod
    def create(
        cls,
        llm: str | os.PathLike,
        visual_encoder: str | os.PathLike,
        audio_encoder: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        attn_implementation: str = "sdpa",
        **lora: Any,
    ) -> AffectGPT:
        """Make a model with fresh LoRA and fusion weights, drawn from the global torch generator, over local folders.

        Args:
            llm, visual_encoder, audio_encoder: Hugging Face model folders (config and safetensors).
            device: device of all weights.
            dtype: dtype of the base LLM; `auto` keeps the checkpoint's.
            attn_implementation: attention of the base LLM, as transformers names it.
            lora: `lora_r`, `lora_alpha`, `lora_dropout`, `lora_targets`.

        Raises:
            InputError: a folder is missing, incomplete, or holds another type of model.
        """
        # widths from the configs: the encoders' weights are not loaded here, they only fill the feature cache
        config = AffectGPTConfig(
            llm=os.path.abspath(llm),
            visual_encoder=os.path.abspath(visual_encoder),
            audio_encoder=os.path.abspath(audio_encoder),
            visual_dim=_config_value(visual_encoder, "projection_dim", "CLIP vision model", "model.visual_encoder"),
            audio_dim=_config_value(audio_encoder, "hidden_size", "HuBERT", "model.audio_encoder"),
            hidden_size=_config_value(llm, "hidden_size", "causal LM", "model.llm"),
            **lora,
        )
        return cls._over_base(config, device, dtype, attn_implementation)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        attn_implementation: str = "sdpa",
        llm: str | os.PathLike | None = None,
        visual_encoder: str | os.PathLike | None = None,
        audio_encoder: str | os.PathLike | None = None,
    ) -> AffectGPT:
        """Load a model that `save_pretrained` wrote, in eval mode.

        Args:
            folder: folder with `affectgpt.json` and `affectgpt.safetensors`.
            device, dtype, attn_implementation: as in `create`.
            llm, visual_encoder, audio_encoder: current folders of the frozen models, if they were moved.

        Raises:
            InputError: a file of `folder` is missing or damaged, or the base LLM is.
            InputError: a file holds tensors of another model.
        """
        config = AffectGPTConfig.load(folder)
        folders = {"llm": llm, "visual_encoder": visual_encoder, "audio_encoder": audio_encoder}
        moved: dict[str, Any] = {name: os.path.abspath(path) for name, path in folders.items() if path is not None}
        config = dataclasses.replace(config, **moved)
        weights = Path(folder) / WEIGHTS_FILE
        check_weight_file(weights, "model.path")  # before the LLM, whose loading takes minutes: damage shows at once
        state = load_file(weights)
        model = cls._over_base(config, device, dtype, attn_implementation)
        model.load_trained(state, str(weights))
        return model.eval()

    @classmethod
    def _over_base(
        cls, config: AffectGPTConfig, device: torch.device | str, dtype: torch.dtype | str, attn_implementation: str
    ) -> AffectGPT:
        tokenizer = load_tokenizer(config.llm, "model.llm")  # before the LLM, whose loading takes minutes
        base = load_llm(config.llm, dtype, attn_implementation)
        return cls(config, base, tokenizer).to(device)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `affectgpt.json` and `affectgpt.safetensors` (LoRA and fusion); the frozen models are not copied.

        Each file is replaced atomically, and every weight is in one file, so an interrupted save leaves the previous
        model intact. `model.llm.save_pretrained(folder)` writes the adapter alone, in PEFT's format.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.detach().cpu().contiguous() for name, p in self.trainable_parameters().items()}
        write_file(folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
        self.config.save(folder)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name in the module: LoRA of adapter `default`, and fusion."""
        # by name and not by requires_grad, which a caller may switch; of `default` only, whatever adapters were added
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("fusion.") or (".lora_" in name and ".default." in name)
        }

    def load_trained(self, state: Mapping[str, Tensor], source: str) -> None:
        """Copy `state` into the trainable parameters.

        Args:
            state: exactly one tensor for each name of `trainable_parameters()`.
            source: file that it was read from, for messages.

        Raises:
            InputError: names or shapes differ; nothing was copied.
        """
        # all checks come before the first copy: a model of mixed weights would be worse than none
        parameters = self.trainable_parameters()
        if missing := [name for name in parameters if name not in state]:
            raise InputError(
                f"{source} lacks {len(missing)} of the {len(parameters)} tensors this model needs, first {missing[0]}: "
                "the LLM's layers and lora_targets must be those it was saved with"
            )
        if unexpected := [name for name in state if name not in parameters]:
            raise InputError(
                f"{source} holds {len(unexpected)} tensors that this model lacks, first {unexpected[0]}: "
                "the LLM's layers and lora_targets must be those it was saved with"
            )
        for name, parameter in parameters.items():
            if state[name].shape != parameter.shape:
                raise InputError(
                    f"{source}: {name} is {list(state[name].shape)}, but this model needs {list(parameter.shape)}: "
                    f"the LLM, encoders and lora_r must be those it was saved with (sizes are in {CONFIG_FILE})"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base LLM, and of the embeddings that `embed` returns."""
        return self.embed_tokens.weight.dtype

    @property
    def embed_tokens(self) -> nn.Embedding:
        base: Any = self.llm.get_base_model()
        return base.get_input_embeddings()

    def embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Embed prompts for the LLM: `[P_n, H]` each, in its dtype, differentiable with respect to the fusion weights.

        Rows of ordinary tokens are token embeddings; rows of placeholders are fusion vectors of the prompt's features.
        One embedding look-up and one fusion call serve all prompts.

        Raises:
            InputError: a placeholder appears twice or lacks its feature, or a feature lacks its placeholder or has the
                wrong shape; the message names the prompt and the feature.
        """
        token_ids: list[int] = []
        rows: list[int] = []
        inputs: list[FusionInput] = []
        for prompt in prompts:
            found: dict[str, int] = {}
            for row, token in enumerate(prompt.token_ids, start=len(token_ids)):
                if (placeholder := self._placeholder_of.get(token)) is not None:
                    if placeholder in found:
                        raise InputError(
                            f"prompt {prompt.id!r} has {placeholder} more than once: a prompt has one vector for each"
                        )
                    found[placeholder] = row
            inputs += self._fusion_inputs(prompt, tuple(found))
            rows += found.values()
            # placeholder ids may lie beyond the LLM's embedding table; row 0 is looked up instead, and replaced below
            token_ids += [0 if token in self._placeholder_of else token for token in prompt.token_ids]
        embeds = self.embed_tokens(torch.tensor(token_ids, device=self.device))
        if inputs:
            vectors = self.fusion(inputs).to(embeds.dtype)  # fused in float32, see `Fusion`
            embeds = embeds.index_copy(0, torch.tensor(rows, device=self.device), vectors)
        return list(embeds.split([len(prompt.token_ids) for prompt in prompts]))

    def _fusion_inputs(self, prompt: Prompt, placeholders: Sequence[str]) -> list[FusionInput]:
        """Make one fusion input per placeholder, in order, from the prompt's features."""
        inputs: list[FusionInput] = []
        used: set[str] = set()
        for placeholder in placeholders:
            names = placeholder_features(placeholder, prompt.features)
            used.update(names)
            for name in names:
                self._check_feature(prompt, placeholder, name)
            features = {"audio" if name == "audio" else "visual": prompt.features[name] for name in names}
            inputs.append(FusionInput(PLACEHOLDERS[placeholder], **features))
        # refused, since a model that silently ignores a modality trains without an error
        if unused := sorted(prompt.features.keys() - used):
            raise InputError(
                f"prompt {prompt.id!r} has features {', '.join(unused)} but no placeholder token for them: "
                "make it with build_prompt and this model's tokenizer"
            )
        return inputs

    def _check_feature(self, prompt: Prompt, placeholder: str, name: str) -> None:
        width = self.config.audio_dim if name == "audio" else self.config.visual_dim
        if name not in prompt.features:
            raise InputError(
                f"prompt {prompt.id!r} has {placeholder} but no {name!r} feature: extract it, or choose a "
                "face_or_frame without it"
            )
        shape = tuple(prompt.features[name].shape)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != width:
            raise InputError(
                f"prompt {prompt.id!r}: feature {name!r} has shape {list(shape)}, but the model reads [T, {width}]: "
                "extract it with the encoders the model was made with"
            )


def add_placeholders(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the placeholder tokens that a tokenizer lacks, as special tokens in upstream's order."""
    known = tokenizer.get_vocab()
    tokens = [AddedToken(t, special=True, normalized=False) for t in PLACEHOLDERS if t not in known]
    # special: never split, and left out when completions are decoded
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)


def load_llm(
    folder: str | os.PathLike, dtype: torch.dtype | str, attn_implementation: str, key: str = "model.llm"
) -> PreTrainedModel:
    """Load a causal LM from a local folder of safetensors, refusing one that lacks weights.

    Raises:
        InputError: the folder, its config or its weights are refused; see `grpo_core.pretrained.load_model`.
    """
    model: PreTrainedModel = load_model(
        AutoModelForCausalLM, folder, key, probe=probe_text, dtype=dtype, attn_implementation=attn_implementation
    )
    return model


def _config_value(folder: str | os.PathLike, name: str, what: str, key: str) -> int:
    config = read_config(folder, key)
    if not hasattr(config, name):
        raise InputError(
            f"{key}: {folder}/config.json is of model type {config.model_type!r} and has no {name}: need a {what}"
        )
    value: int = getattr(config, name)
    return value
