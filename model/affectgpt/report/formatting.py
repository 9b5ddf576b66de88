"""Format numbers and strings as text of the page; the templates use these functions as filters."""

from __future__ import annotations

import math
import re
from typing import Any

from markupsafe import Markup

# C0 controls but for tab and newline, DEL, and lone surrogates: invalid in HTML (a surrogate cannot even be encoded as
# UTF-8), and a sampled completion can contain any of them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def printable(value: Any) -> str:
    """Convert a value to text, replacing control characters and lone surrogates by U+FFFD.

    This is jinja2's `finalize`: it runs on the result of every `{{ expression }}`, before the escape. Markup stays
    Markup, so macros and figures are filtered as well but not escaped twice.
    """
    text = _UNPRINTABLE.sub("\ufffd", str(value))
    return Markup(text) if isinstance(value, Markup) else text


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Format a number with a true minus sign (U+2212); a dash if the value is missing, not a number or not finite."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:  # neither "-0.00" nor "+0.00"
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def integer(value: float) -> str:
    """Format a whole number with separators between thousands."""
    return f"{value:,.0f}"


def percentage(value: float) -> str:
    """Format a fraction as whole percent, `0.5` → `50%`."""
    return f"{value:.0%}"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: `1 clip`, `1,200 clips`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shorten(text: str, limit: int = 600) -> str:
    """Cut a text to at most `limit` characters; an ellipsis shows that some are missing."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def tone(change: float) -> str:
    """Return the CSS class of a change: `good`, `bad`, or empty if it is not finite or would be printed as 0.00."""
    if not math.isfinite(change) or abs(change) < 5e-3:
        return ""
    return "good" if change > 0 else "bad"


FILTERS = {
    "integer": integer,
    "number": number,
    "percentage": percentage,
    "plural": plural,
    "shorten": shorten,
    "tone": tone,
}
