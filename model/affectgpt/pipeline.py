"""The stages of a run over one set of clips: load, encode, cold start, GRPO, score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from affectgpt import synthetic
from affectgpt.config import DataConfig, ModelConfig, PromptConfig, TaskConfig
from affectgpt.data.datasets import LOADERS, Sample
from affectgpt.data.features import FeatureStore, extract_features
from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.evaluation import Evaluation, score_answers
from affectgpt.modeling.affectgpt import AffectGPT
from affectgpt.modeling.encoders import Encoders
from affectgpt.prompts import (
    PLACEHOLDERS,
    answer_text,
    build_prompt,
    build_target,
    required_features,
    stop_strings,
)
from grpo_core.config.loader import save_config, to_dict
from grpo_core.config.options import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, SFTConfig
from grpo_core.distributed import Distributed, barrier, gather_objects, shard
from grpo_core.policy import Policy
from grpo_core.rewards import Reward
from grpo_core.rng import permutation
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.training.grpo import GRPOTrainer
from grpo_core.training.sft import Example, SFTTrainer
from grpo_core.types import Group, Prompt


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
