"""A whole GRPO step, sample, reward and train (β = 0), beside TRL's `GRPOTrainer` on the same model and prompts.

    python bench/grpo_step.py --prompt-tokens 512 --completion-tokens 32 --group-size 16 --json out.json
    python bench/grpo_step.py --device cuda --preset 7B --lora --prompt-tokens 1024 --completion-tokens 256 --prompts 8

Four contenders, each in a separate process, on all cores (or the GPU): ours; ours with sharing off, where every
completion is a separate group with its own copy of the prompt, in sampling and in training; TRL
(`pip install trl==1.16.0`) as it comes; and TRL without gradient checkpointing, its default. On a CPU they take a step
each in turn, so that a busy minute of the machine is everyone's; on a GPU, whose memory they would have to share, one
runs after the other. TRL trains on a group at a time (at P = 192, G = 16, 4 prompts the whole step in one micro-batch
was slower and larger), and so do we on a CPU, for the same reasons. All start from the same random weights, and draw
completions at temperature 1 to the full length, but for the rare end token.
A step's seconds are the fastest of `--steps`, after one that warms up. Peaks are what a process takes beyond what it
held before its first step: resident memory on a CPU, allocated memory on a GPU.

The JSON has `ours`, `without_sharing`, `trl` and `trl_no_checkpointing`, each `{seconds, peak_bytes, phases}`, and
TRL's figures over ours: `ratio` and `memory_ratio`, and the same two for `…_no_checkpointing`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import PRESETS, Memory, add_device, device_name, make_model, synchronize, write_results
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTENDERS = ("trl", "trl_no_checkpointing", "ours", "without_sharing")
ANSWER = "answer: "


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one word per token: w0, w1, …"""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0", unk_token="w2")


def make_prompts(args: argparse.Namespace) -> np.ndarray:
    """Draw the prompts of the whole run, token ids `[steps + 1, prompts, P]`."""
    shape = (args.steps + 1, args.prompts, args.prompt_tokens)
    return np.random.default_rng(0).integers(3, PRESETS[args.preset][-1], shape)


def even_share(token_ids: np.ndarray) -> float:
    """Reward the share of even tokens."""
    return float((token_ids % 2 == 0).mean())


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    return make_model(args.preset, args.device, args.prompt_tokens + args.completion_tokens, lora=args.lora)


def run_ours(args: argparse.Namespace, shared: bool) -> None:
    """Our trainer, step by step."""
    from grpo_core.config.options import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, RunConfig
    from grpo_core.distributed import Distributed
    from grpo_core.policy import Policy
    from grpo_core.rollout.sampler import GroupSampler
    from grpo_core.training.grpo import GRPOTrainer
    from grpo_core.types import Group, Prompt

    class EvenShare:
        name = "even"

        def __call__(self, groups):
            return np.array([[even_share(np.array(c.token_ids)) for c in group.completions] for group in groups])

    class WithoutSharing(GRPOTrainer):
        """Give every completion its own copy of the prompt."""

        def sample(self, prompts):
            size = self.config.rollout.group_size
            copies = [Prompt(f"{p.id}/{i}", p.token_ids) for p in prompts for i in range(size)]
            alone = RolloutConfig(group_size=1, max_new_tokens=self.config.rollout.max_new_tokens)
            with self.clock.phase("sample"):
                drawn = iter(self.sampler.sample(copies, alone, step=self.step_index))
            return [Group(p, [next(drawn).completions[0] for _ in range(size)]) for p in prompts]

        def select(self, groups, scores):
            alone = [Group(group.prompt, [completion]) for group in groups for completion in group.completions]
            by_reward, total = scores.by_reward.reshape(len(scores.names), -1, 1), scores.total.reshape(-1, 1)
            positions = [place for place, group in zip(self.positions, groups, strict=True) for _ in group.completions]
            return alone, replace(scores, by_reward=by_reward, total=total), positions

        def advantages(self, scores, *others):
            grouped = replace(scores, total=scores.total.reshape(-1, self.config.rollout.group_size))
            return super().advantages(grouped, *others).reshape(-1, 1)

    model = model_of(args)
    ids = make_prompts(args)
    prompts = [
        Prompt(f"{step}/{i}", tuple(map(int, row))) for step, rows in enumerate(ids) for i, row in enumerate(rows)
    ]
    group_tokens = args.prompt_tokens + args.group_size * args.completion_tokens
    micro_batch_tokens = args.micro_batch_tokens or (group_tokens if args.device == "cpu" else 16_384)
    config = GRPOConfig(
        AlgorithmConfig(),
        RolloutConfig(group_size=args.group_size, max_new_tokens=args.completion_tokens),
        OptimConfig(learning_rate=1e-6, max_tokens_per_micro_batch=micro_batch_tokens),
        RunConfig(
            output_dir=Path(tempfile.mkdtemp()), max_steps=args.steps + 1, prompts_per_step=args.prompts, save_steps=0
        ),
    )
    policy = Policy(model)
    dist = Distributed(device=torch.device(args.device))
    sampler = GroupSampler(policy, make_tokenizer(PRESETS[args.preset][-1]))
    trainer = (GRPOTrainer if shared else WithoutSharing)(policy, sampler, prompts, [EvenShare()], config, dist=dist)
    trainer.open_writer(None)
    memory = Memory(args.device)
    for _ in range(args.steps + 1):
        wait_for_turn()
        start = time.perf_counter()
        values = trainer.step()
        synchronize(args.device)
        seconds = time.perf_counter() - start
        phases = {key[5:]: value for key, value in values.items() if key.startswith("time/") and value}
        answer({"seconds": seconds, "phases": phases})
    answer({"peak_bytes": memory.peak()})


