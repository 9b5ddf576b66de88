"""Refuse `python -m` for modules that are no programs: they would end with status 0, having done nothing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence


def refuse_module_run(package: str, folder: str, command: Sequence[str] | None = None) -> None:
    """End the process with status 2 if `python -m` was asked to run a module of a package that is no program.

    The package's `__init__` calls this while Python looks for the module, when `sys.argv[0]` is `-m`. A program is a
    package with a `__main__.py`, or a module that asks whether `__name__` is `"__main__"`. What does not exist is left
    to Python's own message.

    Args:
        package: import name.
        folder: of its source.
        command: the interpreter's command line; None takes this process's.
    """
    asked = _asked_module(sys.orig_argv if command is None else command)
    if asked != package and not asked.startswith(f"{package}."):
        return
    source = os.path.join(folder, *asked.split(".")[1:])
    if not os.path.isfile(f"{source}.py") or _is_program(f"{source}.py"):
        return  # a program; or a package, with or without a __main__.py; or nothing
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if name.endswith(".py")]
    programs = sorted(
        ".".join([package, *os.path.relpath(file, folder).removesuffix(".py").split(os.sep)]).removesuffix(".__main__")
        for file in files
        if _is_program(file)
    )
    way_out = (
        f"the programs here are {', '.join(f'python -m {name}' for name in programs)}" if programs else "import it"
    )
    print(f"error: {asked} is a module to import and no program, so nothing was done: {way_out}", file=sys.stderr)
    sys.exit(2)


def _is_program(file: str) -> bool:
    if os.path.basename(file) == "__main__.py":
        return True
    with open(file, encoding="utf-8") as source:
        return "\nif __name__ ==" in source.read()


def _asked_module(command: Sequence[str]) -> str:
    """Find the module's name in an interpreter's command line; empty if it has no `-m`."""
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in ("-X", "-W"):
            next(arguments, None)
        elif found := re.fullmatch(r"-[A-Zabd-ln-z]*m(.*)", argument):  # `-m name`, `-mname`, and other flags before
            return found[1] or next(arguments, "")
        elif not argument.startswith("-"):
            break
    return ""
