"""Text to values: reads YAML and command-line text by the type of the field it is for."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

# What text becomes before a type reads it: null, text as written, or lists and mappings of these.
Raw = None | str | list["Raw"] | dict[str, "Raw"]

_PLAIN = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "none",
}
_BOOLS = {"true": True, "false": False}
_INFINITIES = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf"}  # YAML's spelling, Python's
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}


class ConfigError(ValueError):
    """A configuration is refused; the message names the key, where it was set, and what to do."""


def type_name(kind: Any) -> str:
    """A field's type in words.

    Raises:
        TypeError: a type that no text is read as.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in arguments)
    if origin is list or (origin is tuple and arguments[-1:] == (...,)):
        return f"a list ({type_name(arguments[0])} each)"
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(map(type_name, arguments))})"
    if origin is dict and arguments[0] is str:
        return f"a mapping (name to {type_name(arguments[1])})"
    raise TypeError(f"a config field cannot be of type {kind}")


def read_value(kind: Any, raw: Raw) -> Any:
    """The value of type `kind` that `raw` says.

    Raises:
        ValueError: it says none.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return read_value(member, raw)
            except ValueError:
                continue
    elif origin is Literal:
        for choice in arguments:
            if raw == str(choice):
                return choice
    elif isinstance(raw, list) and origin is list:
        return [read_value(arguments[0], item) for item in raw]
    elif isinstance(raw, list) and origin is tuple:
        kinds = arguments[:1] * len(raw) if arguments[-1:] == (...,) else arguments
        return tuple(read_value(kind, item) for kind, item in zip(kinds, raw, strict=True))
    elif isinstance(raw, dict) and origin is dict:
        return {name: read_value(arguments[1], item) for name, item in raw.items()}
    elif kind is types.NoneType and raw is None:
        return None
    elif isinstance(raw, str) and kind in _PLAIN:
        return _read_plain(kind, raw)
    raise ValueError(f"{raw!r} is not {type_name(kind)}")


def _read_plain(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
    elif kind is float:
        number = float(_INFINITIES.get(text.lower(), text))
        if not math.isnan(number):
            return number
    elif kind is Path:
        if text:
            return Path(text).expanduser()
    elif kind is not types.NoneType:
        return kind(text)
    raise ValueError(f"{text!r} is not {type_name(kind)}")


def parse_inline(kind: Any, text: str) -> Raw:
    """A command line's text, split where `kind` wants a list (`a,b` or `[a, b]`) or a mapping (`{a: 1}`); `none` is
    null.

    Raises:
        ValueError: brackets that are no YAML.
    """
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if types.NoneType in members and text.lower() in ("none", "null"):
        return None
    origins = {get_origin(member) for member in members}
    if (text.startswith("[") and origins & {list, tuple}) or (text.startswith("{") and dict in origins):
        try:
            return to_raw(yaml.compose(text, yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r} is not {type_name(kind)}") from error
    if origins & {list, tuple}:
        return [item.strip() for item in text.split(",")] if text else []
    return text


def read_yaml(path: Path) -> yaml.MappingNode | None:
    """The mapping that a YAML file holds, as nodes with line numbers; None for an empty file. Nothing is constructed.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a config file is a mapping of keys to values")
    return node


def to_raw(node: yaml.Node) -> Raw:
    """A YAML node's text.

    Raises:
        ValueError: a tag such as `!!python/object`, or a key that is given twice.
    """
    if node.tag not in _TAGS:
        raise ValueError(f"the tag {node.tag} is not read")
    if isinstance(node, yaml.MappingNode):
        return {key: to_raw(value) for key, value in mapping_items(node)}
    if isinstance(node, yaml.SequenceNode):
        return [to_raw(item) for item in node.value]
    return None if node.tag.endswith(":null") else node.value


def mapping_items(node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    """A YAML mapping's keys and values.

    Raises:
        ValueError: a key that is no text, or is given twice.
    """
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError("a key is a word, not a list or a mapping")
        if key.value in seen:
            raise ValueError(f"the key {key.value!r} is given twice (again in line {key.start_mark.line + 1})")
        seen[key.value] = value
    return list(seen.items())
