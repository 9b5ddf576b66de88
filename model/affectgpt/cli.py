"""Run the `affectgpt` command: train, score and apply emotion models, and generate synthetic clips and tables.

A command imports torch and transformers only after its arguments are read, so that help and a mistyped key answer at
once.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from grpo_core.errors import REFUSED, InputError, run_program

if TYPE_CHECKING:
    from affectgpt.config import R1Config, TaskConfig
    from affectgpt.evaluation import Evaluation
    from affectgpt.pipeline import Stages
    from grpo_core.config.options import RunConfig
    from grpo_core.distributed import Distributed

    Config = TypeVar("Config", bound=TaskConfig)

TRAIN = """\
AffectGPT-R1 (arXiv 2508.01318): GRPO on the emotion-wheel score, after a cold start if the model is fresh.

affectgpt train                                                  the embedded default, complete, on any machine
affectgpt train --config r1_no_think --model.path DIR --data.root DIR
torchrun --nproc_per_node=8 -m affectgpt train ...               the same on eight GPUs
"""

SFT = """Supervised training of AffectGPT on a label table: the cold start that GRPO begins from.

affectgpt sft --config sft --model.llm QWEN --model.visual_encoder CLIP --model.audio_encoder HUBERT --data.root MER2025

Writes `runs/<name>/model`, which `affectgpt train` takes as --model.path.
"""

EVALUATE = """Score a model on a labelled set: emotion-wheel F, precision and recall, per wheel and their mean.

affectgpt evaluate --model.path runs/r1/model --data.root MER2025 --data.labels LABELS.csv

The answers are greedy; they and the scores are kept in `runs/<name>/evaluations/evaluation.json`, those of a second
evaluation in `evaluation-2.json`.
"""

PREDICT = """Name the emotions of clips, labelled or not: writes `name,openset` rows and the full answers.

affectgpt predict --model.path runs/r1/model --data.format folder --data.root CLIPS --output answers.csv
affectgpt predict --model.path DIR --data.root MER2025 --data.labels track_all_candidates.csv

