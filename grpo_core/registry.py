"""Registry of named entries that plug-ins extend; an option's choices, help and error messages derive from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were registered.

    An entry with options is a frozen dataclass: its fields are the options, and a run uses an instance of it
    (`grpo_core.config.chosen_by` makes a config section of it).

    Args:
        noun: name of an entry in messages, e.g. "loss type".
    """

    def __init__(self, noun: str):
        self.noun = noun
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is registered already.
        """
        # not replaced: that would silently change what a saved config means
        if name in self._entries:
            raise ValueError(f"{self.noun} {name!r} is registered already: choose another name")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Make a decorator that adds the class or function below it.

        Raises:
            ValueError: the name is registered already.
        """

        def decorate(entry: Entry) -> Entry:
            self.add(name, entry)
            return entry

        return decorate

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        # ValueError and not KeyError, whose text is the key in quotes: this message reaches users of Python too
        if name not in self._entries:
            raise ValueError(f"unknown {self.noun} {name!r}: choose one of {', '.join(self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def doc(self, name: str) -> str:
        """Return the first paragraph of the entry's docstring as one line; empty if it has none."""
        entry = self[name]
        text = inspect.cleandoc(getattr(entry, "__doc__", None) or "").partition("\n\n")[0]
        # a dataclass without docstring gets its signature as docstring, which is not a description
        return "" if text.startswith(f"{getattr(entry, '__name__', '')}(") else " ".join(text.split())
