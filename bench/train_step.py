"""Forward and backward of a GRPO group: one packed layout with a shared prompt beside G dense copies of it.

    python bench/train_step.py --preset 7B --lora --prompt-tokens 1024 --completion-tokens 256 --copies-per-pass 4
    python bench/train_step.py --device cpu --prompt-tokens 512 --completion-tokens 32 --group-size 8 16

Both are the same policy with the same kernels, from random weights, in one process, taking turns; times are the fastest
of `--steps`. The gradients of both are compared, so that the figure is of equal work. `floor` is the ratio of both
sides' floating-point operations: with N parameters in matrices, H·V of them in the head, and causal attention,

    shared  2·N·(P + G·L) + 2·H·V·G·L + layers·4·W·(P²/2 + G·L·(P + L/2))       W = heads · head size
    dense   2·N·G·(P + L) + 2·H·V·G·L + layers·4·W·G·(P + L)²/2
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import PRESETS, Memory, add_device, device_name, make_model, matrix_parameters, synchronize, write_results

from grpo_core.layout import GroupLayout
from grpo_core.policy import Policy
from grpo_core.types import Prompt


def floor_ratio(preset: str, prompt: int, completion: int, members: int) -> float:
    """Compute the ratio of floating-point operations, dense copies over shared layout."""
    width, _, layers, _, _, vocabulary = PRESETS[preset]  # heads · head size is the hidden size, in Qwen2.5
    matrices = matrix_parameters(preset)
    head = 2 * width * vocabulary * members * completion
    scores = prompt**2 / 2 + members * completion * (prompt + completion / 2)
    shared = 2 * matrices * (prompt + members * completion) + head + layers * 4 * width * scores
    scores = members * (prompt + completion) ** 2 / 2
    dense = 2 * matrices * members * (prompt + completion) + head + layers * 4 * width * scores
    return dense / shared


def measure(policy: Policy, passes: list[tuple[GroupLayout, list[Prompt]]], args: argparse.Namespace) -> dict:
    """Measure seconds and peak bytes of forward and backward over all passes, and return the gradient."""
    parameters = list(policy.named_parameters().values())
    counts = [layout.num_predicted for layout, _ in passes]
    weights = torch.randn(sum(counts), generator=torch.Generator().manual_seed(0)).to(args.device).split(counts)
    seconds, peak = [], 0
    for _ in range(args.steps + 1):
        for parameter in parameters:
            parameter.grad = None
        memory = Memory(args.device)
        start = time.perf_counter()
        for (layout, prompts), weight in zip(passes, weights, strict=True):
            (policy.logprobs(layout, prompts).logprob * weight).sum().backward()
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, memory.peak())
    gradient = torch.cat([p.grad.float().flatten() for p in parameters]).cpu()
    return {"seconds": min(seconds[1:]), "peak_bytes": peak, "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--group-size", type=int, nargs="+", default=[8, 16])
    parser.add_argument(
        "--copies-per-pass", type=int, default=0, help="dense copies of a forward and backward; 0: all at once"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed calls, after one that warms up")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="shape of the model")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters of rank 16 on all linear layers")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    policy = Policy(make_model(args.preset, args.device, args.prompt_tokens + args.completion_tokens, lora=args.lora))
    vocabulary, rows = PRESETS[args.preset][-1], []
    prompt, completion = args.prompt_tokens, args.completion_tokens
    print(f"{device_name(args.device)}, {args.preset}{' + LoRA' if args.lora else ''}, P={prompt} L={completion}")
    for members in args.group_size:
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocabulary, (prompt,), generator=g).tolist()
        completions = torch.randint(3, vocabulary, (members, completion), generator=g).tolist()
        shared = GroupLayout.pack([ids], [completions], args.device)
        prompts = [Prompt(str(i), tuple(ids)) for i in range(members)]
        step = args.copies_per_pass or members
        dense = [
            (GroupLayout.pack([ids] * len(own), [[c] for c in own], args.device), prompts[: len(own)])
            for own in (completions[start : start + step] for start in range(0, members, step))
        ]
        results = {
            "shared": measure(policy, [(shared, prompts[:1])], args),
            "dense": measure(policy, dense, args),
        }
        ours, copies = (results[name].pop("gradient") for name in ("shared", "dense"))
        row = {
            "group_size": members,
            **results,
            "ratio": results["dense"]["seconds"] / results["shared"]["seconds"],
            "memory_ratio": results["dense"]["peak_bytes"] / max(results["shared"]["peak_bytes"], 1),
            "floor": floor_ratio(args.preset, prompt, completion, members),
            "gradient_difference": float((ours - copies).norm() / copies.norm()),
        }
        rows.append(row)
        for name in ("shared", "dense"):
            seconds, peak = row[name]["seconds"], row[name]["peak_bytes"]
            print(f"G={members:3d}  {name:7s} {seconds * 1000:9.1f} ms {peak / 2**20:8.0f} MiB")
        print(
            f"       ratio {row['ratio']:.2f} (floor {row['floor']:.2f})   memory 1/{row['memory_ratio']:.2f}   "
            f"gradients differ by {row['gradient_difference']:.1e}"
        )
    write_results({"rows": rows}, args, f"train_step-{{device}}-{args.preset}")


if __name__ == "__main__":
    main()
