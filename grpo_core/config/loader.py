"""Configuration of a program: dataclasses that say what there is, YAML files and command-line overrides that say what
to use.

A value is text, in YAML and on the command line alike, until the type of its field reads it. So `1e-5` is a number
wherever a float is wanted (YAML alone would make it a string), `no` is a name wherever a string is, and both sources
obey one rule.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from grpo_core.config.schema import Option, field_default, help_text, options
from grpo_core.config.values import (
    ConfigError,
    Raw,
    mapping_items,
    parse_inline,
    read_value,
    read_yaml,
    to_raw,
    type_name,
)

Config = TypeVar("Config")


COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """What a source says about an option, still text."""

    raw: Raw
    source: str


def load_config(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    default_config: Path | None = None,
    config_folder: Path | None = None,
) -> Config:
    """Build a config from its defaults, then `--config FILE.yaml` in the order given, then `--section.key value`.

    `section.key=value`, `--section.key=value`, and a bare `--key value` where only one section has that key, are the
    same; `--flag` alone sets a bool. `--help` prints every key with its type, default and doc.

    Args:
        cls: a dataclass; its fields are bool, int, float, str, Path, Literal, `X | None`, tuple, list, `dict[str, X]`
            or dataclasses.
        argv: arguments without the program's name. None takes the process's own and, on a mistake, prints it and
            exits with status 2; with `argv` given, mistakes are raised.
        description: opens the help.
        default_config: the file that is read where no `--config` is given.
        config_folder: where `--config NAME` finds `NAME.yaml`, unless there is a file NAME.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a combination that the dataclass refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, description, default_config))
        raise SystemExit(0)
    try:
        return _load(cls, arguments, default_config, config_folder)
    except ConfigError as error:
        if argv is not None:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_dict(config: Any) -> Any:
    """A config in YAML's types: dataclasses as dicts, tuples as lists, paths as strings."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config) if field.init}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


class _Dumper(yaml.SafeDumper):
    """Quotes text so that every character of it is read back."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # YAML's own line breaks beside \n: outside double quotes they are read as spaces
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def save_config(config: Any, path: Path) -> None:
    """Write a config as the YAML file that `--config` reads back to an equal one."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    Path(path).write_text(text, encoding="utf-8")


def _load(cls: type[Config], arguments: list[str], default_config: Path | None, config_folder: Path | None) -> Config:
    schema = options(cls)
    pairs = list(_pairs(arguments, schema))
    files = [text for key, text in pairs if key == "config"] or ([str(default_config)] if default_config else [])
    given: dict[str, Given] = {}
    for file in files:
        node = read_yaml(_find_config(file, config_folder))
        if node is not None:
            _read_section(node, file, "", schema, given)
    for key, text in pairs:
        if key != "config":
            _read_override(key, text, schema, given)
    return _build(cls, MISSING, "", given)


def _find_config(name: str, folder: Path | None) -> Path:
    """A config file by path, or by name in the folder of those that come with the program."""
    path = Path(name)
    if folder is None or path.exists() or path.suffix:
        return path
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"--config {name}: no such file, and no config of that name: there are {', '.join(known)}")
    return folder / f"{name}.yaml"


def _pairs(arguments: list[str], schema: dict[str, Option]) -> Iterator[tuple[str, str]]:
    """Keys and texts of a command line; keys are complete."""
    rest = list(reversed(arguments))
    while rest:
        token = rest.pop()
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") and not equals:
            raise ConfigError(f"{token!r} is no option: write --section.key value, or section.key=value")
        key = name if name == "config" else _complete(name, schema)
        if not equals:
            last = not rest or rest[-1].startswith("--")
            if last and key in schema and schema[key].type is bool:
                text = "true"
            elif last:
                raise ConfigError(f"--{name} needs a value")
            else:
                text = rest.pop()
        yield key, text


def _complete(name: str, schema: dict[str, Option]) -> str:
    """A key from its last part, where that is enough."""
    matches = [key for key in schema if key.rpartition(".")[2] == name]
    if name in schema or not matches:
        return name
    if len(matches) > 1:
        raise ConfigError(f"--{name} may be {' or '.join(f'--{key}' for key in matches)}: write one of them")
    return matches[0]


def _read_section(
    node: yaml.MappingNode, file: str, prefix: str, schema: dict[str, Option], given: dict[str, Given]
) -> None:
    """Collect what a YAML mapping sets."""
    source = f"{file}:{node.start_mark.line + 1}"
    try:
        for name, value in mapping_items(node):
            key, source = prefix + name, f"{file}:{value.start_mark.line + 1}"
            if key in schema:
                given[key] = Given(to_raw(value), source)
            elif not any(other.startswith(f"{key}.") for other in schema):
                raise _unknown(key, source, schema)
            elif isinstance(value, yaml.MappingNode):
                _read_section(value, file, f"{key}.", schema, given)
            elif to_raw(value) is not None:  # a section may be empty
                raise ConfigError(f"{key} ({source}) is a section: give its keys below it")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read_override(key: str, text: str, schema: dict[str, Option], given: dict[str, Given]) -> None:
    """Collect what one command-line pair sets: an option, or an entry of a mapping."""
    parent, _, entry = key.rpartition(".")
    try:
        if key in schema:
            given[key] = Given(parse_inline(schema[key].type, text), COMMAND_LINE)
        elif parent in schema and get_origin(schema[parent].type) is dict:
            before = given[parent].raw if parent in given else _as_text(schema[parent].default)
            if isinstance(before, dict):  # else the file's value is refused when it is read
                text_of_entry = parse_inline(get_args(schema[parent].type)[1], text)
                given[parent] = Given({**before, entry: text_of_entry}, COMMAND_LINE)
        else:
            raise _unknown(key, COMMAND_LINE, schema)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key} ({COMMAND_LINE}): {error}") from error


def _build(cls: type[Config], default: Any, prefix: str, given: dict[str, Given]) -> Config:
    """A dataclass from what is given and its defaults, or those of the instance that is its section's default."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in (field for field in fields(cls) if field.init):
        key, kind = prefix + field.name, hints[field.name]
        value = field_default(field) if default is MISSING else getattr(default, field.name)
        if is_dataclass(kind):
            value = _build(kind, value, f"{key}.", given)
        elif key in given:
            try:
                value = read_value(kind, given[key].raw)
            except ValueError:
                shown = "null" if given[key].raw is None else repr(given[key].raw)
                raise ConfigError(f"{key} ({given[key].source}) is {shown}: it wants {type_name(kind)}") from None
        elif value is MISSING:
            raise ConfigError(f"{key} must be given: add --{key} ({type_name(kind)}), or set it in a config file")
        arguments[field.name] = value
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _as_text(default: Any) -> Raw:
    """A mapping's default as if it were given, to add entries to."""
    return {} if default is MISSING else {name: str(value) for name, value in default.items()}


def _unknown(key: str, source: str, schema: dict[str, Option]) -> ConfigError:
    """The refusal of a key, with the nearest one that exists."""
    by_leaf = {name.rpartition(".")[2]: name for name in schema}
    leaf = key.rpartition(".")[2]
    near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(key, schema, 1)
    near += [by_leaf[other] for other in difflib.get_close_matches(leaf, by_leaf, 1)]
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ConfigError(f"unknown key {key!r} ({source}){hint} --help lists every key")
