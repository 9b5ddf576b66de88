"""Run the frozen encoders: CLIP for frames and faces, HuBERT for sound, from local folders in transformers' format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, HubertModel, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from grpo_core.errors import InputError
from grpo_core.pretrained import load_model, read_config


class Encoders:
    """CLIP's image tower with its projection, and HuBERT, both frozen and in eval mode.

    Every output row depends only on the same input row, so samples may be batched in any way.

    Attributes:
        visual_dim: Dv, CLIP's projection width (768 for ViT-L/14).
        audio_dim: Da, HuBERT's hidden width (1024 for large).
        batch: rows per forward pass of an encoder.
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
        """Freeze the encoders; entries absent in `image_processor` (`preprocessor_config.json`) are CLIP's defaults."""
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
            InputError: a folder is missing, holds another type of model, or lacks some of its weights.
        """
        visual = _load(
            visual_folder,
            "model.visual_encoder",
            "CLIP",
            ("clip", "clip_vision_model"),
            CLIPVisionModelWithProjection,
            _probe_visual,
        )
        audio = _load(audio_folder, "model.audio_encoder", "HuBERT", ("hubert",), HubertModel, _probe_audio)
        processor_file = Path(visual_folder) / "preprocessor_config.json"
        try:
            processor = json.loads(processor_file.read_text("utf-8")) if processor_file.is_file() else None
        except ValueError as error:
            raise InputError(
                f"model.visual_encoder: {processor_file} is not valid JSON ({error}): copy it again"
            ) from error
        return cls(visual, audio, processor, device=device, dtype=dtype, batch=batch)

    @torch.inference_mode()
    def encode_frames(self, frames: np.ndarray | Tensor) -> Tensor:
        """Encode images, uint8 RGB `[T, H, W, 3]`, to projected embeddings, float32 `[T, Dv]` on the CPU.

        They are prepared as by CLIP's processor: resized to its image size (bicubic, antialiased; for ViT-L/14, 224 ×
        224 input is left as it is), rescaled, and normalised by the mean and deviation of its training set. The
        embeddings are not normalised.
        """
        features = []
        # in batches, which bounds the memory of the pixels and activations
        for rows in torch.as_tensor(frames).split(self.batch):
            pixels = rows.to(self.device).permute(0, 3, 1, 2).float()
            if pixels.shape[-2:] != (self.image_size, self.image_size):
                pixels = _to_square(pixels, self.image_size)
            pixels = (pixels * self._scale - self._mean) / self._std
            features.append(self.visual(pixel_values=pixels.to(self.dtype)).image_embeds.float().cpu())
        return torch.cat(features)

    @torch.inference_mode()
    def encode_audio(self, clips: np.ndarray | Tensor) -> Tensor:
        """Encode normalised sound at 16 kHz, float32 `[N, 32000]`, to a vector per clip, float32 `[N, Da]` on the CPU.

        The vector is the mean of the last four hidden states, then over time.
        """
        features = []
        for rows in torch.as_tensor(clips).split(self.batch):
            output = self.audio(rows.to(self.device, self.dtype), output_hidden_states=True)
            # the last one after HuBERT's closing layer norm, as transformers returned it when AffectGPT was trained:
            # since 5.x, `hidden_states[-1]` of a pre-norm HuBERT (the large ones) comes from before that norm
            last_four = torch.stack([*output.hidden_states[-4:-1], output.last_hidden_state])
            features.append(last_four.float().mean(dim=(0, 2)).cpu())
        return torch.cat(features)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that the outputs depend on: architecture, image processing, dtype and every weight.

        Weights are hashed as loaded, so a copied folder, or the same model stored in another format, keeps its cache,
        and an edited one does not. It takes about a second per gigabyte, once.
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
            # sorted: the order of a state dict is that of the module's source, which another release may change
            for name, weight in sorted(model.state_dict().items()):
                digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
                # as bytes, because NumPy has no bfloat16
                digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


# config entries that change the outputs but not the names or shapes of weights; the whole config would not do, as each
# release of transformers adds entries to it
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
    """Move a model to its device and dtype, in eval mode and without gradients."""
    return model.to(device, dtype).eval().requires_grad_(False)


def _to_square(pixels: Tensor, size: int) -> Tensor:
    """Resize as CLIP's processor: shortest edge to `size`, bicubic, then the centre square."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, int(height * scale)), max(size, int(width * scale)))
    # rounded and clamped, because the processor works on 8-bit images, and bicubic overshoots at edges
    pixels = torch.nn.functional.interpolate(pixels, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def _load(
    folder: str | Path,
    key: str,
    architecture: str,
    model_types: tuple[str, ...],
    model_class: type[PreTrainedModel],
    probe: Callable[[Any], Tensor],
) -> Any:
    """Load `model_class` from a folder, refusing other models and incomplete weights."""
    config: Any = read_config(folder, key)
    if config.model_type not in model_types:
        raise InputError(
            f"{key}: {folder} holds a model of type {config.model_type!r}, not {architecture}: give the folder of a "
            f"{architecture} checkpoint as save_pretrained writes it"
        )
    if config.model_type == "clip":  # a whole CLIP: take its image half, with the outer config's projection width
        projection_dim, config = config.projection_dim, config.vision_config
        config.projection_dim = projection_dim

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or transformers lists the weights of a CLIP's text half, left out on purpose
    try:
        # pickled: the published Chinese HuBERT has no safetensors
        return load_model(model_class, folder, key, config=config, probe=probe, pickled=True)
    finally:
        logging.set_verbosity(verbosity)


def _probe_visual(model: Any) -> Tensor:
    size = model.config.image_size
    embeddings: Tensor = model(pixel_values=torch.zeros(1, 3, size, size, dtype=model.dtype)).image_embeds
    return embeddings


def _probe_audio(model: Any) -> Tensor:
    # a quarter of a second; through all layers, of which `encode_audio` takes the last four
    states: Tensor = model(torch.zeros(1, 4000, dtype=model.dtype)).last_hidden_state
    return states
