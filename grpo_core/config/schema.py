"""What a config class offers: its options by dotted key, with the types, defaults and docs that `--help` prints."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from grpo_core.config.values import type_name


@dataclass(frozen=True)
class Option:
    """One field that can be set.

    Attributes:
        type: its annotation.
        default: its value when nothing sets it; MISSING where something must.
        doc: the string that follows it in the class.
    """

    type: Any
    default: Any
    doc: str


def options(cls: type, default: Any = MISSING, prefix: str = "") -> dict[str, Option]:
    """Every option of a config class by dotted key, in the order of the source.

    Raises:
        TypeError: a field's type is none that text is read as.
    """
    hints, docs = get_type_hints(cls), field_docs(cls)
    found: dict[str, Option] = {}
    for field in (field for field in fields(cls) if field.init):
        value = field_default(field) if default is MISSING else getattr(default, field.name)
        if is_dataclass(hints[field.name]):
            found |= options(hints[field.name], value, f"{prefix}{field.name}.")
        else:
            type_name(hints[field.name])  # a type that is not read fails here, whatever is given
            found[prefix + field.name] = Option(hints[field.name], value, docs.get(field.name, ""))
    return found


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, its bases included; none where there is no source to read."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError):
            continue
        for field, below in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def help_text(cls: type, description: str = "", default_config: Path | None = None) -> str:
    """What `--help` prints; the defaults it shows are the dataclasses'."""
    head = f"{description.strip()}\n\n" if description else ""
    usage = (
        f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml ...] [--section.key VALUE ...]\n\n"
        "Later config files override earlier ones, and the command line overrides files.\n"
    )
    instead = f"Without --config, {default_config} is read.\n" if default_config else ""
    return head + usage + instead + "\n".join(_help_lines(cls, options(cls), ""))


def _help_lines(cls: type, schema: dict[str, Option], prefix: str) -> list[str]:
    """A section's own fields, then its sections."""
    lines: list[str] = []
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.init]
    for name in names:
        if prefix + name in schema:
            option = schema[prefix + name]
            state = "required" if option.default is MISSING else f"default: {_shown(option.default)}"
            text = f"{option.doc} ({state})".strip()
            lines.append(f"  --{prefix}{name}  {type_name(option.type)}")
            lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for name in names:
        if is_dataclass(hints[name]):
            summary = (hints[name].__doc__ or "").partition("\n")[0]
            generated = summary.startswith(f"{hints[name].__name__}(")  # dataclass writes one where there is none
            lines += ["", f"{prefix}{name}" if generated else f"{prefix}{name}: {summary}"]
            lines += _help_lines(hints[name], schema, f"{prefix}{name}.")
    return lines


def field_default(field: Field) -> Any:
    """A dataclass field's default, made if need be; MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value)) or "empty"
    return str(value) or "empty"
