"""Every shipped configuration of the head kernels compiles for sm_90: no spills, little shared memory, tensor cores."""

from __future__ import annotations

import pytest

from grpo_kernels._backend import interpreted
from grpo_kernels.lm_head._rows_triton import (
    BLOCK_H,
    BLOCK_ROWS,
    SLOTS,
    RowLaunch,
    add_product_kernel,
    add_transposed_kernel,
    softmax_rows_kernel,
)
from grpo_kernels.lm_head._stats import COMBINE, HeadTile, combine_stats_kernel, lm_head_stats_kernel
from grpo_kernels.lm_head.from_logits import SCALE, scale_kernel
from grpo_kernels.testing.sm90 import SHARED_LIMIT, compile_sm90

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: there is nothing to compile")

ROW_MODES = {
    "loss, every option": {
        "LOSS": True,
        "OLD": True,
        "KL_ESTIMATOR": 3,
        "KL_TIMES_RATIO": True,
        "ENTROPY": True,
        "GRAD": True,
    },
    "loss, cispo on-policy": {"LOSS": True, "CISPO": True, "ENTROPY": True, "GRAD": True},
    "loss, softcap": {"LOSS": True, "OLD": True, "KL_ESTIMATOR": 2, "ENTROPY": True, "GRAD": True, "SOFTCAP": True},
    "statistics": {"ENTROPY": True},
    "statistics with KL": {"ENTROPY": True, "KL": True},
    "gradient of all three, saved statistics": {
        "ENTROPY": True,
        "KL": True,
        "SAVED": True,
        "GRAD": True,
        "UPSTREAM_LOGPROB": True,
        "UPSTREAM_ENTROPY": True,
        "UPSTREAM_KL": True,
    },
    "unit gradient": {"GRAD": True},
}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(compiled, tensor_cores=False):
    assert compiled.stack == 0
    assert compiled.shared <= SHARED_LIMIT
    assert compiled.registers * 32 * compiled.warps <= 65_536
    assert (compiled.count("HGMMA") > 0) == tensor_cores


def compile_rows(mode, logits, grad, vocabulary_aligned=True):
    names = softmax_rows_kernel.arg_names
    switches = dict.fromkeys((n for n in names if n.isupper() and n != "V"), False) | {"KL_ESTIMATOR": 0}
    launch = RowLaunch()
    narrow = logits != grad and "GRAD" in ROW_MODES[mode]
    switches |= {"LARGE": narrow and grad == "*bf16", "SCALED": narrow and grad == "*fp16"}
    signature = {name: "*fp32" if name.endswith("_ptr") else "fp32" for name in names}
    signature |= {"logits": logits, "drift": logits, "grad": grad, "targets": "*i64", "V": "i32"}
    signature["large_token_ptr"] = "*i64"
    signature |= dict.fromkeys(("logits_stride", "grad_stride", "drift_stride"), "i32")
    aligned = ("V", "logits_stride", "grad_stride", "drift_stride") if vocabulary_aligned else ()
    return compile_sm90(
        softmax_rows_kernel,
        signature,
        switches | ROW_MODES[mode] | {"BLOCK": launch.block},
        aligned=aligned,
        num_warps=launch.warps,
    )


@pytest.mark.parametrize("grad", ["*bf16", "*fp16"], ids=["large entries apart", "scaled"])
@pytest.mark.parametrize("mode", ROW_MODES)
def test_row_pass_over_float32_accumulators(mode, grad):
    compiled = compile_rows(mode, "*fp32", grad)  # V = 151,936 and 152,064 are both multiples of 16
    check(compiled)
    assert compiled.count(r"LDG\.E\.128") > 0


@pytest.mark.parametrize(("logits", "grad"), [("*bf16", "*bf16"), ("*fp16", "*fp16"), ("*fp32", "*fp32")])
def test_row_pass_over_given_logits(logits, grad):
    check(compile_rows("loss, every option", logits, grad))


def test_row_pass_over_an_odd_vocabulary():
    check(compile_rows("loss, every option", "*fp32", "*bf16", vocabulary_aligned=False))


@pytest.mark.parametrize(
    "options",
    [{"ENTROPY": True}, {"ENTROPY": False}, {"ENTROPY": True, "BIAS": True}, {"ENTROPY": True, "SOFTCAP": True}],
    ids=str,
)
def test_head_statistics_run_on_tensor_cores(options):
    tile = HeadTile()
    signature = {name: "*fp32" for name in lm_head_stats_kernel.arg_names}
    signature |= {
        "hidden": f"tensordesc<bf16[{tile.block_t}, {tile.block_h}]>",
        "weight": f"tensordesc<bf16[{tile.block_v}, {tile.block_h}]>",
        "targets": "*i64",
        "T": "i32",
        "V": "i32",
        "H": "i32",
        "inverse_temperature": "fp32",
        "softcap": "fp32",
    }
    constants = {"BIAS": False, "SOFTCAP": False, **options, "GROUP": tile.group}
    constants |= {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h}
    compiled = compile_sm90(
        lm_head_stats_kernel,
        signature,
        constants,
        aligned=("V", "H"),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    check(compiled, tensor_cores=True)
    assert compiled.count("UTMALDG") > 0


def test_small_kernels():
    signature = dict.fromkeys(combine_stats_kernel.arg_names, "*fp32") | {"T": "i32", "tiles": "i32"}
    check(compile_sm90(combine_stats_kernel, signature, {"ENTROPY": True, **COMBINE}, num_warps=4))
    tile = {"SLOTS": SLOTS, "BLOCK_H": BLOCK_H}
    for kernel, total, constants in (
        (add_product_kernel, "*fp32", tile),
        (add_transposed_kernel, "*bf16", tile | {"BLOCK_ROWS": BLOCK_ROWS}),
    ):
        pointers = ("out", "weight", "hidden")
        signature = {name: "*bf16" if name in pointers else "i32" for name in kernel.arg_names}
        signature |= {"total": total, "value_ptr": "*fp32"}
        signature |= dict.fromkeys(("token_ptr", "entry_ptr", "end_ptr"), "*i64")
        constants |= dict.fromkeys((name for name in kernel.arg_names if name.endswith("_step")), 1)
        strides = [name for name in kernel.arg_names if name.endswith("_stride")]
        check(compile_sm90(kernel, signature, constants, aligned=("H", *strides), num_warps=4))
    signature = {"x": "*bf16", "factor_ptr": "*fp32", "n": "i32"}
    check(
        compile_sm90(scale_kernel, signature, {"BLOCK": SCALE["BLOCK"]}, aligned=("n",), num_warps=SCALE["num_warps"])
    )
