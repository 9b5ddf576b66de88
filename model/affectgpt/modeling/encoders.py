"""The frozen encoders: CLIP for frames and faces, HuBERT for sound, both from local folders in transformers' format."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModelWithProjection, HubertModel, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

_WEIGHT_FILES = ("*.safetensors", "*.bin")


class Encoders:
    """CLIP's image tower with its projection, and HuBERT. Frozen, in eval mode, without gradient.

    Every output row depends on its own input row alone, so samples may be encoded together in any grouping.

    Attributes:
        visual_dim: Dv, CLIP's projection width (768 for ViT-L/14).
        audio_dim: Da, HuBERT's hidden width (1024 for large).
        batch: rows sent through an encoder at a time.
    """

    def __init__(
        self,
        visual: CLIPVisionModelWithProjection,
        audio: HubertModel,
        image_processor: dict[str, Any] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 64,
    ) -> None:
        """`image_processor`: what CLIP's `preprocessor_config.json` holds; absent entries are CLIP's own defaults."""
        processor = image_processor or {}
        self.visual = _frozen(visual, device, dtype)
        self.audio = _frozen(audio, device, dtype)
        self.device, self.dtype, self.batch = torch.device(device), dtype, batch
        self.visual_dim: int = visual.config.projection_dim
        self.audio_dim: int = audio.config.hidden_size
        size: Any = visual.config.image_size
        self.image_size: int = size
        self._scale: float = processor.get("rescale_factor", 1 / 255)
        self._mean = torch.tensor(processor.get("image_mean", OPENAI_CLIP_MEAN), device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.get("image_std", OPENAI_CLIP_STD), device=device).view(1, 3, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        visual_folder: str | Path,
        audio_folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 64,
    ) -> Encoders:
        """Load from local folders; nothing is downloaded.

        Args:
            visual_folder: a whole CLIP (`CLIPModel`) or its image half (`CLIPVisionModelWithProjection`).
            audio_folder: `HubertModel`, or a model with a head around it.

        Raises:
            ValueError: a folder that is missing, holds another kind of model, or lacks some of its weights.
        """
        visual = _load(visual_folder, "CLIP", ("clip", "clip_vision_model"), CLIPVisionModelWithProjection)
        audio = _load(audio_folder, "HuBERT", ("hubert",), HubertModel)
        processor_file = Path(visual_folder) / "preprocessor_config.json"
        processor = json.loads(processor_file.read_text("utf-8")) if processor_file.is_file() else None
        return cls(visual, audio, processor, device=device, dtype=dtype, batch=batch)

    @torch.inference_mode()
    def encode_frames(self, frames: np.ndarray | Tensor) -> Tensor:
        """Images uint8 RGB `[T, H, W, 3]` → projected image embeddings, not normalised: float32 `[T, Dv]` on the CPU.

        CLIP's processor: to its image size (bicubic, antialiased; 224 × 224 input goes in untouched for ViT-L/14),
        rescaled, mean and deviation of its training set.
        """
        features = []
        for rows in torch.as_tensor(frames).split(self.batch):
            pixels = rows.to(self.device).permute(0, 3, 1, 2).float()
            if pixels.shape[-2:] != (self.image_size, self.image_size):
                pixels = _to_square(pixels, self.image_size)
            pixels = (pixels * self._scale - self._mean) / self._std
            features.append(self.visual(pixel_values=pixels.to(self.dtype)).image_embeds.float().cpu())
        return torch.cat(features)

    @torch.inference_mode()
    def encode_audio(self, clips: np.ndarray | Tensor) -> Tensor:
        """Normalised sound at 16 kHz, float32 `[N, 32000]` → float32 `[N, Da]` on the CPU, one vector a clip.

        Mean of the last four hidden states, then over time. The very last is taken after HuBERT's closing layer norm,
        as transformers gave it when AffectGPT was trained: since 5.x `hidden_states[-1]` of a pre-norm HuBERT (the
        large ones) comes from before it.
        """
        features = []
        for rows in torch.as_tensor(clips).split(self.batch):
            output = self.audio(rows.to(self.device, self.dtype), output_hidden_states=True)
            last_four = torch.stack([*output.hidden_states[-4:-1], output.last_hidden_state])
            features.append(last_four.float().mean(dim=(0, 2)).cpu())
        return torch.cat(features)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what the outputs depend on: architecture, image processing, precision and every weight.

        Weights are hashed by content as loaded, so that a copied folder, or the same model stored in another format,
        keeps its cache, and an edited one does not; about a second per gigabyte, once.
        """
        digest = hashlib.sha256()
        settings: list[Any] = [
            str(self.dtype),
            self._scale,
            self._mean.tolist(),
            self._std.tolist(),
        ]
        for model in (self.visual, self.audio):
            config = model.config.to_dict()
            settings.append({name: config[name] for name in _BEHAVIOUR if name in config})
        digest.update(json.dumps(settings).encode())
        for model in (self.visual, self.audio):
            for name, weight in sorted(model.state_dict().items()):
                digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


# config entries that change the outputs and cannot be seen in the weights
_BEHAVIOUR = (
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "patch_size",
    "image_size",
    "conv_stride",
    "conv_kernel",
    "num_conv_pos_embedding_groups",
    "do_stable_layer_norm",
    "feat_extract_norm",
    "feat_extract_activation",
    "feat_proj_layer_norm",
    "conv_pos_batch_norm",
)


def _frozen(model: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model in its place and precision, in eval mode, without gradients."""
    return model.to(device, dtype).eval().requires_grad_(False)


def _to_square(pixels: Tensor, size: int) -> Tensor:
    """As CLIP's processor: shortest edge to `size`, bicubic, values kept in 0..255, then the centre square."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, int(height * scale)), max(size, int(width * scale)))
    pixels = torch.nn.functional.interpolate(pixels, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def _load(folder: str | Path, kind: str, model_types: tuple[str, ...], model_class: type[PreTrainedModel]) -> Any:
    """Load `model_class` from `folder`, refusing other models and weights that do not fill it."""
    folder = Path(folder)
    fix = f"Give the folder of a {kind} checkpoint as save_pretrained writes it"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there. {fix}.")
    if not any(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)):
        raise ValueError(f"{folder}: no weights there (model.safetensors). {fix}.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: config.json cannot be read ({error}). {fix}.") from error
    if config.model_type not in model_types:
        raise ValueError(f"{folder}: it holds a model of type {config.model_type!r}, not {kind}. {fix}.")
    if config.model_type == "clip":  # a whole CLIP: its image half, with the outer config's projection width
        projection_dim, config = config.projection_dim, config.vision_config
        config.projection_dim = projection_dim

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the text half of a CLIP is left out on purpose; no need to list its weights
    try:
        loaded: Any = model_class.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
    except (RuntimeError, OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{folder}: its weights do not load ({error}). {fix}.") from error
    finally:
        logging.set_verbosity(verbosity)
    for name, stored, expected in info["mismatched_keys"]:
        raise ValueError(f"{folder}: {name} is {list(stored)}, but config.json asks for {list(expected)}. {fix}.")
    missing = sorted(set(info["missing_keys"]) - {"masked_spec_embed"})  # that one is for HuBERT's pre-training alone
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]!r} first. {fix}.")
    return model
