"""Tell mistakes of a program's user, which end it with one line, from bugs, which keep their traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from safetensors import SafetensorError  # brings no torch


class InputError(ValueError):
    """A file, an option or a model that the user gave cannot be used; the message names it and the way out."""


class TrainingStopped(RuntimeError):
    """A run has stopped itself: to go on would waste time or spoil the result. The message has cause and way out."""


class DivergedError(TrainingStopped):
    """Training has diverged: numbers that it needs are not finite any more."""


REFUSED = 2
"""Exit status of a program that could not use what it was given, as of argparse."""


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's main function and return the exit status; print a user's mistake as one line.

    Refused with status 2 are `InputError`, `NotImplementedError` (a model that the engine does not know) and paths that
    are missing, are of the wrong kind or may not be used; with status 1 ends a run that stopped itself
    (`TrainingStopped`), and a program whose disk or network failed, also while it wrote weights.
    Anything else is a bug and keeps its traceback.
    """
    try:
        return main() or 0
    except (InputError, NotImplementedError) as error:
        message, status = str(error), REFUSED
    except TrainingStopped as error:
        message, status = str(error), 1
    except OSError as error:
        wrong_path = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
        # Python's own message ends with the path; ours, of an OSError with one argument, is a sentence already
        message = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        status = REFUSED if isinstance(error, wrong_path) else 1
    except SafetensorError as error:  # of a full disk, above all; what is read is checked where it is read
        message, status = f"weights cannot be read or written ({error}): is the disk full?", 1
    print(f"error: {message}", file=sys.stderr)
    return status
