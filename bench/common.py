"""Shared code of the benchmarks: model shapes, peak memory, measured ceilings, and result files."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = Path(__file__).parent / "results"
PRESETS = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "tiny": (256, 1024, 4, 4, 2, 8192),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
}
"""Qwen2.5's shapes, and one for a CPU."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`; asking for a GPU that is not there is a mistake in the arguments."""

    def available(name: str) -> str:
        if name == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(
                "this machine has no CUDA device that torch sees: leave it out, or use cpu"
            )
        return name

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=available, choices=["cuda", "cpu"], default=default)


def make_model(preset: str, device: str, positions: int, *, lora: bool = False, end: int | None = 1) -> PreTrainedModel:
    """A Qwen2 of the preset's shape with random weights, made on the device; bfloat16 on a GPU, float32 on a CPU.

    Args:
        positions: tokens that it must take.
        lora: with LoRA adapters of rank 16 on all linear layers but the head.
        end: its end token; None: completions go on to the full length.
    """
    # not at the top: transformers looks for a package called kernels and finds kernels.py beside this file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = PRESETS[preset]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(4096, positions),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", exclude_modules=["lm_head"]))
    return model


def matrix_parameters(preset: str) -> int:
    """Count the parameters of the decoder layers' matrices."""
    hidden, intermediate, layers, heads, kv_heads, _ = PRESETS[preset]
    return layers * (2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * intermediate)


class Memory:
    """Measures the peak of memory since it was made, in bytes beyond what was allocated then."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work left to the allocator
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
            self.before = self._status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.before

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def synchronize(device: str) -> None:
    """Wait until the device has finished all submitted work."""
    if device == "cuda":
        torch.cuda.synchronize()


def fastest(function: Callable[[], object], device: str, calls: int = 5) -> float:
    """Return the seconds of the fastest call, after a warm-up call."""
    times = []
    for _ in range(calls + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(device: str) -> dict[str, float]:
    """What the device reaches at best, measured: bytes a second of a large copy, read and written bytes counted, and
    FLOP a second of a large matrix product in the models' precision."""
    size, side, dtype = (2**31, 8192, torch.bfloat16) if device == "cuda" else (2**28, 2048, torch.float32)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    out = torch.empty_like(matrix)
    return {
        "bytes_per_second": 2 * size / fastest(lambda: target.copy_(source), device),
        "flop_per_second": 2 * side**3 / fastest(lambda: torch.mm(matrix, matrix, out=out), device),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def write_results(results: dict, args: argparse.Namespace, name: str) -> None:
    """Write results, with what they depend on, as JSON to `--json` or to `bench/results/<name>-<date>.json`; a
    `{device}` in the name is filled in."""
    device = device_name(args.device)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    arguments = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}  # no paths
    results = results | {"device": device, "torch": torch.__version__, "date": date, "arguments": arguments}
    path = args.json or RESULTS / f"{name.format(device=device.replace(' ', '-').lower())}-{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit("this file holds what the benchmarks share: run one of them, such as bench/rollout.py")
