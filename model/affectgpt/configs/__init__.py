"""Configs that come with the package; `--config NAME` finds them by name."""

from pathlib import Path

CONFIGS = Path(__file__).parent
