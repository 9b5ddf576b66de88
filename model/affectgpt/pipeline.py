"""Run the stages of training over one set of clips: load, encode, cold start, GRPO, score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from affectgpt import synthetic
from affectgpt.config import DataConfig, ModelConfig, R1Config, TaskConfig
from affectgpt.data.datasets import Sample, SyntheticLayout, check_emotion_labels
from affectgpt.data.features import extract_features, lacking
from affectgpt.emotion_wheel import EmotionWheel, distinct_labels
from affectgpt.evaluation import Evaluation, score_answers
from affectgpt.modeling.affectgpt import AffectGPT
from affectgpt.modeling.encoders import Encoders
from affectgpt.prompts import (
    PLACEHOLDERS,
    answer_text,
    build_prompt,
    build_target,
    end_token,
    required_features,
    stop_strings,
)
from grpo_core.config.options import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, SFTConfig
from grpo_core.data import check_coverage, longest_sequence, report_skipped
from grpo_core.distributed import Distributed, gather_objects, run_on_main, shard
from grpo_core.distributed.stopping import stoppable
from grpo_core.errors import InputError
from grpo_core.families import check_model
from grpo_core.policy import Policy
from grpo_core.reward_adapters import check_columns
from grpo_core.rewards import Reward
from grpo_core.rng import permutation
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.training.grpo import GRPOTrainer
from grpo_core.training.sft import Example, SFTTrainer
from grpo_core.types import Group, Prompt
from grpo_core.verify import verify_model

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TaskConfig)


def load_samples(
    data: DataConfig, labels: str | None = None, labelled: bool = True, numbers: bool = False
) -> list[Sample]:
    """Read the samples of a label table.

    Args:
        labels: label table to read instead of `data.labels`.
        labelled: False if the table has names only, as for prediction.
        numbers: labels may be numbers, as the sentiment reward takes them.

    Raises:
        InputError: data.root is not set, a file or folder is missing, or the layout's loader refuses a table.
    """
    if data.root is None:
        raise InputError("data.root is not set: give the folder of the dataset")
    if data.format == "jsonl" and data.labels is not None and labels is None and data.root.is_file():
        raise InputError(
            f"data.root is the jsonl {data.root}, and data.labels {data.labels!r} names another: leave data.labels "
            "out (--data.labels none), or give the folder as data.root"
        )
    table = labels or data.labels
    where = str(data.root / table if table else data.root)
    try:
        samples = data.layout.load(data.root, labels=table, reasons=data.reasons, labelled=labelled)
        if labelled and not numbers:
            check_emotion_labels(samples, where)
    except OSError as error:
        raise InputError(str(error)) from error
    if not samples:
        raise InputError(f"{where}: it lists no sample. Give a table with rows.")
    return samples


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples at random into (training, validation); the seed fixes the split."""
    # by Philox, not torch's generator: the split is the same whatever was drawn before, also after a resume
    order = permutation(seed, 0, len(samples))
    held_back = round(fraction * len(samples))
    # sorted: both halves keep the table's order, whatever the permutation
    return [samples[i] for i in sorted(order[held_back:])], [samples[i] for i in sorted(order[:held_back])]


