"""Describe the fields of config dataclasses (types, choices, defaults) and check their values."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from grpo_core.errors import InputError

# A value from YAML or the command line, before its field's type reads it: null, text, or lists and mappings of these.
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
# Python's float() refuses YAML's spelling with the dot
_INFINITIES = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf"}


class ConfigError(InputError):
    """A configuration is refused; the message names the key, where it was set, and the fix."""


class Choices(Protocol):
    """Names that a field accepts: a `Registry`, or a tuple where there is nothing to register."""

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


class ConfigSection:
    """Base class of config dataclasses; it checks every field when an instance is made, in Python code too.

    ```python
    @dataclass
    class DataConfig(ConfigSection, key="data"):         # key: how messages name the section
        format: str = option("mer2025", choices=LAYOUTS)  # a registry, or a tuple of names
        layout: Layout = chosen_by("format")              # the options of LAYOUTS[format], checked and filled in
        root: Path | None = None                          # a str is taken as a Path, a list as a tuple

        def __post_init__(self) -> None:
            super().__post_init__()                       # first: checks below it may rely on the types
    ```
    """

    config_key: ClassVar[str] = ""

    def __init_subclass__(cls, key: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.config_key = key

    def __post_init__(self) -> None:
        check_fields(self, self.config_key)


def option(
    default: Any = MISSING, *, choices: Choices | None = None, free: bool | Callable[[Any], bool] = False
) -> Any:
    """Declare a field with more than a default.

    Args:
        choices: the only names that it accepts (and None, if its type includes None).
        free: a started run may go on with another value, because the training is the same but for rounding: memory,
            logs, places. Where that depends on other options, a function of the whole config.
    """
    return field(default=default, metadata={"choices": choices, "free": free})


def chosen_by(selector: str) -> Any:
    """Declare a field that holds the options of the registry entry named by the field `selector` above it.

    `selector`'s choices are the `Registry`, whose entries are frozen dataclasses. The field accepts an instance of the
    entry, a mapping of option values, or nothing; after the check it is an instance.
    """
    return field(default=None, metadata={"chosen_by": selector})


def plugin_files() -> Any:
    """Declare a field of type `tuple[Path, ...]` whose files `load_config` imports before it checks any option."""
    return field(default=(), metadata={"plugins": True, "free": True})


# --- the fields of a class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One field of a config class.

    Attributes:
        key: dotted path from the top of the config.
        type: its annotation; for a field made by `chosen_by`, the class of the chosen entry.
        default: its value if nothing sets it; MISSING if it must be set.
        choices: names that it accepts; None for any.
        selects: key of the section whose options this field chooses; usually empty.
        plugins: whether it lists plug-in files.
        free: whether a started run may go on with another value, see `option`.
    """

    name: str
    key: str
    type: Any
    default: Any
    choices: Any = None
    selects: str = ""
    plugins: bool = False
    free: bool | Callable[[Any], bool] = False


def members(
    cls: type, default: Any = MISSING, prefix: str = "", names: Mapping[str, str] | None = None
) -> list[Member]:
    """List the fields of a config class, in the order of the source.

    Args:
        default: an instance whose values are the defaults, instead of the class's.
        prefix: prefix of the keys, with its dot.
        names: chosen entries by key of their selector, as far as they are not the defaults.

    Raises:
        TypeError: a field of a type that cannot be read from text.
    """
    hints = field_types(cls)
    selects = {f.metadata["chosen_by"]: f"{prefix}{f.name}" for f in fields(cls) if "chosen_by" in f.metadata}
    found: dict[str, Member] = {}
    for f in fields(cls):
        if not f.init:
            continue
        annotation = hints[f.name]
        value = field_default(f) if default is MISSING else getattr(default, f.name)
        if "chosen_by" in f.metadata:
            selector = found[f.metadata["chosen_by"]]  # found already: it must be declared above its section
            annotation = selector.choices[(names or {}).get(selector.key, selector.default)]
            if type(value) is not annotation:
                value = MISSING  # these are defaults of another entry, which may lack this one's fields
        elif not is_section(annotation):
            type_name(annotation)  # refuse an unsupported type here, not when the first user sets the field
        found[f.name] = Member(
            f.name,
            prefix + f.name,
            annotation,
            value,
            f.metadata.get("choices"),
            selects.get(f.name, ""),
            f.metadata.get("plugins", False),
            f.metadata.get("free", False),
        )
    return list(found.values())


def options(
    cls: type, names: Mapping[str, str] | None = None, default: Any = MISSING, prefix: str = ""
) -> dict[str, Member]:
    """Collect every option of a config class by dotted key, sections included; arguments as in `members`."""
    found: dict[str, Member] = {}
    for member in members(cls, default, prefix, names):
        if is_section(member.type):
            found |= options(member.type, names, member.default, f"{member.key}.")
        else:
            found[member.key] = member
    return found


def is_section(annotation: Any) -> bool:
    """Whether a field of this type is a section, that is, a dataclass of options."""
    return isinstance(annotation, type) and is_dataclass(annotation)


def holds_paths(annotation: Any) -> bool:
    """Whether a field of this type holds a path, or several."""
    return annotation is Path or any(holds_paths(member) for member in get_args(annotation))


