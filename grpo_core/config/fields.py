"""Fields of config dataclasses: their types, choices and defaults, and the check of their values."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

# Text from YAML or the command line before a field's type reads it: null, text as written, or lists and mappings of it.
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


class ConfigError(ValueError):
    """A configuration is refused; the message names the key, where it was set, and what to do."""


class Choices(Protocol):
    """Names that a field accepts: a `Registry`, or a tuple where there is nothing to register."""

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


class ConfigSection:
    """Base class of config dataclasses: checks every field when an instance is made, from Python too.

    ```python
    @dataclass
    class DataConfig(ConfigSection, key="data"):         # key: how messages name the section
        format: str = option("mer2025", choices=LAYOUTS)  # a registry, or a tuple of names
        layout: Layout = chosen_by("format")              # the options of LAYOUTS[format], checked and filled in
        root: Path | None = None                          # a str is taken as a Path, a list as a tuple

        def __post_init__(self) -> None:
            super().__post_init__()                       # first: what follows may rely on types
    ```
    """

    config_key: ClassVar[str] = ""

    def __init_subclass__(cls, key: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.config_key = key

    def __post_init__(self) -> None:
        check_fields(self, self.config_key)


def option(default: Any, *, choices: Choices) -> Any:
    """A field that accepts only the names in `choices` (and None, where its type has it)."""
    return field(default=default, metadata={"choices": choices})


def chosen_by(selector: str) -> Any:
    """A field that holds the options of the registry entry that the field `selector`, above it, names.

    `selector`'s choices are the `Registry`, whose entries are frozen dataclasses. The field accepts an instance of the
    entry, a mapping of option values, or nothing; after the check it is an instance.
    """
    return field(default=None, metadata={"chosen_by": selector})


def plugin_files() -> Any:
    """A field of type `tuple[Path, ...]` whose files `load_config` imports before it checks any option."""
    return field(default=(), metadata={"plugins": True})


# --- the fields of a class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One field of a config class.

    Attributes:
        key: dotted path from the top of the config.
        type: its annotation; for a field made by `chosen_by`, the class of the entry that is named.
        default: its value where nothing sets it; MISSING where something must.
        choices: names that it accepts; None for any.
        selects: key of the section whose options this field chooses; empty for most.
        plugins: whether it lists plug-in files.
    """

    name: str
    key: str
    type: Any
    default: Any
    choices: Any = None
    selects: str = ""
    plugins: bool = False


def members(
    cls: type, default: Any = MISSING, prefix: str = "", names: Mapping[str, str] | None = None
) -> list[Member]:
    """The fields of a config class, in the order of the source.

    Args:
        default: an instance whose values are the defaults, instead of the class's own.
        prefix: of the keys, with its dot.
        names: chosen entries by key of their selector, where they are not the defaults.

    Raises:
        TypeError: a field of a type that cannot be read from text.
    """
    hints = field_types(cls)
    selects = {f.metadata["chosen_by"]: f"{prefix}{f.name}" for f in fields(cls) if "chosen_by" in f.metadata}
    found: dict[str, Member] = {}
    for f in fields(cls):
        if not f.init:
            continue
        kind, value = hints[f.name], field_default(f) if default is MISSING else getattr(default, f.name)
        if "chosen_by" in f.metadata:
            selector = found[f.metadata["chosen_by"]]
            kind = selector.choices[(names or {}).get(selector.key, selector.default)]
            if type(value) is not kind:
                value = MISSING  # the defaults of another entry say nothing about this one
        elif not is_section(kind):
            type_name(kind)  # a type that cannot be read fails here, whether or not anything sets the field
        found[f.name] = Member(
            f.name,
            prefix + f.name,
            kind,
            value,
            f.metadata.get("choices"),
            selects.get(f.name, ""),
            f.metadata.get("plugins", False),
        )
    return list(found.values())


def options(
    cls: type, names: Mapping[str, str] | None = None, default: Any = MISSING, prefix: str = ""
) -> dict[str, Member]:
    """Every option of a config class by dotted key, sections included; arguments as `members`."""
    found: dict[str, Member] = {}
    for member in members(cls, default, prefix, names):
        if is_section(member.type):
            found |= options(member.type, names, member.default, f"{member.key}.")
        else:
            found[member.key] = member
    return found


def is_section(kind: Any) -> bool:
    """Whether a field of this type is a section: a dataclass with options of its own."""
    return isinstance(kind, type) and is_dataclass(kind)


@cache
def field_types(cls: Any) -> dict[str, Any]:
    """Annotations of a dataclass, resolved."""
    return get_type_hints(cls)


