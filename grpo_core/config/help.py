"""Write the text that `--help` prints: every option by section, with its type, default and doc."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

from grpo_core.config.fields import Member, is_section, members, type_name


def help_text(
    cls: type,
    description: str = "",
    default_config: str = "",
    names: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
    program: str = "",
) -> str:
    """Write the help of a config class.

    Args:
        description: its first paragraph.
        default_config: the config that is read without `--config`, as `--config` would name it.
        names: registry entries that config files choose, by key of their selector.
        values: values that config files set, by key; shown as defaults, which they are for the command line.
        program: the program's name in the usage line; by default the script's.
    """
    head = f"{description.strip()}\n\n" if description else ""
    usage = (
        f"usage: {program or Path(sys.argv[0]).name} [--config FILE.yaml ...] [--section.key VALUE ...]\n\n"
        "Later config files override earlier ones, and the command line overrides files.\n"
    )
    instead = f"Without --config, {default_config} is read.\n" if default_config else ""
    return head + usage + instead + "\n".join(_Help(names or {}, values or {}).section(cls, MISSING, ""))


class _Help:
    def __init__(self, names: Mapping[str, str], values: Mapping[str, Any]):
        self.names, self.values = names, values

    def section(self, cls: type, default: Any, prefix: str) -> list[str]:
        """Write a section's options, then the sections within it."""
        fields = members(cls, default, prefix, self.names)
        docs = field_docs(cls)
        # plain options come first: below a section's heading they would look like options of that section
        lines: list[str] = []
        for member in fields:
            if not is_section(member.type):
                value = self.values.get(member.key, member.default)
                state = "required" if value is MISSING else f"default: {_shown(value)}"
                lines.append(f"  --{member.key}  {type_name(member.type, member.choices)}")
                text = f"{docs.get(member.name, '')} ({state})".strip()
                lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        chosen = {member.selects: member for member in fields if member.selects}
        for member in fields:
            if member.key in chosen:
                lines += self.choices(chosen[member.key], member)
            elif is_section(member.type):
                lines += _heading(member.key, (member.type.__doc__ or "").partition("\n")[0], member.type)
                lines += self.section(member.type, member.default, f"{member.key}.")
        return lines

    def choices(self, selector: Member, section: Member) -> list[str]:
        """Write a block for each entry that may be chosen; entries with the same options share their lines."""
        lines: list[str] = []
        printed: dict[tuple[str, ...], str] = {}
        chosen = self.names.get(selector.key, selector.default)
        for name in selector.choices:
            entry = selector.choices[name]
            # config files set options of the entry that they choose, not of others
            reader = self if name == chosen else _Help(self.names, {})
            default = section.default if name == chosen else MISSING
            block = tuple(reader.section(entry, default, f"{section.key}."))
            lines += _heading(f"{section.key} for {selector.name} {name}", selector.choices.doc(name), entry)
            lines += [f"  the options of {printed[block]}"] if block and block in printed else block
            printed.setdefault(block, name)
        return lines


def field_docs(cls: type) -> dict[str, str]:
    """Read the string literal under each field of a dataclass and its bases; none where the source is unavailable."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # a subclass's doc of a field replaces its base's
        if not is_dataclass(base):
            continue
        try:  # from the source, as Python keeps no string that follows a field
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # a class made in a console or by `make_dataclass` has no source file
            continue
        for field, below in itertools.pairwise(getattr(definition, "body", [])):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _heading(title: str, summary: str, cls: type) -> list[str]:
    if summary and not summary.startswith(f"{cls.__name__}("):  # dataclass writes that where there is no docstring
        title = f"{title}: {summary}"
    return ["", *textwrap.wrap(title, 116, subsequent_indent="    ")]


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