def make_model(config: ModelConfig, device: torch.device) -> AffectGPT:
    """Load the model that a config names, or make fresh adapters over its LLM and encoders.

    Raises:
        InputError: neither a saved model nor all three folders are named.
    """
    folders: dict[str, Any] = {
        "llm": config.llm,
        "visual_encoder": config.visual_encoder,
        "audio_encoder": config.audio_encoder,
    }
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.path is not None:
        # a saved model stores its folders; those that the config names have moved since
        moved: dict[str, Any] = {name: path for name, path in folders.items() if path is not None}
        model = AffectGPT.from_pretrained(config.path, device=device, dtype=dtype, **moved)
    else:
        missing = [name for name, path in folders.items() if path is None]
        if missing:
            raise InputError(
                f"model.{missing[0]} is not set: give model.path, or all of model.{', model.'.join(folders)}"
            )
        lora: dict[str, Any] = {
            "lora_r": config.lora_r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
        }
        model = AffectGPT.create(**folders, device=device, dtype=dtype, **lora)
    if config.gradient_checkpointing:
        # re-entrant checkpointing needs an input with gradient; with frozen embeddings there is none
        base: Any = model.llm.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def answer_greedily(
    sampler: GroupSampler,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    dist: Distributed,
    progress: bool = False,
) -> list[str]:
    """Answer all prompts greedily; each rank answers its share, and all ranks get all texts in order."""
    # one member: greedy members are all the same; the cut-offs are set to off, since the argmax ignores them
    greedy = replace(rollout, group_size=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    share = shard(prompts, dist.rank, dist.world_size)
    with stoppable(dist):  # inside a training loop a signal drops the evaluation, on all ranks at once
        groups = sampler.sample(share, greedy, progress=progress and dist.main_process)
    # shards are contiguous, so concatenating the ranks' texts gives the order of the prompts
    by_rank = gather_objects([group.completions[0].text for group in groups], dist)
    return [text for texts in by_rank for text in texts]


class Stages:
    """Stages that train and score a model on one set of clips, which is prepared once.

    Args:
        config: config of the whole run.
        dist: this process's place among the ranks.
        splits: load the config's clips for training, validation and test; False leaves the three empty.

    Attributes:
        model: the model that the stages train.
        training, validation, test: prompts of the three splits; samples that cannot be used are left out.
        test_total: number of test samples, with those left out.

    Raises:
        InputError: a table is missing or refused, or too few samples of a split can be used.
        ModelRefused: the language model would be trained wrongly.
    """

    def __init__(self, config: TaskConfig, dist: Distributed, splits: bool = True):
        self.dist = dist
        self.config = config = prepare_synthetic(config, dist)
        self.wheel: EmotionWheel = config.metric.wheel()
        # completions also end where the prompt's template ends a turn; dict.fromkeys keeps order and drops repeats
        ends = (*config.rollout.stop_strings, *stop_strings(config.prompt.template))
        self.rollout = replace(config.rollout, stop_strings=tuple(dict.fromkeys(ends)))
        data = config.data
        training: list[Sample] = []
        validation: list[Sample] = []
        test: list[Sample] = []
        if splits:  # tables first: a mistake in one should not cost the minutes that loading a model takes
            # numbers train the sentiment reward alone: validation samples would be scored as emotion words
            sentiment = isinstance(config, R1Config) and "sentiment" in config.reward.names
            numbers = sentiment and not data.validation_fraction
            training, validation = split_samples(
                load_samples(data, numbers=numbers), data.validation_fraction, config.run.seed
            )
            test = load_samples(data, data.test_labels) if data.test_labels else []
            if dist.main_process:
                _warn_of_overlap([*training, *validation], test)
        torch.manual_seed(config.run.seed)  # directly before: fresh adapters are drawn from the global generator
        self.model = make_model(config.model, dist.device)
        # before clips are encoded, which may take hours: a language model that would be trained wrongly is refused now
        check_model(self.model.llm.config, media=True)
        verify_model(self.model.llm)
        self.training: list[Prompt] = []
        self.validation: list[Prompt] = []
        self.test: list[Prompt] = []
        self.test_total = len(test)
        if splits:
            encoders = self.encoders()  # loaded once for the three splits, and freed when this returns
            self.training = self.prompts(training, encoders, "training samples")
            self.validation = self.prompts(to_score(validation), encoders, "validation samples")
            self.test = self.prompts(to_score(test), encoders, "test samples")

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return self.config.run.folder

    def encoders(self) -> Encoders:
        """Load the frozen encoders whose outputs the model reads."""
        model = self.model.config
        return Encoders.from_pretrained(model.visual_encoder, model.audio_encoder, device=self.dist.device)

    def prompts(
        self,
        samples: Sequence[Sample],
        encoders: Encoders | None = None,
        what: str = "samples",
        least: float | None = None,
    ) -> list[Prompt]:
        """Make the prompts of samples that can be used, encoding clips that are not in the cache yet.

        A sample is left out, named and counted if it has a fault, lacks a modality that the prompt shows, has a clip
        that cannot be read, or a prompt that with its answer is longer than the model's positions.

        Args:
            what: what the samples are, in the plural.
            least: share of them that must be usable; None takes `data.min_coverage`.

        Raises:
            InputError: less than that share, or none, can be used.
        """
        if not samples:
            return []
        data, prompt = self.config.data, self.config.prompt
        # sorted: a set's order of strings differs between processes, and ranks must agree on the order of files
        modalities = sorted(required_features(prompt.face_or_frame))
        features = extract_features(
            [_with_fault(sample, modalities, prompt.face_or_frame) for sample in samples],
            encoders or self.encoders(),
            data.cache_dir,
            modalities=modalities,
            progress=self.dist.main_process,
            face_channel_order=data.face_channel_order,
            truncated=data.truncated,
            dist=self.dist,
        )
        prompts = [
            build_prompt(
                sample,
                features[sample.name],
                self.model.tokenizer,
                template=prompt.template,
                mode=prompt.mode,
                face_or_frame=prompt.face_or_frame,
                answer_form=prompt.answer_form,
            )
            for sample in samples
            if sample.name in features  # others were skipped, with a warning
        ]
        limit, answer = longest_sequence(self.model.llm.config), self.rollout.max_new_tokens
        too_long = {
            made.id: fault
            for made in prompts
            if limit and (fault := limit.fault(len(made.token_ids), answer, "rollout.max_new_tokens"))
        }
        if self.dist.main_process:
            report_skipped(too_long, len(samples), what)
        share = data.min_coverage if least is None else least
        check_coverage(features.skipped | too_long, len(samples), share, what=what, key="data.min_coverage")
        return [made for made in prompts if made.id not in too_long]

    def load(self, folder: Path | None) -> None:
        """Replace the model by one that an earlier stage saved; None makes fresh adapters again."""
        self.model = make_model(replace(self.config.model, path=folder), self.dist.device)

    def save(self, folder: Path) -> None:
        """Save the model as it is, on the main process."""
        # others may read the folder next, and learn of a disk that is full
        run_on_main(lambda: self.model.save_pretrained(folder), self.dist)

    def policy(self, reference: Any = None, offload: bool = False) -> tuple[Policy, GroupSampler]:
        """Wrap the model as a policy, and make its sampler.

        Args:
            reference: policy that the KL is measured against, `frozen` or `adapter_off`; None keeps no reference.
            offload: keep the frozen reference in host memory.
        """
        policy = Policy(self.model.llm, embed=self.model.embed, module=self.model, reference=reference, offload=offload)
        tokenizer = self.model.tokenizer
        # forbidden, since `embed` would replace a sampled placeholder by features in the update's forward pass
        placeholders: Any = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
        end = end_token(tokenizer, self.config.prompt.template)
        return policy, GroupSampler(
            policy,
            tokenizer,
            seed=self.config.run.seed,
            forbidden_tokens=placeholders,
            end_tokens=() if end is None else (end,),
        )

    def supervised(self, config: SFTConfig) -> None:
        """Train on the labels and save the model in the stage's folder."""
        # the sampler answers validation samples; it shares the policy's weights, so it always samples the current ones
        policy, sampler = self.policy()
        prompt = self.config.prompt
        examples = [
            Example(
                training,
                build_target(
                    training.sample,
                    self.model.tokenizer,
                    template=prompt.template,
                    mode=prompt.mode,
                    answer_form=prompt.answer_form,
                    opened=training.opened,
                ),
            )
            for training in self.training
        ]
        limit = longest_sequence(self.model.llm.config)
        too_long = {
            example.prompt.id: fault
            for example in examples
            if limit and (fault := limit.fault(len(example.prompt.token_ids), len(example.target_ids), "its answer"))
        }
        if self.dist.main_process:
            report_skipped(too_long, len(examples), "training samples")
        share = self.config.data.min_coverage
        check_coverage(too_long, len(examples), share, what="training samples", key="data.min_coverage")
        SFTTrainer(
            policy,
            [example for example in examples if example.prompt.id not in too_long],
            config,
            dist=self.dist,
            save_model=self.model.save_pretrained,
            evaluate=self.evaluate_validation(sampler),
        ).train()
        self.save(config.run.folder / "model")  # after `train`, which ends with the best validated weights

    def check_rewards(self, rewards: Sequence[Reward]) -> None:
        """Refuse rewards that read columns that the samples lack.

        Raises:
            InputError: naming the reward and the column.
        """
        for reward in rewards:
            for prompt in self.training:
                check_columns(reward, prompt)

    def grpo(self, rewards: Sequence[Reward], algorithm: AlgorithmConfig, optim: OptimConfig) -> dict[str, int]:
        """Train on the rewards and save the model in the run's folder.

        Returns:
            Steps in which something went wrong, by what it was; empty after a healthy run.
        """
        self.check_rewards(rewards)
        # without a KL no reference is kept: a frozen copy of the trained weights would be memory for nothing
        policy, sampler = self.policy(algorithm.reference if algorithm.beta > 0 else None, algorithm.reference_offload)
        trainer = GRPOTrainer(
            policy,
            sampler,
            self.training,
            rewards,
            GRPOConfig(algorithm, self.rollout, optim, self.config.run),  # self.rollout, with the template's stops
            dist=self.dist,
            save_model=self.model.save_pretrained,
            evaluate=self.evaluate_validation(sampler),
            describe=self.describe,
        )
        trainer.train()
        self.save(self.folder / "model")
        return trainer.guards.summary()

    def describe(self, group: Group, member: int) -> dict[str, Any]:
        """Return a completion's labels and the ground truth, for `completions.jsonl`."""
        answer = answer_text(group.completions[member].text, self.config.prompt.mode)
        return {"labels": distinct_labels(answer), "ground_truth": group.prompt.sample.labels}

    def score(
        self, sampler: GroupSampler, prompts: Sequence[Prompt], name: str, split: str, total: int | None = None
    ) -> Evaluation:
        """Score the greedy answers of the sampler's policy; `total` samples are in the split, None for all of these."""
        return score_answers(
            self.wheel,
            [prompt.sample for prompt in prompts],
            answer_greedily(sampler, prompts, self.rollout, self.dist),
            name=name,
            split=split,
            mode=self.config.prompt.mode,
            level=self.config.metric.level,
            total=total,
        )

    def evaluate_test(
        self, name: str, prompts: Sequence[Prompt] | None = None, total: int | None = None
    ) -> Evaluation | None:
        """Score the model on the held-out samples, or on `prompts`, and write the answers to `evaluations/<name>.json`.

        Args:
            total: number of samples of which `prompts` are those that can be used.

        Returns:
            The scores; None if there are no prompts.
        """
        if prompts is None:
            prompts, total = self.test, self.test_total
        if not prompts:
            return None
        _, sampler = self.policy()  # a new one: `load` may have replaced the model
        evaluation = self.score(sampler, prompts, name, "test", total)
        run_on_main(lambda: str(evaluation.save(self.folder / "evaluations")), self.dist)
        return evaluation

    def evaluate_validation(self, sampler: GroupSampler) -> Callable[[], dict[str, float]] | None:
        """Make the function that a training loop calls to score the validation samples; None if there are none."""
        if not self.validation:
            return None
        return lambda: {"eval/f1": self.score(sampler, self.validation, "validation", "validation").f1}


def to_score(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples for an evaluation: those without labels with a fault, since there is nothing to compare with."""
    return [
        replace(sample, fault=sample.fault or "it has no labels to score against") if sample.labels is None else sample
        for sample in samples
    ]


def _with_fault(sample: Sample, modalities: Sequence[str], face_or_frame: str) -> Sample:
    """Return a sample, with a fault if it lacks a modality that prompts show."""
    if sample.fault is None and (missing := lacking(sample, modalities)):
        fault = f"it has no {', '.join(missing)}, which prompt.face_or_frame {face_or_frame} shows"
        return replace(sample, fault=fault)
    return sample


def _warn_of_overlap(training: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Warn of clips that are trained on and tested on."""
    trained = {clip for sample in training if (clip := sample.video or sample.audio or sample.image)}
    both = [sample.name for sample in test if (sample.video or sample.audio or sample.image) in trained]
    if both:
        logger.warning("%d of %d test samples are training samples too, such as %s", len(both), len(test), both[0])


def synthetic_home(config: TaskConfig) -> Path:
    """Return the folder, one per seed beside the runs, in which synthetic clips and tiny models are made."""
    return config.run.output_dir / "synthetic" / f"seed-{config.run.seed}"


def synthetic_root(config: TaskConfig) -> Path:
    """Return the folder of a config's synthetic clips: `data.root`, or one for each seed and number of clips."""
    if config.data.root is not None or not isinstance(config.data.layout, SyntheticLayout):
        return config.data.root or Path()
    train, test = config.data.layout.clips
    # of other sizes beside it: the clips of a run that is unfinished must not be exchanged under it
    usual = (train, test) == SyntheticLayout().clips
    return synthetic_home(config) / ("clips" if usual else f"clips-{train}-{test}")


def prepare_synthetic(config: Config, dist: Distributed) -> Config:
    """Make the clips and models of `data.format: synthetic`, and return a config that names them.

    Clips are made under `data.root` and, if the config names no model, a tiny LLM and two tiny encoders. If it is
    unset, the root is that of `synthetic_root`. Files of an earlier run are kept and used. With other
    formats the config is returned unchanged.
    """
    layout = config.data.layout
    if not isinstance(layout, SyntheticLayout):
        return config
    home = synthetic_home(config)
    root = synthetic_root(config)
    wants_models = config.model.path is None and config.model.llm is None

    def make() -> None:
        train, test = layout.clips
        synthetic.make_dataset(root, seed=config.run.seed, train=train, test=test)
        if wants_models:
            synthetic.make_tiny_models(home / "models", seed=config.run.seed)

    run_on_main(make, dist)  # the others wait, then read the same folder
    model = config.model
    if wants_models:
        tiny = synthetic.make_tiny_models(home / "models", seed=config.run.seed)  # made above: only finds their paths
        model = replace(model, llm=tiny.llm, visual_encoder=tiny.visual, audio_encoder=tiny.audio)
    return replace(config, data=replace(config.data, root=root), model=model)
