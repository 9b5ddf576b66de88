"""Run this package's Triton kernels on a CPU, in Triton's interpreter, with bfloat16 as a GPU has it.

Triton's own interpreter keeps bfloat16 as bit patterns: `tl.dot` multiplies those as integers, and a cast from float32
truncates. Both are repaired here, so that tests see what the GPU would compute.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import grpo_kernels

PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
"""What Triton's interpreter patches while a kernel runs."""


@contextmanager
def interpret() -> Iterator[None]:
    """Within this block the package's kernels run in the interpreter, whatever the environment said at import."""
    importlib.import_module("triton.experimental.gluon")  # else imported lazily by a launch, half of it swapped
    for name in grpo_kernels.__all__:  # else imported on first use in this block, interpreted for good
        getattr(grpo_kernels, name)
    repair_bfloat16()
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("grpo_kernels", "triton")]
    before = [(holder, dict(vars(holder))) for holder in (*modules, *PATCHED)]
    for holder, members in before:  # Triton's library (tl.sum, tl.zeros, …) is jitted code too
        for name, value in members.items():
            if isinstance(value, JITFunction):
                setattr(holder, name, InterpretedFunction(value.fn))
    patch_lang, interpreter._patch_lang = interpreter._patch_lang, _patch_once(interpreter._patch_lang)
    try:
        with triton.knobs.runtime.scope(), np.errstate(all="ignore"):
            triton.knobs.runtime.interpret = True
            yield
    finally:
        interpreter._patch_lang = patch_lang
        for holder, members in before:
            _restore(holder, members)


def _patch_once(patch_lang: Callable) -> Callable:
    """Patch `tl` once a module, as `interpret` undoes it in the end.

    The interpreter does so anew for every launch, and for every call of one jitted function by another, which takes a
    third of its time.
    """
    patched: set[str] = set()

    def patch(fn: Callable) -> object:
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch_lang(fn)
        return interpreter._LangPatchScope()  # nothing for the launch to undo

    return patch


def _restore(holder: object, members: dict[str, object]) -> None:
    """Undo our swaps, and what the interpreter leaves patched after a call of one jitted function by another."""
    for name, value in list(vars(holder).items()):
        if name not in members:
            if holder in PATCHED:
                delattr(holder, name)
        elif members[name] is not value:
            setattr(holder, name, members[name])


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to uint16 bit patterns, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair_bfloat16() -> None:
    """Teach Triton's interpreter bfloat16 `dot` and rounding. Doing it twice changes nothing."""
    if getattr(InterpreterBuilder, "grpo_kernels_repaired", False):
        return
    dot, convert = InterpreterBuilder.create_dot, interpreter._convert_float

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *arguments: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(bfloat16_to_float32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *arguments)

    def convert_float(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return float32_to_bfloat16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return bfloat16_to_float32(values)
        return convert(values, source, target, rounding)

    InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
    InterpreterBuilder.grpo_kernels_repaired = True
