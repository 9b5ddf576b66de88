"""Check command lines without running them: does the program exist, and does it take these options and values?

A program is started in this file's own process (`python tests/commands.py`, commands as JSON on standard input) and
left as soon as it has parsed its command line, by argparse or by `grpo_core.config.loader.load_config`. One process
checks all commands, so torch is imported once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# programs that are not ours: that a shell can split the line is all that is checked
FOREIGN = {
    "apt-get",
    "cd",
    "compute-sanitizer",
    "export",
    "git",
    "hf",
    "mkdocs",
    "pip",
    "pre-commit",
    "ruff",
    "mypy",
    "nvidia-smi",
}
OURS = {"python", "python3", "torchrun", "pytest", "make", "affectgpt"}


class Parsed(BaseException):
    """The command line is parsed: nothing more is to be run. Not an Exception, so that no program catches it."""


def check(commands: Sequence[str], blocked: Sequence[str] = (), folder: Path = ROOT) -> dict[str, str]:
    """Check shell command lines; return what is wrong with those that are wrong.

    Args:
        commands: one command each; continuation lines are allowed.
        blocked: top-level modules that may not be imported while programs start, as if they were not installed.
        folder: where the commands are given. It may hold files that a reader has written; ours are found from anywhere.
    """
    done = subprocess.run(
        [sys.executable, "-P", __file__, *blocked],  # -P: tests/grpo_kernels must not pass for the package
        input=json.dumps(list(commands)),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def split(command: str) -> list[str]:
    """Split a command line as a shell does, without comments, `[` `]` round optional parts, `…` and `NAME=value` in
    front.

    Text after three spaces or more is a remark about the command, as manuals write it.
    """
    command = re.sub(r"\s*\\\n\s*", " ", command.strip())
    words = shlex.split(re.split(r" {3,}", command)[0], comments=True)
    optional = [re.sub(r"\]$", "", word) if "[" not in word else word for word in words]
    words = [word.removeprefix("[") if word.startswith("[-") else word for word in optional]
    words = [word for word in words if word not in ("…", "...")]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


def problem(words: list[str]) -> str | None:
    """Say what is wrong with a command, or None."""
    program, arguments = words[0], words[1:]
    if program in FOREIGN:
        return None
    if program == "make":
        return make_problem(arguments)
    if program == "affectgpt":
        return entry_point_problem(program, arguments)
    if program == "torchrun":
        while arguments and arguments[0].startswith("-"):  # torchrun's own options, written --name=value
            arguments = arguments[1:]
    elif program == "pytest":
        arguments = ["-m", "pytest", *arguments]
    elif program not in ("python", "python3"):
        return f"{program!r} is neither a command of ours nor one of {', '.join(sorted(FOREIGN))}"
    if arguments[:1] == ["-c"]:
        compile(arguments[1], "-c", "exec")
        return None
    if arguments[:1] == ["-m"]:
        name, arguments = arguments[1], arguments[2:]
        if name == "pytest":
            return pytest_problem(arguments)
        if not name.startswith(("affectgpt", "grpo_")):
            return None
        return run_until_parsed([name, *arguments], lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
    script = ROOT / arguments[0]
    if not script.is_file():
        # a reader's own script takes what it likes; whether it runs is for the page's blocks to show
        return None if Path(arguments[0]).is_file() else f"there is no {arguments[0]}"
    return run_until_parsed(arguments, lambda: runpy.run_path(str(script), run_name="__main__"), script.parent)


def pytest_problem(arguments: list[str]) -> str | None:
    """Files exist; options and what they select are pytest's business."""
    files = [word.partition("::")[0] for word in arguments if word.startswith("tests")]
    missing = [file for file in files if not (ROOT / file).exists()]
    return f"there is no {', '.join(missing)}" if missing else None


