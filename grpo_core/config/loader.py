"""Build a config from dataclass defaults, YAML files and command-line overrides; write it as YAML.

A value is text, in YAML and on the command line alike, until the type of its field reads it. So `1e-5` is a number
wherever a float is wanted (YAML alone would make it a string), `no` is a name wherever a string is wanted, and both
sources follow one rule.
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from grpo_core.config.fields import (
    ConfigError,
    Member,
    Raw,
    is_section,
    members,
    no_option,
    options,
    read_value,
    type_name,
)
from grpo_core.config.help import help_text
from grpo_core.config.moved import MOVED_KEYS
from grpo_core.config.plugins import load_plugin
from grpo_core.storage.files import write_text

Config = TypeVar("Config")

COMMAND_LINE = "command line"

# YAML 1.1's tags of plain values; all others are refused, above all `!!python/object`, which could run code
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}


def load_config(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    default_config: Path | None = None,
    config_folder: Path | None = None,
    program: str = "",
) -> Config:
    """Build a config from its defaults, then `--config FILE.yaml` in the order given, then `--section.key value`.

    `section.key=value` and `--section.key=value` mean the same, as does a bare `--key value` if only one section has
    that key; `--flag` alone sets a bool. Files of a field made by `plugin_files` (`--plugins FILE.py`, repeatable) are
    imported before anything is checked. `--help` prints every key with its type, default and doc.

    Args:
        cls: a dataclass; its fields are bool, int, float, str, Path, Literal, `X | None`, tuple, list, `dict[str, X]`
            or dataclasses, or made by `grpo_core.config.option` and `chosen_by`.
        argv: arguments without the program's name, with which mistakes are raised. None takes the arguments of the
            process; a mistake is then printed, and the process exits with status 2.
        description: first paragraph of the help.
        default_config: the file that is read if there is no `--config`.
        config_folder: where `--config NAME` finds `NAME.yaml`, unless there is a file NAME.
        program: the program's name in the help; by default the script's.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a combination that the dataclass refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # taken out first: `--help` would otherwise take the word behind it as its value
    wants_help = "--help" in arguments or "-h" in arguments
    pairs = list(_pairs([argument for argument in arguments if argument not in ("--help", "-h")]))
    try:
        # files are read before the other arguments, wherever `--config` is among them: arguments override all files
        files = [_value(pair) for pair in pairs if pair.name == "config"]
        if not files and default_config is not None:
            files = [str(default_config)]
        nodes = [_read_yaml(_find_config(file, config_folder)) for file in files]
        sources = _Sources(cls)
        # before any option is read: files and the command line may name entries that plug-ins register
        sources.import_plugins(nodes, pairs)
        for node in nodes:
            sources.read_file(node)
        if wants_help:  # the command line is left out: help has to work beside a mistake in it
            values = {key: sources.value(sources.options[key]) for key in sources.settings}
            default = ""
            if default_config is not None:  # by name if `--config NAME` finds it, rather than as a path in the package
                default = default_config.stem if default_config.parent == config_folder else str(default_config)
            print(help_text(cls, description, default, sources.names, values, program))
            raise SystemExit(0)
        sources.read_command_line([pair for pair in pairs if pair.name != "config"])
        return sources.build(cls)
    except ConfigError as error:
        if argv is not None:  # called from Python or a test: the caller handles it
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_dict(config: Any) -> Any:
    """Convert a config to YAML's types: dataclasses to dicts, tuples to lists, paths to strings."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config) if field.init}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


class _Dumper(yaml.SafeDumper):
    """YAML writer whose quoting preserves every character of a text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # YAML 1.1 takes these for line breaks too, and reads them as spaces outside double quotes
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def save_config(config: Any, path: Path) -> None:
    """Write a config as a YAML file, from which `--config` reads an equal config; a kill leaves no half of it."""
    # unsorted: keys stay in the order of the fields, most used first
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_text(Path(path), text)


@dataclass(frozen=True)
class _Setting:
    """Text that a source sets for an option, and where."""

    raw: Raw
    source: str


@dataclass(frozen=True)
class _Pair:
    """One argument of the command line, with the value that follows it, if any.

    Attributes:
        token: as written, `--name=text` without `=text`.
        text: the value; None for a bare `--flag`, or for a word that is not an option.
    """

    token: str
    text: str | None

    @property
    def name(self) -> str:
        return self.token.removeprefix("--")


