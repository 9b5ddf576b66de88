"""Import plug-in files, which register losses, rewards, dataset layouts or model families."""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from grpo_core.config.fields import ConfigError


def load_plugin(path: Path, where: str = "plug-in") -> ModuleType:
    """Import a Python file as a module, once per process; a later call returns the same module.

    Args:
        where: first words of an error message.

    Raises:
        ConfigError: the file is missing, or raises while it is imported.
    """
    path = path.absolute()
    # a private name, so that a plug-in called `json.py` hides nothing; from the whole path, as two files may share a
    # name, and resolved, as two paths may be one file, whose entries would be registered twice
    name = f"_grpo_plugin_{sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path}")
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:  # its suffix is not .py
        raise ConfigError(f"{where}: {path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's code may raise anything, and leave by `sys.exit(0)`
        # out again: a second import would otherwise return the half of the module that ran
        del sys.modules[name]
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}, line {lines[-1]}," if lines else path  # the text of a SyntaxError has its line
        raise ConfigError(f"{where}: {place} raises {type(error).__name__}: {error}") from error
    return module
