"""The sections on single answers: held-out clips before and after GRPO, and completions sampled during training."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from affectgpt.report import compare
from affectgpt.report.compare import Pair, SectorLookup
from affectgpt.report.run import Run
from affectgpt.stages import COLD_START, GRPO

if TYPE_CHECKING:
    from affectgpt.data.datasets import Sample
    from affectgpt.emotion_wheel import EmotionWheel


@dataclass(frozen=True)
class Label:
    """An emotion label. `verdict` is its CSS class: `unknown` is on no wheel, "" is not judged (the ground truth)."""

    text: str
    verdict: Literal["hit", "miss", "unknown", ""] = ""


@dataclass(frozen=True)
class Frames:
    """Thumbnails of a clip, or why there are none.

    Attributes:
        images: (alternative text, JPEG in base64) of each thumbnail.
        problem: the sentence of the placeholder; empty if there are images.
        details: the decoder's error message.
    """

    images: list[tuple[str, str]] = field(default_factory=list)
    problem: str = ""
    details: str = ""


@dataclass(frozen=True)
class Answer:
    """One model's answer to a clip; `text` is empty if it says no more than the labels."""

    model: str
    labels: list[Label]
    text: str
    f1: float


@dataclass(frozen=True)
class Clip:
    """A held-out clip with the answers before and after GRPO."""

    name: str
    frames: Frames
    subtitle: str
    truth: list[Label]
    answers: list[Answer]


@dataclass(frozen=True)
class HeldOut:
    """Values of the section on held-out clips: how many of `count` scored clips changed, and the clips to show."""

    count: int
    better: int
    worse: int
    unchanged: int
    improvements: list[Clip]
    failures: list[Clip]


@dataclass(frozen=True)
class Completion:
    """One sampled completion; `rewards` in the order of the group's names, `length` in tokens."""

    text: str
    labels: list[Label]
    rewards: list[float | None]
    reward: float | None
    advantage: float | None
    length: Any
    cut_off: bool


@dataclass(frozen=True)
class CompletionGroup:
    """The best, the middle and the worst of a group's `size` completions."""

    step: float
    prompt: str
    size: int
    mean_reward: float
    truth: list[Label]
    reward_names: list[str]
    members: list[Completion]


@dataclass(frozen=True)
class Completions:
    """Values of the section on completions.

    Attributes:
        one_prompt: the groups are visits to the same prompt.
        labelled: completions were read as emotion labels; those of a text run are not.
    """

    one_prompt: bool
    labelled: bool
    groups: list[CompletionGroup]


def held_out_section(run: Run, samples: Mapping[str, Sample], wheel: EmotionWheel) -> HeldOut | None:
    """Choose improvements and failures among the held-out clips; None unless both evaluations share scored clips."""
    pairs = compare.pairs(run.evaluations.get(COLD_START) or {}, run.evaluations.get(GRPO) or {})
    if not pairs:
        return None
    lookup = SectorLookup(wheel)
    better = sum(pair.change > 0 for pair in pairs)
    worse = sum(pair.change < 0 for pair in pairs)
    improvements, failures = compare.choose(pairs)
    return HeldOut(
        count=len(pairs),
        better=better,
        worse=worse,
        unchanged=len(pairs) - better - worse,
        improvements=[build_clip(pair, samples.get(pair.name), lookup) for pair in improvements],
        failures=[build_clip(pair, samples.get(pair.name), lookup) for pair in failures],
    )


def build_clip(pair: Pair, sample: Sample | None, lookup: SectorLookup) -> Clip:
    """Decode the frames of a clip and judge the labels of both answers."""
    truth = compare.ground_truth_labels(pair.after.get("ground_truth"))
    sectors = lookup.sets(truth)
    answers = []
    for model, answer in (("cold start", pair.before), ("GRPO", pair.after)):
        labels = list(dict.fromkeys(map(str, answer.get("labels") or [])))
        text = str(answer.get("answer") or "")
        answers.append(
            Answer(
                model=model,
                labels=[judged(label, sectors, lookup) for label in labels],
                text="" if is_plain_list(text, labels) else text,
                f1=answer["f1"],
            )
        )
    return Clip(
        name=pair.name,
        frames=read_thumbnails(sample),
        subtitle=getattr(sample, "subtitle", "") or "",
        truth=[Label(label) for label in truth],
        answers=answers,
    )


