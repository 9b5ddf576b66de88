"""Tokens a second of group sampling beside transformers' `generate` on the same model, prompts and lengths.

    python bench/rollout.py --prompts 1 --group-size 16 --prompt-tokens 512 --completion-tokens 32 --json out.json

Both sample at temperature 1 and draw every token to the end (no end token), from one process, taking turns; each one's
figure is its fastest turn. The peer computes a prompt once per completion, as `num_return_sequences` does; it runs with
its default cache and with its static cache, and the ratio is to the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo_core.config import RolloutConfig
from grpo_core.groups import Prompt
from grpo_core.policy import Policy
from grpo_core.sampler import GroupSampler


class NoTokenizer:
    """A vocabulary without text: completions are timed, not read."""

    eos_token_id = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return ""


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """A Qwen2 of the given sizes with random weights and no end token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(4096, args.prompt_tokens + args.completion_tokens),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)).eval()


def fastest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each function's fastest call, the functions taking turns."""
    seconds = dict.fromkeys(functions, float("inf"))
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=0, help="0: four times --hidden")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = make_model(args)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args.vocabulary, (args.prompts, args.prompt_tokens), generator=generator).to(args.device)
    prompts = [Prompt(str(n), tuple(row)) for n, row in enumerate(ids.tolist())]
    rollout = RolloutConfig(group_size=args.group_size, max_new_tokens=args.completion_tokens)
    sampler = GroupSampler(Policy(model), NoTokenizer(args.vocabulary))

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

    seconds = fastest(
        {
            "ours": lambda: sampler.sample(prompts, rollout),
            "generate": generate,
            "generate, static cache": lambda: generate(cache_implementation="static", disable_compile=True),
        },
        args.rounds,
    )
    tokens = args.prompts * args.group_size * args.completion_tokens
    peer = min(time for name, time in seconds.items() if name != "ours")
    result = {
        "command": vars(args) | {"json": None},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "tokens_per_second": {name: tokens / time for name, time in seconds.items()},
        "ratio": peer / seconds["ours"],
        "phases": sampler.timings,
    }
    for name, time_ in seconds.items():
        print(f"{name:24s} {time_:8.4f} s {tokens / time_:10.0f} tokens/s")
    print(f"ratio {result['ratio']:.2f}   " + "  ".join(f"{k} {v:.4g}" for k, v in sampler.timings.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
