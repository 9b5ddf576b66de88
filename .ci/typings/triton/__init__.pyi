# What mypy is told of triton. Kernels are a language of their own: their bodies are not Python that a type checker
# knows, and calls go through `kernel[grid](…)`. Under the name `jit` mypy finds `typing.no_type_check`, which excepts
# a decorated function and gives it the type Any, so kernels need no comments for the type checker. Everything else is
# Any.
from typing import Any
from typing import no_type_check as jit

__all__ = ["jit"]

def __getattr__(name: str) -> Any: ...
