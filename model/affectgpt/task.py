"""The emotion task as configuration, and the way from it to prompts, examples, a policy and an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from affectgpt.datasets import LOADERS, Sample
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.encoders import Encoders
from affectgpt.features import FeatureStore, extract_features
from affectgpt.modeling import AffectGPT
from affectgpt.prompts import AnswerForm, Mode, Template, build_prompt, build_target, required_features, stop_strings
from grpo_core.config import RolloutConfig
from grpo_core.distributed import Distributed, gather_objects, shard
from grpo_core.groups import Prompt
from grpo_core.rng import permutation
from grpo_core.sampler import GroupSampler
from grpo_core.sft import Example


@dataclass
class DataConfig:
    """Where the clips and their labels are."""

    format: Literal["mer2025", "mer2026", "ovmerd_plus", "folder", "jsonl", "synthetic"] = "mer2025"
    """Layout on disk, see docs/data.md; synthetic is the embedded default: clips, and tiny models unless some are
    named, that the program makes from run.seed (MER2025's layout)."""
    root: Path | None = None
    """Folder of the dataset (for jsonl: the file). For synthetic, where to make it, or to find it made."""
    labels: str = "track2_train_ovmerd.csv"
    """Label table, relative to root; not used by jsonl."""
    test_labels: str | None = None
    """Label table of held-out samples, scored before and after training; unset, none are."""
    reasons: str | None = None
    """Table of descriptions, relative to root, that think mode learns from."""
    subtitle_language: Literal["english", "chinese"] = "english"
    """Which column of the MER subtitle table is read."""
    validation_fraction: float = 0.0
    """Share of the samples that is held back from training and evaluated in its course."""
    cache_dir: Path = Path("runs/features")
    """Encoder outputs are kept here, keyed by the files' content, and used by every run."""
    synthetic_clips: tuple[int, int] = (400, 450)
    """Training and held-out clips that format synthetic makes."""
    face_channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the face files; look at the skin if in doubt."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction is {self.validation_fraction}: set it in [0, 1)")


@dataclass
class PromptConfig:
    """What the model is shown and asked."""

    template: Template = "upstream"
    """AffectGPT's own `###Human: … ###Assistant: `, or the tokenizer's chat template."""
    mode: Mode = "no_think"
    """Answer at once, or after a think block."""
    face_or_frame: str = "multiface_audio_face_text"
    """Which modalities the prompt shows; the names are upstream's, see docs/data.md."""
    answer_form: AnswerForm = "list"
    """Form of no-think answers: a bare list of words, or upstream's sentence."""


@dataclass
class ModelConfig:
    """The model that training starts from: a saved AffectGPT, or fresh adapters over three Hugging Face folders."""

    path: Path | None = None
    """Folder that AffectGPT.save_pretrained wrote."""
    llm: Path | None = None
    """Folder of a causal LM; with it visual_encoder and audio_encoder, and no path, adapters are made afresh."""
    visual_encoder: Path | None = None
    """Folder of a CLIP vision model with projection."""
    audio_encoder: Path | None = None
    """Folder of a HuBERT."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen LLM; trained weights are float32."""
    lora_r: int = 16
    """Rank of fresh adapters."""
    lora_alpha: int = 32
    """Scale of fresh adapters."""
    lora_dropout: float = 0.05
    """Dropout of fresh adapters in supervised training; GRPO trains without."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


@dataclass
class MetricConfig:
    """The emotion wheel, and how evaluations use it."""

    emotion_wheel: Path | None = None
    """Folder of published tables (wheel1.xlsx … format.csv, synonym.xlsx); unset, the project's own."""
    level: Literal[1, 2] = 1
    """Ring of the wheels that evaluations compare."""

    def wheel(self) -> EmotionWheel:
        """The tables that the config names."""
        return EmotionWheel.default() if self.emotion_wheel is None else EmotionWheel.from_published(self.emotion_wheel)


