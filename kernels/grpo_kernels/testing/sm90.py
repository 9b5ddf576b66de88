"""Compile a kernel for an H100/H200 without one, and read what ptxas made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = 232_448
"""Bytes of shared memory that one block may have on sm_90 (227 KiB)."""


@dataclass(frozen=True)
class Compiled:
    """Registers and stack bytes (spills) of a thread, shared bytes and warps of a block, and the instructions."""

    registers: int
    stack: int
    shared: int
    warps: int
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction occurs in the machine code."""
        return len(re.findall(instruction, self.sass))


def compile_sm90(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    aligned: Iterable[str] = (),
    **launch: int,
) -> Compiled:
    """Compile `kernel` as its launcher would.

    Args:
        signature: types of the arguments that are not constants, e.g. `{"x": "*bf16", "n": "i32"}`.
        constants: values of its `constexpr` arguments.
        aligned: integer arguments taken to be multiples of 16; pointers always are.
        launch: num_warps, num_stages.
    """
    names, aligned = kernel.arg_names, set(aligned)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    hints = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_name in types.items()
        if type_name.startswith("*") or name in aligned
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=values, attrs=hints), target=GPUTarget("cuda", 90, 32), options=launch
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    per_thread = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Compiled(
        registers=int(per_thread["REG"]),
        stack=int(per_thread["STACK"]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        sass=sass,
    )
