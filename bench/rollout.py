"""Tokens a second of group sampling beside transformers' `generate` on the same model, prompts and lengths.

    python bench/rollout.py                                                                  on a CPU: one prompt
    python bench/rollout.py --preset 0.5B 7B --prompts 1 4 16 32 --completion-tokens 256     on a GPU

All sample at temperature 1 and draw every token to the end (no end token), from one process, taking turns; each one's
figure is its fastest turn. The peer computes a prompt once per completion, as `num_return_sequences` does; it runs with
its default cache and with its static one (compiled on a GPU), and the ratio is to the faster of the two.

A step, the next token of every row, has a floor: the weights and caches it must read at the speed of a large copy, or
its FLOP at the speed of a large matrix product, whichever takes longer; both speeds are measured first. With M
parameters in the layers' matrices, H·V in the head, K bytes of keys and values a token, N prompts and j tokens drawn,

    bytes   size · (M + H·V) + K·N·(P + G·j)        FLOP   2·(M + H·V)·N·G + layers·4·H·N·G·(P + j)

and the floor of a rollout's decoding is the sum over its steps. `of_floor` is the floor over what decoding took. KV
bytes are those of whole rollouts, and without sharing, K·N·G·(P + L).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import PRESETS, add_device, ceilings, device_name, make_model, matrix_parameters, synchronize, write_results

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout.sampler import GroupSampler
from grpo_core.types import Prompt

CONTENDERS = ("ours", "generate", "generate, static cache")


class NoTokenizer:
    """Tokenizer without text: completions are timed, not read."""

    eos_token_id = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return ""


def floor(preset: str, prompts: int, args: argparse.Namespace, speeds: dict[str, float]) -> dict[str, float]:
    """Compute the least seconds of a rollout's decoding, and its KV bytes with and without sharing."""
    hidden, _, layers, heads, kv_heads, vocabulary = PRESETS[preset]
    members, prompt, completion = args.group_size, args.prompt_tokens, args.completion_tokens
    size = 2 if args.device == "cuda" else 4
    weights, rows = matrix_parameters(preset) + hidden * vocabulary, prompts * members
    token = 2 * layers * hidden * kv_heads // heads * size
    seconds = 0.0
    for drawn in range(1, completion):  # prefill gives the first token
        read = size * weights + token * prompts * (prompt + members * drawn)
        flop = 2 * weights * rows + layers * 4 * hidden * rows * (prompt + drawn)
        seconds += max(read / speeds["bytes_per_second"], flop / speeds["flop_per_second"])
    return {
        "floor_seconds": seconds,
        "kv_bytes": token * prompts * (prompt + members * completion),
        "kv_bytes_without_sharing": token * rows * (prompt + completion),
    }


def take_turns(functions: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, float | None]:
    """Time each function's fastest call after a warm-up call, in seconds; None if memory ran out."""
    seconds: dict[str, float | None] = dict.fromkeys(functions, float("inf"))
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if seconds[name] is None:
                continue
            start = time.perf_counter()
            try:
                function()
            except torch.OutOfMemoryError:
                seconds[name] = None
                continue
            synchronize(device)
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(preset: str, model, prompts: int, args: argparse.Namespace, speeds: dict[str, float]) -> dict:
    """Format one row of the table."""
    vocabulary = PRESETS[preset][-1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (prompts, args.prompt_tokens), generator=generator).to(args.device)
    asked = [Prompt(str(n), tuple(row)) for n, row in enumerate(ids.tolist())]
    rollout = RolloutConfig(group_size=args.group_size, max_new_tokens=args.completion_tokens)
    sampler = GroupSampler(Policy(model), NoTokenizer(vocabulary))
    timings: list[dict[str, float]] = []

    def ours() -> None:
        sampler.sample(asked, rollout)
        timings.append(sampler.timings)

    def generate(**options) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.completion_tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=args.group_size,
            **options,
        )

    static = {"cache_implementation": "static", "disable_compile": args.device == "cpu"}
    functions = dict(zip(CONTENDERS, (ours, generate, lambda: generate(**static)), strict=True))
    seconds = take_turns({name: functions[name] for name in args.contenders}, args.device, args.rounds)
    tokens = prompts * args.group_size * args.completion_tokens
    row = {
        "preset": preset,
        "prompts": prompts,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / taken for name, taken in seconds.items() if taken},
        **floor(preset, prompts, args, speeds),
    }
    if seconds.get("ours"):
        decoding = min(timings[1:], key=lambda each: each["decode"])
        row["phases"] = decoding
        row["step_ms"] = decoding["decode"] / (args.completion_tokens - 1) * 1e3
        row["of_floor"] = row["floor_seconds"] / decoding["decode"]
        peers = [taken for name, taken in seconds.items() if taken and name != "ours"]
        if peers:
            row["ratio"] = min(peers) / seconds["ours"]
    return row


def show(row: dict) -> None:
    print(f"\n{row['preset']}, {row['prompts']} prompts")
    for name, taken in row["seconds"].items():
        speed = f"{taken:9.4f} s {row['tokens_per_second'][name]:10.0f} tokens/s" if taken else "out of memory"
        print(f"  {name:24s} {speed}")
    shared, whole = row["kv_bytes"] / 2**20, row["kv_bytes_without_sharing"] / 2**20
    print(f"  keys and values {shared:.1f} MiB, {whole:.1f} without sharing")
    if "step_ms" in row:
        line = f"  a step {row['step_ms']:.3f} ms, {row['of_floor']:.0%} of the floor"
        print(line + (f"   ratio {row['ratio']:.2f}" if "ratio" in row else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), help="shapes; default tiny, on a GPU all others")
    parser.add_argument("--prompts", type=int, nargs="+", help="at once; default 1, on a GPU 1 4 16 32")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each contender")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.preset = args.preset or ([preset for preset in PRESETS if preset != "tiny"] if on_gpu else ["tiny"])
    args.prompts = args.prompts or ([1, 4, 16, 32] if on_gpu else [1])

    speeds = ceilings(args.device)
    print(
        f"{device_name(args.device)}, G={args.group_size} P={args.prompt_tokens} L={args.completion_tokens}; copies "
        f"{speeds['bytes_per_second'] / 1e9:.0f} GB/s, matrix products {speeds['flop_per_second'] / 1e12:.2f} TFLOP/s"
    )
    rows = []
    for preset in args.preset:
        model = make_model(preset, args.device, args.prompt_tokens + args.completion_tokens, end=None).eval()
        for prompts in args.prompts:
            rows.append(measure(preset, model, prompts, args, speeds))
            show(rows[-1])
        del model
    write_results({"rows": rows, "threads": torch.get_num_threads(), **speeds}, args, "rollout-{device}")


if __name__ == "__main__":
    main()
