"""Options of an emotion run: model, clips, prompts, rewards, metric, and the stages of training.

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
from grpo_core.errors import InputError
from grpo_core.model_folder import check_folder

if TYPE_CHECKING:
    from grpo_core.rewards import Reward


# a module-level update: whatever reads a saved run's config has imported these classes before
MOVED_KEYS.update(
    {"data.subtitle_language": "data.layout.subtitle_language", "data.synthetic_clips": "data.layout.clips"}
)


@dataclass
class DataConfig(ConfigSection, key="data"):
    """Clips and their labels."""

    format: str = option("mer2025", choices=LAYOUTS)
    """Layout on disk, see docs/data.md; synthetic is the embedded default, which the program generates."""
    layout: Layout = chosen_by("format")
    """Options of the layout."""
    root: Path | None = option(None, free=True)
    """Folder of the dataset (for jsonl, the file). For synthetic, the folder that it is made in, or was made in."""
    labels: str | None = None
    """Label table, relative to root. Unset: the layout's own (track2_train_ovmerd.csv in mer2025); for jsonl, root."""
    test_labels: str | None = option(None, free=True)
    """Label table of held-out samples, which are scored before and after training; unset, nothing is scored. For jsonl,
    another jsonl in the same folder."""
    reasons: str | None = None
    """Table of descriptions, relative to root, that think mode learns from."""
    validation_fraction: float = 0.0
    """Share of the samples that is held out from training and scored during it."""
    cache_dir: Path = Path("runs/features")
    """Cache of encoder outputs, keyed by the files' content and shared by all runs."""
    face_channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the face files; with the wrong one, skin looks blue."""
    truncated: Literal["skip", "keep"] = "skip"
    """Media files whose end is missing: leave the sample out, or use what is there."""
    min_coverage: float = option(0.8, free=True)
    """Share of a table's samples that must be usable, for training and for a score; the others are left out and
    named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction is {self.validation_fraction}: set it in [0, 1)")
        if self.labels is None:
            self.labels = getattr(self.layout, "usual_labels", None)
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"data.min_coverage is {self.min_coverage}: set it in [0, 1]")


@dataclass
class PromptConfig(ConfigSection, key="prompt"):
    """Prompt: template, modalities and form of the answer."""

    template: Template = "upstream"
    """AffectGPT's `###Human: … ###Assistant: `, or the tokenizer's chat template."""
    mode: Mode = "no_think"
    """Answer at once, or after a think block."""
    face_or_frame: str = option("multiface_audio_face_text", choices=tuple(FACE_OR_FRAME))
    """Modalities in the prompt; the names are upstream's, see docs/data.md."""
    answer_form: AnswerForm = "list"
    """Form of no-think answers: a bare list of words, or upstream's sentence."""


@dataclass
class ModelConfig(ConfigSection, key="model"):
    """The model that training starts from: a saved AffectGPT, or fresh adapters over three Hugging Face folders."""

    path: Path | None = None
    """Folder that AffectGPT.save_pretrained wrote."""
    llm: Path | None = None
    """Folder of a causal LM. Without path, fresh adapters are made over it, visual_encoder and audio_encoder."""
    visual_encoder: Path | None = None
    """Folder of a CLIP vision model with projection."""
    audio_encoder: Path | None = None
    """Folder of a HuBERT."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen LLM; trained weights are float32."""
    lora_r: int = 16
    """Rank of fresh adapters."""
    lora_alpha: int = 32
    """Scale of fresh adapters."""
    lora_dropout: float = 0.05
    """Dropout of fresh adapters in supervised training; GRPO trains without dropout."""
    gradient_checkpointing: bool = option(False, free=True)
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}: set it to 1 or more, as adapters are trained")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"model.lora_dropout is {self.lora_dropout}: set it in [0, 1) (0 is off)")

    def check_folders(self) -> None:
        """Refuse folders that cannot hold what they are named for, by their file names alone.

        Raises:
            InputError: naming the option, the folder and the way out.
        """
        if self.path is not None and not (self.path / "affectgpt.json").is_file():
            advice = "give one that AffectGPT.save_pretrained wrote; nothing is downloaded"
            if (self.path / "config.json").is_file():
                advice = "if it is a causal LM, give it as model.llm"
            raise InputError(f"model.path: {self.path} holds no AffectGPT (affectgpt.json): {advice}")
        for name in ("llm", "visual_encoder", "audio_encoder"):
            if (folder := getattr(self, name)) is not None:
                check_folder(folder, f"model.{name}")


