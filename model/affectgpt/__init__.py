"""AffectGPT: an open-vocabulary emotion model over video, audio and subtitle.

Names are imported on first use, so that `import affectgpt` needs neither torch nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo_kernels import __version__  # one distribution, one version; this import needs no torch either

if TYPE_CHECKING:
    from affectgpt.config import R1Config, SupervisedConfig, TaskConfig
    from affectgpt.data.datasets import Sample, load_folder, load_jsonl, load_mer2025, load_mer2026, load_ovmerd_plus
    from affectgpt.data.features import FeatureStore, extract_features
    from affectgpt.emotion_wheel import EmotionWheel, parse_labels
    from affectgpt.evaluation import Evaluation, score_answers
    from affectgpt.modeling.affectgpt import AffectGPT
    from affectgpt.modeling.encoders import Encoders
    from affectgpt.pipeline import Stages
    from affectgpt.prompts import answer_text, build_prompt, build_target
    from affectgpt.report import write_report
    from affectgpt.rewards import RewardConfig, make_rewards

_MODULES = {
    "config": ("R1Config", "SupervisedConfig", "TaskConfig"),
    "data.datasets": ("Sample", "load_folder", "load_jsonl", "load_mer2025", "load_mer2026", "load_ovmerd_plus"),
    "data.features": ("FeatureStore", "extract_features"),
    "emotion_wheel": ("EmotionWheel", "parse_labels"),
    "evaluation": ("Evaluation", "score_answers"),
    "modeling.affectgpt": ("AffectGPT",),
    "modeling.encoders": ("Encoders",),
    "pipeline": ("Stages",),
    "prompts": ("answer_text", "build_prompt", "build_target"),
    "report": ("write_report",),
    "rewards": ("RewardConfig", "make_rewards"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AffectGPT",
    "EmotionWheel",
    "Encoders",
    "Evaluation",
    "FeatureStore",
    "R1Config",
    "RewardConfig",
    "Sample",
    "Stages",
    "SupervisedConfig",
    "TaskConfig",
    "__version__",
    "answer_text",
    "build_prompt",
    "build_target",
    "extract_features",
    "load_folder",
    "load_jsonl",
    "load_mer2025",
    "load_mer2026",
    "load_ovmerd_plus",
    "make_rewards",
    "parse_labels",
    "score_answers",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


# `python -m` of a module that is no program would end with status 0, having done nothing
if getattr(sys, "argv", [""])[:1] == ["-m"]:
    from grpo_kernels._module_run import refuse_module_run

    refuse_module_run(__name__, __path__[0])
