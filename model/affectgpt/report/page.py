"""Assemble the page: build each section's values from the run and render them through the templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from affectgpt.report.clips import completions_section, held_out_section
from affectgpt.report.formatting import FILTERS, printable
from affectgpt.report.result import result_section
from affectgpt.report.run import Run
from affectgpt.report.settings import settings_section
from affectgpt.report.training import supervised_section, time_section, training_section
from affectgpt.report.wheels import wheels_section

if TYPE_CHECKING:
    from affectgpt.data.datasets import Sample
    from affectgpt.emotion_wheel import EmotionWheel

# Anchor → link text, in the order of the page. The template of a section is `<anchor>.html.j2`; the variable that it
# reads is the anchor with underscores.
SECTIONS = {
    "result": "Result",
    "wheels": "Emotion wheels",
    "held-out": "Held-out clips",
    "training": "GRPO training",
    "completions": "Completions",
    "supervised": "Supervised training",
    "time": "Time",
    "settings": "Settings",
}


def template_environment() -> Environment:
    """Make the report's jinja2 environment, which escapes every value and fails on a name that a template misspells."""
    environment = Environment(
        loader=PackageLoader("affectgpt.report"),  # `templates/` beside this file, from a checkout or a wheel
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def render_page(run: Run, samples: Mapping[str, Sample], wheel: EmotionWheel) -> str:
    """Render the report of a run as one HTML document.

    Args:
        samples: the clips by name; those that are missing or cannot be decoded get a placeholder.
        wheel: names the sectors, and recomputes the scores of which intervals are computed.
    """
    result = result_section(run, wheel)
    values = {
        "result": result,
        "wheels": wheels_section(run, wheel),
        "held-out": held_out_section(run, samples, wheel),
        "training": training_section(run),
        "completions": completions_section(run, wheel),
        "supervised": supervised_section(run),
        "time": time_section(run),
        "settings": settings_section(run),
    }
    shown = {anchor: title for anchor, title in SECTIONS.items() if values[anchor] is not None}
    page = template_environment().get_template("page.html.j2")
    return page.render(
        name=run.name,
        seed=run.summary.get("seed"),
        notes=run.notes + (result.notes if result else []),
        scored=bool(run.evaluations),  # a text run has no emotions to speak of
        sections=shown,
        **{anchor.replace("-", "_"): values[anchor] for anchor in shown},
    )
