"""Small pieces of HTML, every text escaped on its way in."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # nothing a page may hold; a model can write them


def escape(value: object) -> str:
    """Text for element content or a quoted attribute."""
    return html.escape(_CONTROL.sub("\ufffd", str(value)))


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def tone(change: float) -> str:
    """Class of a change: good, bad, or none where it is not a number or too small to be either."""
    if not math.isfinite(change) or abs(change) < 5e-3:
        return ""
    return "good" if change > 0 else "bad"


def key(label: str, colour: str, kind: str = "") -> str:
    """One entry of a legend."""
    return f'<span class="key {kind}" style="--k: var(--{colour})">{escape(label)}</span>'


def figure(title: str, svg: str, legend: str = "", note: str = "", kind: str = "") -> str:
    note = f'<div class="note">{escape(note)}</div>' if note else ""
    return f'<figure class="{kind}"><figcaption><b>{escape(title)}</b>{legend}{note}</figcaption>{svg}</figure>'


def table(head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; `head` holds `<th>`s, `rows` holds `<tr>`s."""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def shorten(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