def load_samples(data: DataConfig, labels: str | None = None, labelled: bool = True) -> list[Sample]:
    """The samples of a label table, `data.labels` unless given; with `labelled=False`, of a table of names alone.

    Raises:
        ValueError: no root is given; FileNotFoundError, ValueError: as the layout's loader.
    """
    if data.root is None:
        raise ValueError("data.root is not set: give the folder of the dataset")
    if data.format == "jsonl":
        return LOADERS["jsonl"](data.root)
    options: dict[str, Any] = {"labels": labels or data.labels}
    if data.format in ("mer2025", "mer2026", "synthetic"):
        options["subtitle_language"] = data.subtitle_language
    if data.format == "folder":
        options["labels"] = options["labels"] if labelled else None
    else:
        options |= {"reasons": data.reasons, "labelled": labelled}
    return LOADERS["mer2025" if data.format == "synthetic" else data.format](data.root, **options)


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation) samples: a random split that the seed fixes."""
    order = permutation(seed, 0, len(samples))
    held_back = round(fraction * len(samples))
    return [samples[i] for i in sorted(order[held_back:])], [samples[i] for i in sorted(order[:held_back])]


def make_model(config: ModelConfig, device: torch.device) -> AffectGPT:
    """Load the model that a config names, or make fresh adapters.

    Raises:
        ValueError: neither or both are named.
    """
    fresh = {"llm": config.llm, "visual_encoder": config.visual_encoder, "audio_encoder": config.audio_encoder}
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.path is not None:
        moved = {name: path for name, path in fresh.items() if path is not None}
        model = AffectGPT.from_pretrained(config.path, device=device, dtype=dtype, **moved)
    else:
        if missing := [name for name, path in fresh.items() if path is None]:
            raise ValueError(
                f"model.{missing[0]} is not set: give model.path, or all of model.{', model.'.join(fresh)}"
            )
        lora = {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        model = AffectGPT.create(**fresh, device=device, dtype=dtype, **lora)
    if config.gradient_checkpointing:
        model.llm.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_encoders(model: AffectGPT, dist: Distributed) -> Encoders:
    """The frozen encoders that the model reads the outputs of."""
    return Encoders.from_pretrained(model.config.visual_encoder, model.config.audio_encoder, device=dist.device)


def encode(
    samples: Sequence[Sample], encoders: Encoders, data: DataConfig, prompt: PromptConfig, dist: Distributed
) -> FeatureStore:
    """Encoder outputs of all samples for the modalities that the prompt shows, from the cache where they are in it."""
    return extract_features(
        samples,
        encoders,
        data.cache_dir,
        modalities=sorted(required_features(prompt.face_or_frame)),
        progress=dist.main_process,
        face_channel_order=data.face_channel_order,
        dist=dist,
    )


def make_prompts(
    samples: Sequence[Sample], features: Mapping[str, dict[str, Tensor]], model: AffectGPT, config: PromptConfig
) -> list[Prompt]:
    """A prompt for every sample whose media could be read."""
    return [
        build_prompt(
            sample,
            features[sample.name],
            model.tokenizer,
            template=config.template,
            mode=config.mode,
            face_or_frame=config.face_or_frame,
            answer_form=config.answer_form,
        )
        for sample in samples
        if sample.name in features
    ]


def make_examples(prompts: Sequence[Prompt], model: AffectGPT, config: PromptConfig) -> list[Example]:
    """Prompts with the targets that supervised training teaches."""
    options = {"template": config.template, "mode": config.mode, "answer_form": config.answer_form}
    return [Example(prompt, build_target(prompt.sample, model.tokenizer, **options)) for prompt in prompts]


def with_stop_strings(rollout: RolloutConfig, prompt: PromptConfig) -> RolloutConfig:
    """The rollout with the template's own stop strings added."""
    return replace(rollout, stop_strings=tuple(dict.fromkeys((*rollout.stop_strings, *stop_strings(prompt.template)))))


def answer(
    sampler: GroupSampler,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    dist: Distributed,
    progress: bool = False,
) -> list[str]:
    """Greedy answers to all prompts, in order; each rank answers its share, and all ranks get all."""
    greedy = replace(rollout, group_size=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    mine = shard(prompts, dist.rank, dist.world_size)
    groups = sampler.sample(mine, greedy, progress=progress and dist.main_process)
    parts = gather_objects([group.completions[0].text for group in groups], dist)
    return [text for part in parts for text in part]
