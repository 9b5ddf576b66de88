"""Names and labels of a run's stages: their folders, their evaluations, and their descriptions in reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

UNTRAINED = "untrained"
COLD_START = "cold_start"
SFT_CONTINUED = "sft_continued"
GRPO = "grpo"
SHUFFLED_MEDIA = "shuffled_media"


# what a run writes into its folder beside the engine's files; stages have folders of their own
RUN_FILES = ("summary.json", "evaluations", COLD_START, SFT_CONTINUED)


@dataclass(frozen=True)
class StageLabel:
    """Description of a stage and of the evaluation after it.

    Attributes:
        title: two or three words, for table rows and legends.
        description: the training or change, in one phrase.
        role: `before` and `after` are the two scores that a run compares; a `control` is measured beside them.
        supervised: the stage is supervised training, with its curves in `<stage>/metrics.jsonl`.
    """

    title: str
    description: str = ""
    role: Literal["before", "after", "control", ""] = ""
    supervised: bool = False


# The keys name `evaluations/<stage>.json`, `<stage>_f1` in `summary.json` and the folders of supervised stages, so
# renaming one orphans the files of earlier runs. The order is that of the report's tables.
STAGE_LABELS = {
    UNTRAINED: StageLabel("Untrained", "the model as initialised"),
    COLD_START: StageLabel(
        "Cold start", "supervised, until the validation score stopped rising", "before", supervised=True
    ),
    SFT_CONTINUED: StageLabel(
        "Supervised, continued",
        "control: the cold start trained on for as long as GRPO ran",
        "control",
        supervised=True,
    ),
    GRPO: StageLabel("GRPO", "the cold start, then trained on the emotion-wheel reward", "after"),
    SHUFFLED_MEDIA: StageLabel(
        "GRPO, clips swapped", "control: the same model, each question with another sample's clip", "control"
    ),
}


def stage_label(name: str) -> StageLabel:
    """Return a stage's label; an evaluation that a user added is titled by its name and shown as a control."""
    return STAGE_LABELS.get(name) or StageLabel(name.replace("_", " ").capitalize(), role="control")


def in_stage_order(names: Iterable[str]) -> list[str]:
    """Sort names in the order of `STAGE_LABELS`, unknown ones after them alphabetically."""
    found = set(names)
    return [name for name in STAGE_LABELS if name in found] + sorted(found - STAGE_LABELS.keys())