def make_problem(arguments: list[str]) -> str | None:
    """The target exists, and `ARGS="…"` are options of the command that the target gives them to."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        rule = re.search(rf"^{re.escape(target)}:(?! export).*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        if rule is None:
            return f"the Makefile has no target {target!r}"
        given = [word.removeprefix("ARGS=") for word in arguments if word.startswith("ARGS=")]
        recipe = [line.strip() for line in rule[1].splitlines() if "$(ARGS)" in line]
        if given and not recipe:
            return f"the Makefile's target {target!r} takes no ARGS"
        if given:
            words = recipe[0].replace("$(ARGS)", given[0]).split()
            while "=" in words[0]:  # variables of the environment
                words = words[1:]
            # the first word is a Python, by way of make's variables
            if wrong := problem(["python", *words[1:]]):
                return wrong
    return None


def entry_point_problem(name: str, arguments: list[str]) -> str | None:
    """A console script as setup.py declares it."""
    declared = re.search(rf"\"{name}\s*=\s*([\w.]+):(\w+)\"", (ROOT / "setup.py").read_text(encoding="utf-8"))
    if declared is None:
        return f"setup.py declares no command {name!r}"
    module, function = declared[1], declared[2]
    return run_until_parsed([name, *arguments], lambda: getattr(import_module(module), function)())


def run_until_parsed(argv: list[str], start: Callable[[], object], folder: Path | None = None) -> str | None:
    """Start a program with these arguments, and leave it once they are parsed."""
    # a capital N, M or G stands for a number
    sys.argv = [argv[0], *("1" if re.fullmatch(r"[A-Z]", word) else word for word in argv[1:])]
    path, output = list(sys.path), io.StringIO()
    sys.path.insert(0, str(folder or ROOT))
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            start()
    except Parsed:
        return None
    except SystemExit as leaving:
        if leaving.code in (0, None):  # --help
            return None
        lines = output.getvalue().strip().splitlines()
        return lines[-1] if lines else str(leaving.code)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.path[:] = path
    return "it ended without parsing its command line"


def leave_programs_when_parsed() -> None:
    """Make argparse and load_config raise `Parsed` once they have read a program's command line."""
    import argparse

    from grpo_core.config import loader

    parse_args, parse_known_args = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    load_config = loader.load_config
    nested = False  # parse_args calls parse_known_args, and so does a parser that has subcommands

    def args(self: argparse.ArgumentParser, *values: Any, **options: Any) -> Any:
        nonlocal nested
        nested = True
        try:
            parse_args(self, *values, **options)
        finally:
            nested = False
        raise Parsed

    def known_args(self: argparse.ArgumentParser, *values: Any, **options: Any) -> Any:
        nonlocal nested
        if nested:
            return parse_known_args(self, *values, **options)
        nested = True
        try:
            parse_known_args(self, *values, **options)
        finally:
            nested = False
        raise Parsed

    def config(cls: type, argv: Sequence[str] | None = None, **options: Any) -> Any:
        words = list(sys.argv[1:] if argv is None else argv)
        kept = []
        while words:  # files that a page names as examples do not exist
            if words[0] == "--config" and words[1].endswith(".yaml") and not Path(words[1]).exists():
                words = words[2:]
            else:
                kept.append(words.pop(0))
        try:
            load_config(cls, kept, **options)
        except loader.ConfigError as error:
            # MODEL, DATA, JUDGE stand for folders of the reader's: a complaint about one is about its value alone
            if not any(re.search(rf"\b{text}\b", str(error)) for text in re.findall(r"\b[A-Z]{3,}\b", " ".join(kept))):
                raise
        raise Parsed

    argparse.ArgumentParser.parse_args = args  # type: ignore[method-assign]
    argparse.ArgumentParser.parse_known_args = known_args  # type: ignore[method-assign]
    loader.load_config = config


def main() -> None:
    for name in sys.argv[1:]:
        sys.modules[name] = None  # type: ignore[assignment]  # import raises ModuleNotFoundError
    leave_programs_when_parsed()
    wrong = {}
    for command in json.load(sys.stdin):
        try:
            found = problem(split(command))
        except (ValueError, SyntaxError, IndexError) as error:
            found = f"it cannot be parsed: {error}"
        if found is not None:
            wrong[command] = found
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