The csv has the form of the MER challenges' label tables; `<output>.jsonl` beside it has each clip's whole answer.
"""


def train(arguments: Sequence[str]) -> None:
    """Run AffectGPT-R1: cold start, controls, GRPO, and a report."""
    from affectgpt.config import R1Config
    from affectgpt.configs import CONFIGS

    config = _read(R1Config, "train", arguments, TRAIN, default_config=CONFIGS / "demo.yaml")

    from affectgpt.pipeline import Stages
    from affectgpt.stages import COLD_START, GRPO, RUN_FILES, SFT_CONTINUED, SHUFFLED_MEDIA, UNTRAINED
    from affectgpt.synthetic import shuffle_media
    from grpo_core import distributed
    from grpo_core.storage.run_folder import open_run

    # before the run's folder is made and hours of training pass: an import path or a judge's folder may be wrong
    rewards = config.rewards(config.metric.wheel())
    dist = _start(config.run)
    run = open_run(config, dist, writes=RUN_FILES)  # before models are loaded: the folder may hold another run
    config = run.config
    stages = Stages(config, dist)
    stages.check_rewards(rewards)  # here too, and not only in `grpo`: the cold start may take hours
    run.begin()  # after all that a mistake in the options can stop

    evaluations: dict[str, Evaluation | None] = {}
    cold_start = config.cold_start
    if cold_start.max_steps:
        evaluations[UNTRAINED] = stages.evaluate_test(UNTRAINED)
        stages.supervised(
            config.supervised(COLD_START, cold_start.max_steps, patience=cold_start.early_stopping_patience)
        )
    # without a cold start, model.path is what GRPO starts from: its score is still the one before
    evaluations[COLD_START] = stages.evaluate_test(COLD_START)
    if config.controls:
        # the control trains the model in place, so GRPO loads the cold start's result again
        start = stages.folder / COLD_START / "model" if cold_start.max_steps else config.model.path
        # patience 0: the control trains for as many steps as GRPO, or it would compare lengths and not methods
        stages.supervised(config.supervised(SFT_CONTINUED, config.run.max_steps, patience=0))
        evaluations[SFT_CONTINUED] = stages.evaluate_test(SFT_CONTINUED)
        stages.load(start)
    trouble = stages.grpo(rewards, config.algorithm, config.optim)
    del rewards  # frees a judge's weights on the GPU before the model is scored
    evaluations[GRPO] = stages.evaluate_test(GRPO)
    if config.controls and stages.test:
        swapped = stages.prompts(shuffle_media([prompt.sample for prompt in stages.test], config.run.seed))
        evaluations[SHUFFLED_MEDIA] = stages.evaluate_test(SHUFFLED_MEDIA, swapped)

    if dist.main_process:
        _finish_training(config, stages, {name: scored for name, scored in evaluations.items() if scored}, trouble)
    run.finish()
    distributed.finalize(dist)


def _finish_training(
    config: R1Config, stages: Stages, evaluations: dict[str, Evaluation], trouble: dict[str, int]
) -> None:
    """Write `summary.json` and `report.html`, and print the scores.

    Args:
        trouble: steps of GRPO in which something went wrong, by what it was.
    """
    from affectgpt.stages import stage_label
    from grpo_core.storage.files import write_text

    summary = {f"{name}_f1": 100 * scored.f1 for name, scored in evaluations.items()} | {"seed": config.run.seed}
    summary |= trouble
    write_text(config.run.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = _write_report(config, stages)
    if evaluations:
        clips = f"{_share(len(stages.test), stages.test_total)} held-out clips"
        print(f"\nemotion-wheel F on {clips} (level {config.metric.level}, seed {config.run.seed})")
        for name, scored in evaluations.items():
            f1, precision, recall = (100 * value for value in (scored.f1, scored.precision, scored.recall))
            print(f"  {stage_label(name).title:34}{f1:6.2f}   P {precision:6.2f}   R {recall:6.2f}")
    for what, steps in trouble.items():
        print(f"\n{what.replace('_', ' ')}: {steps} of {config.run.max_steps}")
    if report is not None:
        print(f"\n{report}")


def _write_report(config: R1Config, stages: Stages) -> Path | None:
    """Write `report.html`. The run does not depend on it: what goes wrong is said, with the command that makes it."""
    from affectgpt.report import write_report

    folder = config.run.folder
    try:
        return write_report(
            folder,
            samples={prompt.sample.name: prompt.sample for prompt in (*stages.training, *stages.test)},
            wheel=stages.wheel,
        )
    except Exception as error:  # whatever it is: weights and scores are written, and a report can be made again
        print(
            f"warning: the report was not written ({type(error).__name__}: {error}): the run is whole, and "
            f"`affectgpt report {folder}` writes it again",
            file=sys.stderr,
        )
        return None


def sft(arguments: Sequence[str]) -> None:
    """Train on a label table, and score the result if there is a test table."""
    from affectgpt.config import SupervisedConfig

    config = _read(SupervisedConfig, "sft", arguments, SFT)

    from affectgpt.pipeline import Stages
    from affectgpt.stages import RUN_FILES
    from grpo_core import distributed
    from grpo_core.config.options import SFTConfig
    from grpo_core.report import try_report
    from grpo_core.storage.run_folder import open_run

    dist = _start(config.run)
    run = open_run(config, dist, writes=RUN_FILES)
    config = run.config
    stages = Stages(config, dist)
    run.begin()
    stages.supervised(SFTConfig(config.optim, config.run))
    evaluation = stages.evaluate_test("sft")
    if dist.main_process:
        print(f"\n{stages.folder / 'model'}")
        if evaluation:
            print(evaluation.table())
        try_report(stages.folder)
    run.finish()
    distributed.finalize(dist)


def evaluate(arguments: Sequence[str]) -> None:
    """Score a model on a label table."""
    from affectgpt.config import TaskConfig

    config = _read(TaskConfig, "evaluate", arguments, EVALUATE)

    from affectgpt.pipeline import Stages, load_samples, prepare_synthetic, to_score
    from grpo_core import distributed

    dist = _start(config.run)
    config = prepare_synthetic(config, dist)
    samples = load_samples(config.data)  # before the model: a mistake in a table answers at once
    stages = Stages(config, dist, splits=False)
    # an earlier evaluation stays, which may be of another model
    folder = stages.folder / "evaluations"
    names = ("evaluation", *(f"evaluation-{number}" for number in range(2, 10_000)))
    name = next(name for name in names if not (folder / f"{name}.json").exists())
    evaluation = stages.evaluate_test(name, stages.prompts(to_score(samples)), len(samples))
    if dist.main_process and evaluation:
        print(evaluation.table())
        print(f"\n{folder / name}.json")
    distributed.finalize(dist)


def predict(arguments: Sequence[str]) -> None:
    """Write the emotions that a model names for clips."""
    from affectgpt.config import PredictConfig

    config = _read(PredictConfig, "predict", arguments, PREDICT)
    answers = config.output.with_suffix(".jsonl")
    for path in (config.output, answers):  # before hours of answering; an earlier table is its user's
        if path.exists():
            raise InputError(f"output: {path} is there already: give another --output, or remove it")

    import csv

    from affectgpt.emotion_wheel import distinct_labels
    from affectgpt.pipeline import Stages, answer_greedily, load_samples, prepare_synthetic
    from affectgpt.prompts import answer_text
    from grpo_core import distributed

    dist = _start(config.run)
    config = prepare_synthetic(config, dist)
    samples = load_samples(config.data, labelled=False)
    stages = Stages(config, dist, splits=False)
    prompts = stages.prompts(samples, least=0.0)  # answers for what can be read; there is no score to mislead
    _, sampler = stages.policy()
    texts = answer_greedily(sampler, prompts, stages.rollout, dist, progress=True)
    if dist.main_process:
        # gathered already: every rank has all texts, and one of them writes
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.output.open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table)
            writer.writerow(("name", "openset"))
            for prompt, text in zip(prompts, texts, strict=True):
                labels = distinct_labels(answer_text(text, config.prompt.mode))
                writer.writerow((prompt.id, f"[{', '.join(labels)}]"))
        with answers.open("w", encoding="utf-8") as lines:
            for prompt, text in zip(prompts, texts, strict=True):
                lines.write(json.dumps({"name": prompt.id, "answer": text}, ensure_ascii=False) + "\n")
        print(f"{_share(len(prompts), len(samples))} clips: {config.output}")
    distributed.finalize(dist)


def ablations(arguments: Sequence[str]) -> None:
    """Train the rows of the ablation table."""
    from affectgpt.ablations import main as run

    run(arguments)


def report(arguments: Sequence[str]) -> None:
    """Write a run's report again."""
    from affectgpt.report.__main__ import main as run

    run(list(arguments))


