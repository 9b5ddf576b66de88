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
        versions: software of the run's last start, or on this machine if the run recorded none.
        recorded: whether the run recorded them.
        config: `config.yaml`, empty if there is none.
    """

    facts: dict[str, Any]
    versions: dict[str, str]
    recorded: bool
    config: str


def settings_section(run: Run) -> Settings:
    """Build the settings section. Scores are left out; the result section has them."""
    facts = {
        name: value
        for name, value in run.summary.items()
        if not name.endswith("_f1") and isinstance(value, (str, int, float, bool))
    }
    recorded = run.sessions[-1].get("versions") if run.sessions else None
    versions: dict[str, str] = {}
    environment = run.summary.get("environment")
    if isinstance(environment, dict):
        facts |= environment
    else:
        versions = recorded if isinstance(recorded, dict) else software_versions()
    return Settings(facts, versions, isinstance(recorded, dict), run.config.strip())