def field_default(f: Field[Any]) -> Any:
    """A field's default, made if need be; MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


# --- checks of values from Python --------------------------------------------------------------------------------


def check_fields(config: Any, key: str = "") -> None:
    """Check the types and choices of an instance's fields, and fill in those made by `chosen_by`.

    Raises:
        ValueError: naming the key, the value and what is accepted.
    """
    cls: Any = type(config)
    hints, prefix = field_types(cls), f"{key}." if key else ""
    for f in fields(config):
        if not f.init:
            continue
        name, value, kind = f.name, getattr(config, f.name), hints[f.name]
        if "chosen_by" in f.metadata:
            checked = _entry_options(config, f, value, prefix)
        elif is_section(kind):
            if not isinstance(value, kind):
                raise ValueError(f"{prefix}{name} is {value!r}: it wants {kind.__name__}")
            continue
        else:
            checked = check_value(prefix + name, kind, value, f.metadata.get("choices"))
        if checked is not value:  # past a frozen dataclass's own setattr; its maker has not seen the instance yet
            object.__setattr__(config, name, checked)  # options of a registry entry are frozen


def check_value(key: str, kind: Any, value: Any, choices: Choices | None = None) -> Any:
    """A value from Python as a field of type `kind` holds it: a str as a Path, a list as a tuple, others as they are.

    Raises:
        ValueError: it is of another type, or not among the choices.
    """
    try:
        return _convert(kind, value, choices, _check_plain)
    except ValueError:
        raise ValueError(f"{key} is {value!r}: it wants {type_name(kind, choices)}") from None


def no_option(key: str, selector: str, name: str, entry: type, source: str = "") -> str:
    """The refusal of an option that the chosen entry does not have."""
    known = ", ".join(f.name for f in fields(entry) if f.init)
    return f"{key}{source} is no option of {selector} {name}: it has {known or 'none'}"


def _entry_options(config: Any, f: Field[Any], value: Any, prefix: str) -> Any:
    selector, key = f.metadata["chosen_by"], prefix + f.name
    (registry,) = (other.metadata["choices"] for other in fields(config) if other.name == selector)
    name = getattr(config, selector)
    entry = registry[name]
    if value is None or (type(value) is not entry and _holds_defaults(value)):
        # `replace(config, loss_type="cispo")` passes on the old type's options: they say nothing if nobody set them
        value = {}
    if isinstance(value, Mapping):
        hints = {other.name: (field_types(entry)[other.name], other) for other in fields(entry) if other.init}
        for option_name in value:
            if option_name not in hints:
                raise ValueError(no_option(f"{key}.{option_name}", selector, name, entry))
        value = entry(
            **{
                option_name: check_value(
                    f"{key}.{option_name}", hints[option_name][0], item, hints[option_name][1].metadata.get("choices")
                )
                for option_name, item in value.items()
            }
        )
    if type(value) is not entry:
        raise ValueError(f"{key} is {value!r}: {selector} {name} wants {entry.__name__}, or a mapping of its options")
    check_fields(value, key)
    return value


def _holds_defaults(value: Any) -> bool:
    """Whether an instance is as its class makes it from nothing."""
    return is_dataclass(value) and all(getattr(value, f.name) == field_default(f) for f in fields(value))


def _check_plain(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
            return value
    elif kind is Path and isinstance(value, str):
        return _read_plain(Path, value)
    elif isinstance(value, bool) and kind is not bool:
        pass  # Python counts True as an int; nobody means 1 by it
    elif isinstance(value, (int, float) if kind is float else kind) and value == value:  # not NaN
        return value
    raise ValueError


# --- values from text --------------------------------------------------------------------------------------------


def type_name(kind: Any, choices: Choices | None = None) -> str:
    """A field's type in words.

    Raises:
        TypeError: a type that cannot be read from text.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if choices is not None:
        return f"one of {', '.join(choices)}" + " or none" * (types.NoneType in arguments)
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


def read_value(kind: Any, raw: Raw, choices: Choices | None = None) -> Any:
    """The value of type `kind` that text stands for.

    Raises:
        ValueError: it cannot be read as one, or is not among the choices.
    """
    return _convert(kind, raw, choices, _read_plain)


def _convert(kind: Any, value: Any, choices: Choices | None, plain: Callable[[Any, Any], Any]) -> Any:
    """Walk into unions, lists and mappings; `plain` takes what is none of these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return _convert(member, value, None if member is types.NoneType else choices, plain)
            except ValueError:
                continue
    elif origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, None, plain) for item in value]
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return tuple(_convert(kind, item, None, plain) for kind, item in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {
            _convert(str, name, None, plain): _convert(arguments[1], item, None, plain) for name, item in value.items()
        }
    elif origin in (None, Literal):
        found = plain(kind, value)
        if choices is None or found in choices:
            return found
    raise ValueError


def _read_plain(kind: Any, raw: Raw) -> Any:
    if kind is types.NoneType and raw is None:
        return None
    if not isinstance(raw, str):
        raise ValueError
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if raw == str(choice):
                return choice
    elif kind is bool:
        if raw.lower() in _BOOLS:
            return _BOOLS[raw.lower()]
    elif kind is float:
        number = float(_INFINITIES.get(raw.lower(), raw))
        if not math.isnan(number):
            return number
    elif kind is Path:
        if raw:  # Path("") is the current folder, which nobody means by an empty value
            return Path(raw).expanduser()
    elif kind is not types.NoneType:
        return kind(raw)
    raise ValueError