def wheel(arguments: Sequence[str]) -> int:
    """Build the emotion tables."""
    from affectgpt.emotion_wheel.__main__ import main as run

    return run(list(arguments))


def synthetic(arguments: Sequence[str]) -> None:
    """Make synthetic clips and tiny models."""
    from affectgpt.synthetic.__main__ import main as run

    run(list(arguments))


class Command(NamedTuple):
    """A subcommand: the function that takes its arguments, and its line in the help. It may return an exit status."""

    run: Callable[[Sequence[str]], int | None]
    summary: str


COMMANDS = {
    "train": Command(train, "AffectGPT-R1: cold start, GRPO, scores and report; without options, an embedded demo"),
    "sft": Command(sft, "supervised training on a label table"),
    "evaluate": Command(evaluate, "score a model on a labelled set"),
    "predict": Command(predict, "name the emotions of clips"),
    "ablations": Command(ablations, "the paper's ablation table, on synthetic clips"),
    "report": Command(report, "write a run's report.html again"),
    "wheel": Command(wheel, "build the emotion wheel's tables from WordNet"),
    "synthetic": Command(synthetic, "make the embedded clips and tiny models"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 1 if the work failed, 2 if an argument, a file or a model was refused.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(_version() if name == "--version" else _help())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return REFUSED
    return run_program(lambda: COMMANDS[name].run(arguments[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: affectgpt COMMAND [options]",
            "",
            "Emotion models that see, hear and read, trained by GRPO.",
            "",
            *lines,
            "",
            "affectgpt COMMAND --help lists the options of a command.",
        ]
    )


def _version() -> str:
    from affectgpt import __version__

    return f"affectgpt {__version__}"


def _read(
    cls: type[Config],
    command: str,
    arguments: Sequence[str],
    description: str,
    default_config: Path | None = None,
) -> Config:
    """Read a command's config; configs that come with the package are found by name.

    Raises:
        ConfigError: the config has a mistake.
        InputError: a folder of the model's cannot hold what it should.
    """
    from affectgpt.configs import CONFIGS
    from grpo_core.config.loader import load_config

    config = load_config(
        cls,
        arguments,
        description=description,
        default_config=default_config,
        config_folder=CONFIGS,
        program=f"affectgpt {command}",
    )
    config.model.check_folders()  # before torch is imported: a mistyped folder is answered at once
    return config


def _share(used: int, total: int) -> str:
    """Write how many of some samples were used."""
    return f"{used:,}" if used == total else f"{used:,} of {total:,}"


def _start(run: RunConfig) -> Distributed:
    """Join the other ranks, let only the main process log notes, and clean up on the way out at a signal."""
    from grpo_core import distributed
    from grpo_core.distributed.stopping import exit_on_signals

    exit_on_signals()
    dist = distributed.init(timeout_seconds=run.rank_timeout, watchdog_seconds=run.watchdog_seconds)
    logging.basicConfig(level=logging.INFO if dist.main_process else logging.ERROR, format="%(message)s")
    return dist
