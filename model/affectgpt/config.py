"""Options of an emotion run: the model, the clips, how they are shown and judged, and the stages of training.

Importing this module needs neither torch nor transformers, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from affectgpt.data.datasets import LAYOUTS, Layout
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.prompts import FACE_OR_FRAME, AnswerForm, Mode, Template
from affectgpt.rewards import RewardConfig, check_rewards, make_rewards
from grpo_core.config.fields import ConfigSection, chosen_by, option
from grpo_core.config.moved import MOVED_KEYS
from grpo_core.config.options import GRPOConfig, OptimConfig, RolloutConfig, RunConfig, SFTConfig

if TYPE_CHECKING:
    from grpo_core.rewards import Reward


MOVED_KEYS.update(
    {"data.subtitle_language": "data.layout.subtitle_language", "data.synthetic_clips": "data.layout.clips"}
)


@dataclass
class DataConfig(ConfigSection, key="data"):
    """Where the clips and their labels are."""

    format: str = option("mer2025", choices=LAYOUTS)
    """Layout on disk, see docs/data.md; synthetic is the embedded default, which the program makes itself."""
    layout: Layout = chosen_by("format")
    """Options of the layout."""
    root: Path | None = None
    """Folder of the dataset (for jsonl: the file). For synthetic, where to make it, or to find it made."""
    labels: str = "track2_train_ovmerd.csv"
    """Label table, relative to root; not used by jsonl."""
    test_labels: str | None = None
    """Label table of held-out samples, scored before and after training; unset, none are."""
    reasons: str | None = None
    """Table of descriptions, relative to root, that think mode learns from."""
    validation_fraction: float = 0.0
    """Share of the samples that is held back from training and scored while it runs."""
    cache_dir: Path = Path("runs/features")
    """Encoder outputs are kept here, keyed by the files' content, and used by every run."""
    face_channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the face files; look at the skin if in doubt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction is {self.validation_fraction}: set it in [0, 1)")


@dataclass
class PromptConfig(ConfigSection, key="prompt"):
    """What the model is shown and asked."""

    template: Template = "upstream"
    """AffectGPT's own `###Human: … ###Assistant: `, or the tokenizer's chat template."""
    mode: Mode = "no_think"
    """Answer at once, or after a think block."""
    face_or_frame: str = option("multiface_audio_face_text", choices=tuple(FACE_OR_FRAME))
    """Which modalities the prompt shows; the names are upstream's, see docs/data.md."""
    answer_form: AnswerForm = "list"
    """Form of no-think answers: a bare list of words, or upstream's sentence."""


@dataclass
class ModelConfig(ConfigSection, key="model"):
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
class MetricConfig(ConfigSection, key="metric"):
    """The emotion wheel, and how evaluations use it."""

    emotion_wheel: Path | None = None
    """Folder of published tables (wheel1.xlsx … format.csv, synonym.xlsx); unset, the project's own."""
    level: Literal[1, 2] = 1
    """Ring of the wheels that evaluations compare."""

    def wheel(self) -> EmotionWheel:
        """Read the tables that the config names.

        Raises:
            TablesError: the published tables are missing or damaged.
        """
        return EmotionWheel.default() if self.emotion_wheel is None else EmotionWheel.from_published(self.emotion_wheel)


@dataclass
class TaskConfig(ConfigSection):
    """What every command needs: a model, clips, how they are shown and judged, and where to write."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class SupervisedConfig(TaskConfig):
    """Supervised training: what `affectgpt sft` runs."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))


@dataclass
class PredictConfig(TaskConfig):
    """Prediction: what `affectgpt predict` runs."""

    output: Path = Path("predictions.csv")
    """The csv to write."""


@dataclass
class ColdStartConfig(ConfigSection, key="cold_start"):
    """Supervised training of fresh adapters, before GRPO."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))
    """AdamW of this stage."""
    max_steps: int = 0
    """Optimiser steps at most. 0 skips the cold start: model.path is trained already."""
    prompts_per_step: int = 16
    """Examples of one step, over all ranks."""
    eval_steps: int = 50
    """Score the validation samples every N steps; GRPO starts from the best model."""
    early_stopping_patience: int = 5
    """Stop after this many evaluations without a new best."""


@dataclass
class R1Config(GRPOConfig, TaskConfig):
    """AffectGPT-R1: what `affectgpt train` runs. It checks what any GRPO run checks, and its own sections."""

    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    controls: bool = False
    """Also train the control, supervised training for as long as GRPO, and score GRPO's model on swapped clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rewards(self.reward.names, self.prompt.mode, self.reward, max_length=self.rollout.max_new_tokens)
        if (self.cold_start.max_steps or self.controls) and not self.data.validation_fraction:
            raise ValueError("cold_start and controls stop by validation samples: set data.validation_fraction above 0")

    def rewards(self, wheel: EmotionWheel) -> list[Reward]:
        """Make the run's rewards: imports those that are named by import path, and loads the judge's processor.

        Raises:
            ValueError: as `make_rewards`.
        """
        limit = self.rollout.max_new_tokens
        return make_rewards(self.reward.names, wheel, self.prompt.mode, self.reward, max_length=limit)

    def supervised(self, name: str, max_steps: int, patience: int) -> SFTConfig:
        """Configure a supervised stage inside this run: it has its own folder and ends with its best validated model.

        Args:
            name: of the stage's folder within the run's.
            patience: evaluations without a new best after which it stops; 0 never stops early.
        """
        cold = self.cold_start
        run = replace(
            self.run,
            name=name,
            output_dir=self.run.folder,
            max_steps=max_steps,
            prompts_per_step=cold.prompts_per_step,
            eval_steps=cold.eval_steps,
            early_stopping_patience=patience,
            metric_for_best_model="eval/f1",
        )
        return SFTConfig(cold.optim, run)