def _pairs(arguments: list[str]) -> Iterator[_Pair]:
    remaining = list(reversed(arguments))  # reversed, to pop from the end
    while remaining:
        token, equals, text = remaining.pop().partition("=")
        if equals:
            yield _Pair(token, text)
        # two dashes: a value such as -1 or -inf begins with one
        elif token.startswith("--") and remaining and not remaining[-1].startswith("--"):
            yield _Pair(token, remaining.pop())
        else:
            yield _Pair(token, None)


def _value(pair: _Pair) -> str:
    if pair.text is None and not pair.token.startswith("--"):
        raise ConfigError(f"{pair.token!r} is not an option: write --section.key value, or section.key=value")
    if pair.text is None:
        raise ConfigError(f"{pair.token} needs a value")
    return pair.text


class _Sources:
    """Settings of files and the command line, collected so far; later sources override earlier ones.

    Attributes:
        names: registry entries chosen so far, by key of their selector; `options` depends on them.
        options: every option that may be set, by key.
        settings: every option that is set, by key.
    """

    def __init__(self, cls: type):
        self.cls = cls
        self.names: dict[str, str] = {}
        self.options = options(cls)
        self.settings: dict[str, _Setting] = {}

    def import_plugins(self, nodes: list[yaml.MappingNode], pairs: list[_Pair]) -> None:
        """Import the plug-in files that the sources name; unlike other lists, later sources add to earlier ones."""
        # added, because a file that names a plug-in's loss could not be read without that plug-in
        for key, option in self.options.items():
            if not option.plugins:
                continue
            found = [_Setting(_to_raw(value), _place(value)) for value in _values_at(nodes, key)]
            named = [pair for pair in pairs if self._complete(pair.name) == key]
            found += [_Setting(_parse_inline(option.type, _value(pair)), COMMAND_LINE) for pair in named]
            files: dict[str, None] = {}  # in order, each once
            for setting in found:
                for path in self._read(key, setting):
                    load_plugin(path, f"{key} ({setting.source})")
                    files[str(path.absolute())] = None  # so that a saved config finds it from another folder
            if files:
                self.settings[key] = _Setting(list(files), found[-1].source)

    def read_file(self, node: yaml.MappingNode) -> None:
        """Record the settings of a YAML file."""
        # choices first: which keys exist depends on them. A copy of the items, as `_choose` replaces `self.options`
        for key, option in list(self.options.items()):
            for value in _values_at([node], key) if option.selects else ():
                self._choose(key, _Setting(_to_raw(value), _place(value)))
        self._read_section(node, "")

    def _read_section(self, node: yaml.MappingNode, prefix: str) -> None:
        for name, value in _items(node):
            key = prefix + name
            if key in self.options:
                if not self.options[key].plugins:  # those are set by `import_plugins`
                    self.settings[key] = _Setting(_to_raw(value), _place(value))
            elif not self._is_section(key):
                raise self._unknown(key, _place(value))
            elif isinstance(value, yaml.MappingNode):
                self._read_section(value, f"{key}.")
            elif _to_raw(value) is not None:  # a section may be empty
                raise ConfigError(f"{key} ({_place(value)}) is a section: give its keys below it")

    def read_command_line(self, pairs: list[_Pair]) -> None:
        """Record the settings of the command line."""
        for pair in pairs:  # choices first: which keys exist depends on them, in whatever order they come
            key = self._complete(pair.name)
            if key in self.options and self.options[key].selects:
                self._choose(key, _Setting(_value(pair), COMMAND_LINE))
        given: dict[str, Raw] = {}
        for pair in pairs:
            if pair.text is None and not pair.token.startswith("--"):
                _value(pair)  # raises: a stray word, even if it is the name of a key
            key = self._complete(pair.name, strict=True)
            if key in self.options and self.options[key].type is bool and pair.text is None:
                self.settings[key] = _Setting("true", COMMAND_LINE)
            elif key not in self.options or not self.options[key].plugins:
                self._override(key, _value(pair))
            if key in self.settings:
                self._join(key, given)

    def _join(self, key: str, given: dict[str, Raw]) -> None:
        """Add up a list that is given several times; of another option that is, say that the last one counts."""
        raw = self.settings[key].raw
        before = given.get(key, raw)
        if (
            isinstance(raw, list)
            and isinstance(before, list)
            and before is not raw
            and _any_length(self.options[key].type)
        ):
            raw = [*before, *raw]
            self.settings[key] = _Setting(raw, COMMAND_LINE)
        elif before != raw and not isinstance(raw, dict):
            print(f"warning: {key} is given twice on the command line: {raw} counts, not {before}", file=sys.stderr)
        given[key] = raw

    def _override(self, key: str, text: str) -> None:
        """Set an option, or one entry of a mapping (`--algorithm.reward_weights.format 0.5`)."""
        parent, _, entry = key.rpartition(".")
        if key in self.options:
            self.settings[key] = _Setting(_parse_inline(self.options[key].type, text), COMMAND_LINE)
        elif parent in self.options and get_origin(self.options[parent].type) is dict:
            option = self.options[parent]
            default = {} if option.default is MISSING else option.default
            before: Raw = {name: str(item) for name, item in default.items()}
            if parent in self.settings:
                before = self.settings[parent].raw
            if isinstance(before, dict):  # otherwise the file's value is refused when it is read
                raw = _parse_inline(get_args(option.type)[1], text)
                self.settings[parent] = _Setting({**before, entry: raw}, COMMAND_LINE)
        elif self._is_section(key):
            raise ConfigError(f"{key} ({COMMAND_LINE}) is a section: give its keys below it")
        else:
            raise self._unknown(key, COMMAND_LINE)

    def _choose(self, key: str, setting: _Setting) -> None:
        """Record a source's choice of the entry whose options a section holds."""
        option = self.options[key]
        name = self._read(key, setting)
        if name == self.names.get(key, option.default):
            return
        # an earlier source set options of the entry that it chose, which say nothing about this one
        for other in [other for other in self.settings if other.startswith(f"{option.selects}.")]:
            del self.settings[other]
        self.names[key] = name
        self.options = options(self.cls, self.names)

    def _complete(self, name: str, strict: bool = False) -> str:
        """Complete the last name of a key to the whole key, if only one option ends in it."""
        matches = [key for key in self.options if key.rpartition(".")[2] == name]
        if name in self.options or not matches:
            return name
        if len(matches) > 1:
            if strict:  # in the first pass, over choices, a later argument may still leave only one of the matches
                raise ConfigError(f"--{name} may be {' or '.join(f'--{key}' for key in matches)}: write one of them")
            return name
        return matches[0]

    def _is_section(self, key: str) -> bool:
        # a section that a name chooses is a section even if the chosen entry has no options
        return any(other.startswith(f"{key}.") or option.selects == key for other, option in self.options.items())

    def _unknown(self, key: str, source: str) -> ConfigError:
        """Word the refusal of a key: where it moved to, which entry lacks it, or the nearest key that exists."""
        leaf = key.rpartition(".")[2]
        if key in MOVED_KEYS:
            return ConfigError(f"{key} ({source}) is now {MOVED_KEYS[key]}")
        for selector, option in self.options.items():
            if not option.selects:
                continue
            # an option of another entry, e.g. cispo's cap under loss_type grpo: say so, rather than suggest a near key
            others = {member.name for name in option.choices for member in members(option.choices[name])}
            if key.startswith(f"{option.selects}.") or key in others:
                name = self.names.get(selector, option.default)
                key = f"{option.selects}.{leaf}"
                return ConfigError(no_option(key, option.name, name, option.choices[name], f" ({source})"))
        moved = [old for old in MOVED_KEYS if old.rpartition(".")[2] == key]
        if len(moved) == 1:
            return ConfigError(f"{moved[0]} ({source}) is now {MOVED_KEYS[moved[0]]}")
        by_leaf = {name.rpartition(".")[2]: name for name in self.options}
        near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(key, self.options, 1)
        near += [by_leaf[other] for other in difflib.get_close_matches(leaf, by_leaf, 1)]
        hint = f", did you mean {near[0]!r}?" if near else ";"
        return ConfigError(f"unknown key {key!r} ({source}){hint} --help lists every key")

    def _read(self, key: str, setting: _Setting) -> Any:
        option = self.options[key]
        try:
            return read_value(option.type, setting.raw, option.choices)
        except ValueError:
            shown = "null" if setting.raw is None else repr(setting.raw)
            wanted = type_name(option.type, option.choices)
            raise ConfigError(f"{key} ({setting.source}) is {shown}: it wants {wanted}") from None

    def value(self, option: Member) -> Any:
        """Return an option's value, set or default."""
        if option.key in self.settings:
            return self._read(option.key, self.settings[option.key])
        if option.default is MISSING:
            wanted = type_name(option.type, option.choices)
            raise ConfigError(f"{option.key} must be given: add --{option.key} ({wanted}), or set it in a config file")
        return option.default

    def build(self, cls: type[Config], default: Any = MISSING, prefix: str = "") -> Config:
        """Make a dataclass of the settings; the rest takes the class's defaults, or the values of `default`."""
        arguments = {
            member.name: self.build(member.type, member.default, f"{member.key}.")
            if is_section(member.type)
            else self.value(member)
            for member in members(cls, default, prefix, self.names)
        }
        try:
            return cls(**arguments)
        except ConfigError:  # a subclass of ValueError that already says which key
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error