def judged(label: str, truth: list[set[str]], lookup: SectorLookup) -> Label:
    """Judge a label by the wheels: a hit if it shares its sector with the ground truth on most of them."""
    share = lookup.share(label, truth)
    return Label(label, "unknown" if share is None else "hit" if share > 0.5 else "miss")


def is_plain_list(text: str, labels: Sequence[str]) -> bool:
    """Whether an answer consists only of its labels, apart from tags and brackets."""
    words = re.sub(r"</?\w+>|[\[\]\s]", "", text)
    return words.lower() == re.sub(r"\s", "", ",".join(labels)).lower()


def read_thumbnails(sample: Sample | None, count: int = 3, size: int = 148) -> Frames:
    """Read evenly spaced frames of a clip, `size` pixels square: twice their size on the page, for dense screens."""
    if sample is None:
        return Frames(problem="this clip was not given to the report")
    if sample.video is None:
        return Frames(problem="no video")
    try:
        from PIL import Image

        from affectgpt.data.media import read_frames

        frames = read_frames(sample.video, truncated=True)  # a clip that was used is shown
        images = []
        # Without the first and the last frame, where clips fade or cut.
        for index in np.linspace(0, len(frames) - 1, count + 2).round().astype(int)[1:-1]:
            buffer = io.BytesIO()
            thumbnail = Image.fromarray(frames[index]).resize((size, size), Image.Resampling.LANCZOS)
            thumbnail.save(buffer, "JPEG", quality=72)
            images.append((f"frame {index + 1} of {len(frames)}", base64.b64encode(buffer.getvalue()).decode()))
    except Exception as error:  # a decoder can raise anything on a broken file; the report is written regardless
        return Frames(problem="the video cannot be read", details=str(error))
    return Frames(images)


def completions_section(run: Run, wheel: EmotionWheel) -> Completions | None:
    """Choose groups of completions over training, and of each the best, middle and worst member by reward."""
    groups = compare.follow(run.completions)
    if not groups:
        return None
    lookup = SectorLookup(wheel)
    prompts = {str(rows[0]["prompt_id"]) for rows in groups}
    return Completions(
        one_prompt=len(prompts) == 1 and len(groups) > 1,
        labelled=any("labels" in row for rows in groups for row in rows),
        groups=[build_group(rows, lookup) for rows in groups],
    )


def build_group(rows: Sequence[Mapping[str, Any]], lookup: SectorLookup) -> CompletionGroup:
    """Judge the members of a group that are shown."""

    def rank(row: Mapping[str, Any]) -> float:
        reward = compare.reward_of(row)
        return -reward if math.isfinite(reward) else math.inf  # members that were not judged come last

    ranked = sorted(rows, key=rank)
    shown = sorted({0, (len(ranked) - 1) // 2, len(ranked) - 1})  # a set: small groups repeat positions
    truth = compare.ground_truth_labels(rows[0].get("ground_truth"))
    sectors = lookup.sets(truth)
    names = list(dict.fromkeys(name for row in rows for name in row.get("rewards") or {}))
    return CompletionGroup(
        step=rows[0]["step"],
        prompt=str(rows[0]["prompt_id"]),
        size=len(rows),
        mean_reward=compare.mean_reward(rows),
        truth=[Label(label) for label in truth],
        reward_names=names,
        members=[
            Completion(
                text=str(row.get("text") or ""),
                labels=[judged(label, sectors, lookup) for label in dict.fromkeys(map(str, row.get("labels") or []))],
                rewards=[(row.get("rewards") or {}).get(name) for name in names],
                reward=row.get("reward"),
                advantage=row.get("advantage"),
                length=row.get("length", "–"),
                cut_off=row.get("finish_reason") == "length",
            )
            for row in (ranked[position] for position in shown)
        ],
    )
