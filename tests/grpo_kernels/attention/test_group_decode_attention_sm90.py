"""Every configuration of the decode kernels compiles for sm_90: no spills, little shared memory, tensor cores."""

from __future__ import annotations

import pytest

from grpo_kernels._backend import interpreted
from grpo_kernels.attention.group_decode_attention import (
    prefix_attention_kernel,
    prefix_config,
    suffix_attention_kernel,
    suffix_config,
)
from grpo_kernels.testing.sm90 import SHARED_LIMIT, compile_sm90

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: there is nothing to compile")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_attention(kernel, kind, config, width, heads_per_kv):
    names = kernel.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(("q", "k", "v", "out"), kind)
    signature |= {"scale": "fp32", "partial_out": "*fp32", "partial_lse": "*fp32"}
    signature |= dict.fromkeys(("prefix_lengths", "suffix_lengths"), "*i64")
    signature |= dict.fromkeys(("order", "starts", "group_of_row"), "*i32")
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    strides = [name for name in names if name.endswith(("_row", "_group", "_head", "_token"))]
    compiled = compile_sm90(
        kernel, signature, {"R": heads_per_kv, "D": width, **config}, aligned=["split", *strides], **options
    )
    assert compiled.stack == 0
    assert compiled.shared <= SHARED_LIMIT
    assert compiled.registers * 32 * compiled.warps <= 65_536
    return compiled


@pytest.mark.parametrize(("width", "rows"), [(64, 16), (64, 112), (128, 16), (128, 32), (128, 64), (128, 112)])
def test_prefix_pass(width, rows):
    compiled = compile_attention(prefix_attention_kernel, "*bf16", prefix_config(rows, width, 2), width, 7)
    assert compiled.count("HGMMA" if rows >= 64 else "HMMA") > 0
    assert compiled.count(r"LDG\.E\.128|LDGSTS\S*\.128") > 0


@pytest.mark.parametrize("width", [64, 128])
def test_suffix_pass(width):
    compiled = compile_attention(suffix_attention_kernel, "*bf16", suffix_config(7, width, 2), width, 7)
    assert compiled.count("HMMA") > 0
    assert compiled.count(r"LDG\.E\.128|LDGSTS\S*\.128") > 0


@pytest.mark.parametrize(("width", "kind"), [(96, "*fp16"), (256, "*bf16"), (128, "*fp32")])
def test_other_head_sizes_and_dtypes(width, kind):
    itemsize = 4 if kind == "*fp32" else 2
    compile_attention(suffix_attention_kernel, kind, suffix_config(4, width, itemsize), width, 4)
    compile_attention(prefix_attention_kernel, kind, prefix_config(128, width, itemsize), width, 4)