# --- YAML --------------------------------------------------------------------------------------------------------


def _find_config(name: str, folder: Path | None) -> Path:
    """Find a config file by path, or by name in the folder of configs that come with the program."""
    path = Path(name)
    # a suffix means a path: a mistyped file must not be looked up as a name, whose refusal would mislead
    if folder is None or path.exists() or path.suffix:
        return path
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"--config {name}: there is no such file or config; the configs are {', '.join(known)}")
    return folder / f"{name}.yaml"


def _read_yaml(path: Path) -> yaml.MappingNode:
    """Parse a YAML file into nodes that know their line. No Python object is constructed from it.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or does not hold a mapping.
    """
    try:
        with path.open(encoding="utf-8") as stream:  # from a stream, unlike from text, nodes know the file's name
            node = yaml.compose(stream, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:  # an empty file sets nothing
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a config file is a mapping of keys to values")
    return node


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name}:{node.start_mark.line + 1}"


def _values_at(nodes: Sequence[yaml.Node], key: str) -> list[yaml.Node]:
    """Find the values at a dotted key in those nodes that have it."""
    for name in key.split("."):
        mappings = [node for node in nodes if isinstance(node, yaml.MappingNode)]
        nodes = [value for node in mappings for item, value in node.value if item.value == name]
    return list(nodes)


