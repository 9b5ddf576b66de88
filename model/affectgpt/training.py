"""The stages of an AffectGPT run, cold start, GRPO and evaluation, over one set of clips."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from affectgpt import synthetic
from affectgpt.datasets import Sample
from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.encoders import Encoders
from affectgpt.metrics import Evaluation, score_answers
from affectgpt.prompts import PLACEHOLDERS, answer_text
from affectgpt.rewards import RewardConfig, make_rewards
from affectgpt.task import (
    DataConfig,
    MetricConfig,
    ModelConfig,
    PromptConfig,
    answer,
    encode,
    load_samples,
    make_encoders,
    make_examples,
    make_model,
    make_prompts,
    split_samples,
    with_stop_strings,
)
from grpo_core.cli import save_config, to_dict
from grpo_core.config import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, RunConfig, SFTConfig
from grpo_core.distributed import Distributed, barrier
from grpo_core.groups import Group, Prompt
from grpo_core.policy import Policy
from grpo_core.rewards import Reward
from grpo_core.sampler import GroupSampler
from grpo_core.sft import SFTTrainer
from grpo_core.trainer import GRPOTrainer


@dataclass
class TaskConfig:
    """What every recipe needs: a model, clips, how they are shown and judged, and where to write."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class ColdStartConfig:
    """Supervised training of fresh adapters, before GRPO."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.05))
    """AdamW of this stage."""
    max_steps: int = 0
    """Optimiser steps at most. 0: none, model.path is trained already."""
    prompts_per_step: int = 16
    """Examples of one step, over all ranks."""
    eval_steps: int = 50
    """Score the validation samples every so many steps; the best model is what GRPO starts from."""
    early_stopping_patience: int = 5
    """Stop after so many evaluations without a new best."""


@dataclass
class R1Config(TaskConfig):
    """AffectGPT-R1: what recipes/affectgpt_r1.py runs."""

    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    controls: bool = False
    """Also train the control, supervised training for as long as GRPO, and score GRPO's model on swapped clips."""

    def __post_init__(self) -> None:
        GRPOConfig(self.algorithm, self.rollout, self.optim, self.run)  # refuses what GRPO refuses
        self.rewards(EmotionWheel.default())  # refuses what the rewards refuse, before any table is read
        if (self.cold_start.max_steps or self.controls) and not self.data.validation_fraction:
            raise ValueError("cold_start and controls stop by validation samples: set data.validation_fraction above 0")

    def rewards(self, wheel: EmotionWheel) -> list[Reward]:
        """The run's rewards.

        Raises:
            ValueError: as `make_rewards`.
        """
        limit = self.rollout.max_new_tokens
        return make_rewards(self.reward.names, wheel, self.prompt.mode, self.reward, max_length=limit)

    def supervised(self, name: str, max_steps: int, patience: int) -> SFTConfig:
        """A supervised stage within this run, in a folder of its own, that ends with its best validated model."""
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


