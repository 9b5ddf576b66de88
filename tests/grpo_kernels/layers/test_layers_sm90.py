"""The kernels of layers compile for sm_90 at the shipped models' sizes: no spills, wide loads."""

from __future__ import annotations

import pytest

from grpo_kernels._backend import interpreted
from grpo_kernels.layers.rms_norm import norm_config, rms_norm_kernel
from grpo_kernels.layers.rope_append import rope_append_kernel, rope_config
from grpo_kernels.layers.silu_mul import SILU, silu_mul_kernel
from grpo_kernels.testing.sm90 import compile_sm90

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: there is nothing to compile")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def types(kernel, *pointers, kind="*bf16", **others):
    return dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(pointers, kind) | others


def check(compiled, wide=True):
    assert compiled.stack == 0
    assert compiled.registers * 32 * compiled.warps <= 65_536
    if wide:
        assert compiled.count(r"LDG\.E\.(128|64)") > 0


@pytest.mark.parametrize("width", [896, 3584, 8192])
def test_rms_norm(width):
    config = norm_config(width)
    warps = config.pop("num_warps")
    signature = types(rms_norm_kernel, "x", "residual", "weight", "out", "summed", eps="fp32")
    check(compile_sm90(rms_norm_kernel, signature, {"ADD": True, **config}, aligned=("H", "x_row"), num_warps=warps))


def test_silu_mul():
    signature = types(silu_mul_kernel, "gate_up", "out")
    constants = {"BLOCK": SILU["BLOCK"]}
    aligned = ("I", "gate_up_row")
    check(compile_sm90(silu_mul_kernel, signature, constants, aligned=aligned, num_warps=SILU["num_warps"]))


@pytest.mark.parametrize(("half", "norm"), [(32, False), (64, False), (64, True), (128, True)])
def test_rope_append(half, norm):
    kernel = rope_append_kernel
    pointers = ("qkv", "cos", "sin", "keys", "values", "q_weight", "k_weight")
    signature = types(kernel, *pointers, eps="fp32", positions="*i64", lengths="*i64", cache_rows="*i64")
    config = rope_config(36, half)
    warps = config.pop("num_warps")
    constants = {"HEADS": 28, "HALF": half, "NORM": norm, "SCATTER": norm, **config}
    strides = [name for name in kernel.arg_names if name.endswith(("_row", "_head", "_token"))]
    check(compile_sm90(kernel, signature, constants, aligned=strides, num_warps=warps), wide=False)