def _items(node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    """List a YAML mapping's keys and values.

    Raises:
        ConfigError: a key is not text, or appears twice, of which YAML parsers silently keep the last.
    """
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_place(key)}: a key is a word, not a list or a mapping")
        if key.value in seen:
            again = key.start_mark.line + 1
            raise ConfigError(f"{_place(seen[key.value])}: the key {key.value!r} appears twice (again in line {again})")
        seen[key.value] = value
    return list(seen.items())


def _to_raw(node: yaml.Node) -> Raw:
    """Convert a YAML node to text, or to lists and mappings of text.

    Raises:
        ConfigError: a tag such as `!!python/object`, or a key that `_items` refuses.
    """
    if node.tag not in _TAGS:
        raise ConfigError(f"{_place(node)}: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.MappingNode):
        return {key: _to_raw(value) for key, value in _items(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_to_raw(item) for item in node.value]
    # the node's text and not YAML's value of it, which would turn `no` into False and 1e-5 into a string
    return None if node.tag.endswith(":null") else node.value


def _any_length(annotation: Any) -> bool:
    """Whether a field of this type holds a list of any length."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(a) is list or (get_origin(a) is tuple and get_args(a)[-1:] == (...,)) for a in alternatives)


def _parse_inline(annotation: Any, text: str) -> Raw:
    """Split a command line's text if its field holds a list (`a,b` or `[a, b]`) or a mapping (`{a: 1}`).

    `none` is null. Brackets that cannot be parsed stay text, which the field's type refuses.
    """
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    # only if the field may be None: where it is text, `none` is a name (sampler_correction)
    if types.NoneType in alternatives and text.lower() in ("none", "null"):
        return None
    origins = {get_origin(alternative) for alternative in alternatives}
    is_list = bool(origins & {list, tuple})
    if (text.startswith("[") and is_list) or (text.startswith("{") and dict in origins):
        try:
            node = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:
            return text
        return None if node is None else _to_raw(node)
    if is_list:
        return [item.strip() for item in text.split(",")] if text else []
    return text