class Stages:
    """One set of clips, prepared once, and the stages that train and score a model on them.

    Args:
        config: of the whole run.
        dist: this process's place among the ranks.
        splits: load the config's clips for training, validation and test; False leaves the three empty.

    Attributes:
        model: what the stages train.
        training, validation, test: prompts of the three splits; clips that could not be read are left out.
    """

    def __init__(self, config: TaskConfig, dist: Distributed, splits: bool = True):
        self.dist = dist
        self.config = config = _with_synthetic_parts(config, dist)
        self.wheel: EmotionWheel = config.metric.wheel()
        self.rollout = with_stop_strings(config.rollout, config.prompt)
        torch.manual_seed(config.run.seed)  # fresh adapters are drawn from it
        self.model = make_model(config.model, dist.device)
        self.training, self.validation, self.test = [], [], []
        if splits:
            self._load_splits()

    def _load_splits(self) -> None:
        data = self.config.data
        training, validation = split_samples(load_samples(data), data.validation_fraction, self.config.run.seed)
        test = load_samples(data, data.test_labels) if data.test_labels else []
        encoders = make_encoders(self.model, self.dist)
        self.training, self.validation, self.test = (
            self.prompts(part, encoders) for part in (training, validation, test)
        )

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.config.run.folder

    def prompts(self, samples: Sequence[Sample], encoders: Encoders | None = None) -> list[Prompt]:
        """Prompts of samples whose clips can be read; encodes them if that was not done before."""
        if not samples:
            return []
        encoders = encoders or make_encoders(self.model, self.dist)
        features = encode(samples, encoders, self.config.data, self.config.prompt, self.dist)
        return make_prompts(samples, features, self.model, self.config.prompt)

    def load(self, folder: Path) -> None:
        """Take up a model that an earlier stage saved."""
        self.model = make_model(replace(self.config.model, path=folder), self.dist.device)

    def save(self, folder: Path) -> None:
        """Save the model as it is, on the main process."""
        if self.dist.main_process:
            self.model.save_pretrained(folder)
        barrier(self.dist)

    def policy(self, reference: str | None = None, offload: bool = False) -> tuple[Policy, GroupSampler]:
        """The model as a policy, and its sampler."""
        policy = Policy(self.model.llm, embed=self.model.embed, module=self.model, reference=reference, offload=offload)
        tokenizer = self.model.tokenizer
        placeholders = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
        return policy, GroupSampler(policy, tokenizer, seed=self.config.run.seed, forbidden_tokens=placeholders)

    def score(self, sampler: GroupSampler, prompts: Sequence[Prompt], name: str, split: str) -> Evaluation:
        """Score the sampler's policy on prompts."""
        return score_answers(
            self.wheel,
            [prompt.sample for prompt in prompts],
            answer(sampler, prompts, self.rollout, self.dist),
            name=name,
            split=split,
            mode=self.config.prompt.mode,
            level=self.config.metric.level,
        )

    def evaluate_test(self, name: str, prompts: Sequence[Prompt] | None = None) -> Evaluation | None:
        """Score the model on the held-out samples, and keep the answers in `evaluations/<name>.json`."""
        prompts = self.test if prompts is None else prompts
        if not prompts:
            return None
        _, sampler = self.policy()
        evaluation = self.score(sampler, prompts, name, "test")
        if self.dist.main_process:
            evaluation.save(self.folder / "evaluations")
        return evaluation

    def evaluate_validation(self, sampler: GroupSampler) -> Callable[[], dict[str, float]] | None:
        """What a training loop calls to score the validation samples."""
        if not self.validation:
            return None
        return lambda: {"eval/f1": self.score(sampler, self.validation, "validation", "validation").f1}

    def supervised(self, config: SFTConfig) -> None:
        """Train on the labels; saves the model in the stage's folder."""
        policy, sampler = self.policy()
        SFTTrainer(
            policy,
            make_examples(self.training, self.model, self.config.prompt),
            config,
            dist=self.dist,
            save_model=self.model.save_pretrained,
            evaluate=self.evaluate_validation(sampler),
        ).train()
        self.save(config.run.folder / "model")

    def grpo(self, rewards: Sequence[Reward], algorithm: AlgorithmConfig, optim: OptimConfig) -> None:
        """Train on the rewards; saves the model in the run's folder."""
        policy, sampler = self.policy(algorithm.reference if algorithm.beta > 0 else None, algorithm.reference_offload)
        GRPOTrainer(
            policy,
            sampler,
            self.training,
            rewards,
            GRPOConfig(algorithm, self.rollout, optim, self.config.run),
            dist=self.dist,
            save_model=self.model.save_pretrained,
            evaluate=self.evaluate_validation(sampler),
            describe=self.describe,
        ).train()
        self.save(self.folder / "model")

    def describe(self, group: Group, member: int) -> dict[str, Any]:
        """A completion's labels beside the truth, for `completions.jsonl`."""
        answer = answer_text(group.completions[member].text, self.config.prompt.mode)
        return {"labels": parse_labels(answer, "tolerant"), "ground_truth": group.prompt.sample.labels}


_MAY_CHANGE = ("max_steps", "eval_steps", "save_steps", "keep_checkpoints", "resume")


def open_run(config: TaskConfig, dist: Distributed) -> None:
    """Make the run's folder and write its config; a finished run, or one of another config, is moved aside first.

    It goes to `<name>.previous` (what was there before is removed), so a run continues only its own progress. A run
    that is longer, or saves at other steps, than the one it finds unfinished is still the same.
    """
    folder = config.run.folder
    written = folder / "config.yaml"
    if dist.main_process:
        continues = config.run.resume and written.is_file() and not (folder / "summary.json").is_file()
        if continues:
            before = yaml.safe_load(written.read_text(encoding="utf-8"))
            continues = _identity(before) == _identity(to_dict(config))
        if folder.exists() and any(folder.iterdir()) and not continues:
            previous = folder.with_name(folder.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            print(f"{folder} held a finished or a different run: it is now {previous}")
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, written)
    barrier(dist)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what may change between the parts of one run."""
    run = {key: value for key, value in config.get("run", {}).items() if key not in _MAY_CHANGE}
    return config | {"run": run}


def _with_synthetic_parts(config: TaskConfig, dist: Distributed) -> TaskConfig:
    """Make the clips, and tiny models unless some are named, that `data.format: synthetic` stands for."""
    if config.data.format != "synthetic":
        return config
    home = config.run.output_dir / "synthetic" / f"seed-{config.run.seed}"
    root = config.data.root or home / "clips"
    model = config.model
    if dist.main_process:
        train, test = config.data.synthetic_clips
        synthetic.make_dataset(root, seed=config.run.seed, train=train, test=test)
        if model.path is None and model.llm is None:
            synthetic.make_tiny_models(home / "models", seed=config.run.seed)
    barrier(dist)
    if model.path is None and model.llm is None:
        tiny = synthetic.make_tiny_models(home / "models", seed=config.run.seed)  # made above: finds them
        model = replace(model, llm=tiny.llm, visual_encoder=tiny.visual, audio_encoder=tiny.audio)
    return replace(config, data=replace(config.data, root=root), model=model)
