"""Every configuration of the sampling kernels compiles for sm_90: no spills, tensor cores and TMA in the head."""

from __future__ import annotations

import pytest

from grpo_kernels._backend import interpreted
from grpo_kernels.sampling.record_tokens import BLOCK, record_tokens_kernel
from grpo_kernels.sampling.sample_head import combine_samples_kernel, head_config, sample_head_kernel
from grpo_kernels.sampling.sample_row import ROW, sample_row_kernel
from grpo_kernels.testing.sm90 import SHARED_LIMIT, compile_sm90

pytestmark = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: there is nothing to compile")

ALL = dict.fromkeys(("PENALTY", "FORBIDDEN", "FORCED", "TOP_K", "TOP_P", "MIN_P"), True)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(compiled):
    assert compiled.stack == 0
    assert compiled.shared <= SHARED_LIMIT
    assert compiled.registers * 32 * compiled.warps <= 65_536
    # the hardware's fast logarithm is off by 2⁻²² next to 1, where a likely token's log-prob and rare noise lie
    assert compiled.count(r"MUFU\.LG2") == 0


def types(kernel, **others):
    return dict.fromkeys(kernel.arg_names, "*fp32") | {
        "keys": "*i64",
        "positions": "*i32",
        "token_ptr": "*i64",
        "forbidden": "*u8",
        "forced": "*i64",
        "inverse_temperature": "fp32",
        **others,
    }


@pytest.mark.parametrize(
    ("kind", "switches"), [("*fp32", {}), ("*fp32", ALL), ("*bf16", {"TOP_P": True}), ("*fp32", {"GREEDY": True})]
)
def test_row_kernel(kind, switches):
    numbers = dict.fromkeys(("penalty", "top_k", "top_p", "log_min_p"), "fp32")
    sizes = dict.fromkeys(("V", "logits_stride", "seen_stride"), "i32")
    constants = dict.fromkeys(("GREEDY", *ALL), False) | switches | {name: ROW[name] for name in ("BLOCK", "PIVOTS")}
    signature = types(sample_row_kernel, logits=kind, seen="*u8", **numbers, **sizes)
    check(compile_sm90(sample_row_kernel, signature, constants, aligned=sizes, num_warps=ROW["num_warps"]))


@pytest.mark.parametrize(
    ("batch", "switches"),
    [
        (1, {}),
        (16, {"FORBIDDEN": True}),
        (32, {"FORBIDDEN": True}),
        (256, {"FORBIDDEN": True, "BIAS": True, "FORCED": True}),
    ],
)
def test_head_kernel(batch, switches):
    config = head_config(batch)
    launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    signature = types(
        sample_head_kernel,
        hidden=f"tensordesc<bf16[{config['BLOCK_B']}, {config['BLOCK_H']}]>",
        weight=f"tensordesc<bf16[{config['BLOCK_V']}, {config['BLOCK_H']}]>",
        bias="*bf16",
        winners="*i32",
        **dict.fromkeys("BVH", "i32"),
    )
    constants = dict.fromkeys(("GREEDY", "BIAS", "FORBIDDEN", "FORCED"), False) | switches | config
    compiled = compile_sm90(sample_head_kernel, signature, constants, aligned=("V", "H"), **launch)
    check(compiled)
    assert compiled.count("HGMMA") > 0
    assert compiled.count("UTMALDG") > 0


def test_combine_kernel():
    signature = types(combine_samples_kernel, winners="*i32", B="i32", tiles="i32")
    check(compile_sm90(combine_samples_kernel, signature, {"BLOCK": 2048, "FORCED": True}, num_warps=4))


@pytest.mark.parametrize("seen", [False, True])
def test_record_tokens(seen):
    signature = dict.fromkeys(record_tokens_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("token", "last", "drawn", "position", "ended"), "*i64")
    signature |= {"logprob": "*fp32", "end": "*u8", "record": "*i32", "seen": "*u8"}
    check(compile_sm90(record_tokens_kernel, signature, {"SEEN": seen, "BLOCK": BLOCK}, num_warps=4))