@dataclass
class MetricConfig(ConfigSection, key="metric"):
    """Emotion wheel and the ring on which evaluations compare."""

    emotion_wheel: Path | None = None
    """Folder of published tables (wheel1.xlsx … format.csv, synonym.xlsx); unset, the project's tables."""
    level: Literal[1, 2] = 1
    """Ring of the wheels that evaluations compare."""

    def wheel(self) -> EmotionWheel:
        """Read the tables named by the config.

        Raises:
            TablesError: the published tables are missing or damaged.
        """
        return EmotionWheel.default() if self.emotion_wheel is None else EmotionWheel.from_published(self.emotion_wheel)


@dataclass
class TaskConfig(ConfigSection):
    """Options of every command: model, clips, prompts, metric and run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class SupervisedConfig(TaskConfig):
    """Supervised training, `affectgpt sft`."""

    # upstream's weight decay
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))


@dataclass
class PredictConfig(TaskConfig):
    """Prediction, `affectgpt predict`."""

    output: Path = Path("predictions.csv")
    """The csv to write; a file that is there is not overwritten."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix == ".jsonl":  # where the whole answers go
            raise ValueError(f"output is {self.output}, the name of the file beside the csv: let it end in .csv")


@dataclass
class ColdStartConfig(ConfigSection, key="cold_start"):
    """Supervised training of fresh adapters, before GRPO."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))
    """Optimiser of this stage."""
    max_steps: int = 0
    """Most optimiser steps. 0 skips the cold start, for a model.path that is trained already."""
    prompts_per_step: int = 16
    """Examples of one step, over all ranks."""
    eval_steps: int = 50
    """Score the validation samples every N steps; GRPO starts from the best model. 0 disables: it starts from the
    last."""
    early_stopping_patience: int = 5
    """Stop after this many evaluations without a new best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("max_steps", 0),
            ("prompts_per_step", 1),
            ("eval_steps", 0),
            ("early_stopping_patience", 0),
        ):
            if getattr(self, name) < least:
                off = " (off)" if least == 0 else ""
                raise ValueError(f"cold_start.{name} is {getattr(self, name)}: set it to {least}{off} or more")


@dataclass
class R1Config(GRPOConfig, TaskConfig):
    """AffectGPT-R1, `affectgpt train`: the options of a GRPO run and of an emotion run."""

    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    controls: bool = option(False, free=True)
    """Also train the control, supervised training for as long as GRPO, and score GRPO's model on swapped clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # here, because it needs several sections; by name only, so that no table, module or model is loaded yet
        check_rewards(self.reward.names, self.prompt.mode, self.reward, max_length=self.rollout.max_new_tokens)
        if (self.cold_start.max_steps or self.controls) and not self.data.validation_fraction:
            raise ValueError(
                "cold_start and controls choose their best model on validation samples: set data.validation_fraction "
                "above 0"
            )

    def rewards(self, wheel: EmotionWheel) -> list[Reward]:
        """Make the run's rewards: import those named by import path, and load the judge's processor.

        Raises:
            InputError: `make_rewards` refuses one.
        """
        limit = self.rollout.max_new_tokens
        return make_rewards(self.reward.names, wheel, self.prompt.mode, self.reward, max_length=limit)

    def supervised(self, name: str, max_steps: int, patience: int) -> SFTConfig:
        """Configure a supervised stage of this run, with a folder in the run's that ends with its best validated model.

        Args:
            name: name of the stage's folder.
            patience: evaluations without a new best after which the stage stops; 0 never stops early.
        """
        cold = self.cold_start
        run = replace(
            self.run,
            name=name,
            output_dir=self.run.folder,
            max_steps=max_steps,
            prompts_per_step=cold.prompts_per_step,
            eval_steps=cold.eval_steps,
            early_stopping_patience=patience if cold.eval_steps else 0,
            # whatever GRPO follows: GRPO starts from the best model of this stage
            metric_for_best_model="eval/f1" if cold.eval_steps else "",
        )
        return SFTConfig(cold.optim, run)
