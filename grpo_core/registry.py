"""A table of named entries that plug-ins extend; an option's choices, its help and its refusals derive from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were registered.

    An entry that has options is a frozen dataclass: the fields are its options, and its instance is what a run uses
    (`grpo_core.config.chosen_by` makes a config section of it).

    Args:
        noun: what an entry is, for messages: "loss type".
    """

    def __init__(self, noun: str):
        self.noun = noun
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is taken. Replacing an entry silently would change what a saved config means.
        """
        if name in self._entries:
            raise ValueError(f"{self.noun} {name!r} is registered already: choose another name")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that adds the class or function below it.

        Raises:
            ValueError: as `add`.
        """

        def decorate(entry: Entry) -> Entry:
            self.add(name, entry)
            return entry

        return decorate

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
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
        """First paragraph of the entry's docstring, as one line; empty where it has none."""
        entry = self[name]
        text = inspect.cleandoc(getattr(entry, "__doc__", None) or "").partition("\n\n")[0]
        # dataclass writes a signature where a class has no docstring: that is no description
        return "" if text.startswith(f"{getattr(entry, '__name__', '')}(") else " ".join(text.split())
