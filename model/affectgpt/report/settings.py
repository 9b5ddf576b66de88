"""The settings section: the summary's other entries, the software, and the run's configuration verbatim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from affectgpt.report.run import Run
from grpo_core.storage.environment import software_versions


@dataclass(frozen=True)
class Settings:
    """Values of the settings section.

    Attributes:
        facts: plain entries of `summary.json`, and of its `environment` if it has one.
        versions: software on this machine, if the run recorded none.
        config: `config.yaml`, empty if there is none.
    """

    facts: dict[str, Any]
    versions: dict[str, str]
    config: str


def settings_section(run: Run) -> Settings:
    """Build the settings section. Scores are left out; the result section has them."""
    facts = {
        name: value
        for name, value in run.summary.items()
        if not name.endswith("_f1") and isinstance(value, (str, int, float, bool))
    }
    environment = run.summary.get("environment")
    if isinstance(environment, dict):
        facts |= environment
        versions = {}
    else:
        versions = software_versions()
    return Settings(facts, versions, run.config.strip())