def run_trl(args: argparse.Namespace, checkpointing: bool) -> None:
    """TRL's trainer, timed by its callbacks."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = make_tokenizer(PRESETS[args.preset][-1])
    rows = make_prompts(args).reshape(-1, args.prompt_tokens)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.group_size,
        gradient_accumulation_steps=args.prompts,
        num_generations=args.group_size,
        max_completion_length=args.completion_tokens,
        max_steps=args.steps + 1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-6,
        gradient_checkpointing=checkpointing,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_steps=10**6,
        report_to=[],
        disable_tqdm=True,
        shuffle_dataset=False,
    )

    def reward(completion_ids, **columns):
        return [even_share(np.array(ids)) for ids in completion_ids]

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            synchronize(args.device)
            wait_for_turn()
            self.start, self.generation = time.perf_counter(), 0.0

        def on_step_end(self, *arguments, **options):
            synchronize(args.device)
            seconds = time.perf_counter() - self.start
            phases = {"sample": self.generation, "train": seconds - self.generation}
            answer({"seconds": seconds, "phases": phases})

    clock = Clock()
    trainer = GRPOTrainer(
        model_of(args),
        reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    generate = trainer._generate_and_score_completions

    def timed(*arguments):
        start = time.perf_counter()
        result = generate(*arguments)
        synchronize(args.device)
        clock.generation += time.perf_counter() - start
        lengths = result["completion_mask"].sum(1)
        assert lengths.shape[0] == args.prompts * args.group_size
        assert lengths.float().mean() > 0.9 * args.completion_tokens
        return result

    trainer._generate_and_score_completions = timed
    memory = Memory(args.device)
    trainer.train()
    answer({"peak_bytes": memory.peak()})


class Worker:
    """A contender in a separate process, with the arguments of this one."""

    def __init__(self, name: str):
        self.name, self.steps = name, []
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> None:
        """Let the contender make a step."""
        with contextlib.suppress(BrokenPipeError):  # a process that has ended has said why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.steps.append(self._hear())

    def result(self) -> dict:
        """Return its fastest step after the first, and its peak memory."""
        return min(self.steps[1:], key=lambda step: step["seconds"]) | self._hear()

    def _hear(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self.name} ended early: see its error above")


def wait_for_turn() -> None:
    """In a worker: wait until the step may begin."""
    sys.stdin.readline()


def answer(values: dict) -> None:
    """In a worker: report the measurements."""
    print(ANSWER + json.dumps(values), flush=True)


def compare(names: list[str], steps: int) -> dict[str, dict]:
    """Measure contenders that make their steps in turn."""
    workers = [Worker(name) for name in names]
    try:
        for _ in tqdm(range(steps + 1), desc=", ".join(names), unit="step", leave=False):
            for worker in workers:
                worker.step()
        return {worker.name: worker.result() for worker in workers}
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that warms up")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="shape of the model")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters of rank 16 on all linear layers")
    parser.add_argument(
        "--micro-batch-tokens",
        type=int,
        help="ours: most tokens of a forward and backward; default a group's on a CPU, 16,384 on a GPU",
    )
    add_device(parser)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker.startswith("trl"):
            run_trl(args, checkpointing=args.worker == "trl")
        else:
            run_ours(args, shared=args.worker == "ours")
        return
    names = args.contenders
    if any(name.startswith("trl") for name in names) and importlib.util.find_spec("trl") is None:
        print("left out: TRL (not installed: pip install trl==1.16.0)")
        names = [name for name in names if not name.startswith("trl")]
    shape = f"P={args.prompt_tokens} C={args.completion_tokens} G={args.group_size}, {args.prompts} prompts"
    print(f"{device_name(args.device)}, {args.preset}, {shape}, {os.cpu_count()} cores")
    results: dict = {}
    for together in [names] if args.device == "cpu" else [[name] for name in names]:
        for name, result in compare(together, args.steps).items():
            results[name] = result
            phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in result["phases"].items())
            mebibytes = result["peak_bytes"] / 2**20
            print(f"{name:21s} {result['seconds']:7.2f} s   {mebibytes:6.0f} MiB   {phases}", flush=True)
    for name in [name for name in results if name.startswith("trl") and "ours" in results]:
        suffix = name.removeprefix("trl")
        results[f"ratio{suffix}"] = ratio = results[name]["seconds"] / results["ours"]["seconds"]
        results[f"memory_ratio{suffix}"] = memory = results[name]["peak_bytes"] / results["ours"]["peak_bytes"]
        print(f"{name} / ours: time {ratio:.2f}   memory {memory:.2f}")
    shape = f"p{args.prompt_tokens}-c{args.completion_tokens}-g{args.group_size}-n{args.prompts}"
    write_results(results, args, f"grpo_step-{{device}}-{shape}")


if __name__ == "__main__":
    main()