@cache  # resolving evaluates every annotation's text, and each check of an instance needs them
def field_types(cls: Any) -> dict[str, Any]:
    """Resolve the annotations of a dataclass."""
    return get_type_hints(cls)


def field_default(f: Field[Any]) -> Any:
    """Return a field's default, calling its factory if it has one; MISSING if there is none."""
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
        name, value, annotation = f.name, getattr(config, f.name), hints[f.name]
        # in the order of the fields, so that a selector is a valid name before its section is checked
        if "chosen_by" in f.metadata:
            checked = _entry_options(config, f, value, prefix)
        elif is_section(annotation):
            if not isinstance(value, annotation):
                raise ValueError(f"{prefix}{name} is {value!r}: it wants {annotation.__name__}")
            continue  # the section has checked itself when it was made
        else:
            checked = check_value(prefix + name, annotation, value, f.metadata.get("choices"))
        if checked is not value:
            # entries of registries are frozen; this runs while the instance is made, before anyone can see it change
            object.__setattr__(config, name, checked)


def check_value(key: str, annotation: Any, value: Any, choices: Choices | None = None) -> Any:
    """Check a value from Python against a field's type, and convert a str to a Path and a list to a tuple.

    Raises:
        ValueError: the value is of another type, or not among the choices.
    """
    try:
        return _convert(annotation, value, choices, _check_plain)
    except ValueError:
        raise ValueError(f"{key} is {value!r}: it wants {type_name(annotation, choices)}") from None


def no_option(key: str, selector: str, name: str, entry: type, source: str = "") -> str:
    """Word the refusal of an option that the chosen entry does not have."""
    known = ", ".join(f.name for f in fields(entry) if f.init)
    return f"{key}{source} is not an option of {selector} {name}: it has {known or 'none'}"


def _entry_options(config: Any, f: Field[Any], value: Any, prefix: str) -> Any:
    selector, key = f.metadata["chosen_by"], prefix + f.name
    (registry,) = (other.metadata["choices"] for other in fields(config) if other.name == selector)
    name = getattr(config, selector)
    entry = registry[name]
    if value is None or (type(value) is not entry and _holds_defaults(value)):
        # `replace(config, loss_type="cispo")` passes on the old type's options: dropped, if nobody set any of them
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
    """Whether every field of an instance has its default."""
    return is_dataclass(value) and all(getattr(value, f.name) == field_default(f) for f in fields(value))


def _check_plain(annotation: Any, value: Any) -> Any:
    if get_origin(annotation) is Literal:
        # types too, since 1 == True
        if any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
            return value
    elif annotation is Path and isinstance(value, str):
        return _read_plain(Path, value)
    elif isinstance(value, bool) and annotation is not bool:
        pass  # refused below: Python counts True as an int, but nobody means 1 by it
    elif isinstance(value, (int, float) if annotation is float else annotation) and value == value:  # NaN is unequal
        return value
    raise ValueError


# --- values from text --------------------------------------------------------------------------------------------


def type_name(annotation: Any, choices: Choices | None = None) -> str:
    """Describe a field's type in words.

    Raises:
        TypeError: a type that cannot be read from text.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if choices is not None:
        return f"one of {', '.join(choices)}" + " or none" * (types.NoneType in arguments)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
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
    raise TypeError(f"a config field cannot be of type {annotation}")


def read_value(annotation: Any, raw: Raw, choices: Choices | None = None) -> Any:
    """Read text as a value of a field's type.

    Raises:
        ValueError: the text cannot be read so, or the value is not among the choices.
    """
    return _convert(annotation, raw, choices, _read_plain)


def _convert(annotation: Any, value: Any, choices: Choices | None, plain: Callable[[Any, Any], Any]) -> Any:
    """Convert a value member by member; `plain` converts what is not a union, list or mapping."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for member in arguments:  # the first that fits: `int | float` reads 1 as an int
            try:
                # choices limit the names; None is always allowed beside them
                return _convert(member, value, None if member is types.NoneType else choices, plain)
            except ValueError:
                continue
    elif origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, None, plain) for item in value]
    elif origin is tuple and isinstance(value, list | tuple):
        item_types = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        # strict: a list of the wrong length raises ValueError, which is how it is refused
        return tuple(_convert(member, item, None, plain) for member, item in zip(item_types, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {
            _convert(str, name, None, plain): _convert(arguments[1], item, None, plain) for name, item in value.items()
        }
    elif origin in (None, Literal):
        found = plain(annotation, value)
        if choices is None or found in choices:
            return found
    raise ValueError


def _read_plain(annotation: Any, raw: Raw) -> Any:
    if annotation is types.NoneType and raw is None:
        return None
    if not isinstance(raw, str):
        raise ValueError
    if get_origin(annotation) is Literal:
        for choice in get_args(annotation):
            if raw == str(choice):
                return choice
    elif annotation is bool:
        if raw.lower() in _BOOLS:
            return _BOOLS[raw.lower()]
    elif annotation is float:
        number = float(_INFINITIES.get(raw.lower(), raw))
        if not math.isnan(number):
            return number
    elif annotation is Path:
        if raw:  # Path("") is the current folder, which nobody means by an empty value
            return Path(raw).expanduser()  # the shell expands ~ in `--root ~/data`, but nobody does in YAML
    elif annotation is not types.NoneType:
        return annotation(raw)
    raise ValueError
