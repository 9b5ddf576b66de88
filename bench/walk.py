"""Count the files, functions and lines that one GRPO step executes: what a reader of the step walks through.

    python bench/walk.py
    python bench/walk.py --functions --json walk.json

The step is of the toy task of the tests: a two-layer Qwen2 with LoRA adapters in float32 on a CPU, one reward, β =
0.1, so that the reference pass runs. The first step warms up (caches, adapter state, lazy imports); the second is
traced with `sys.settrace`. Counted are `grpo_core` and `grpo_kernels`:

- files: source files of which at least one line was executed;
- functions: distinct named functions and methods. Lambdas and comprehensions are not counted as functions (a reader
  reads them in place), and neither is what `dataclass` generates, which has no source;
- lines: distinct executed lines, those inside lambdas and comprehensions included.

These are a measure of how much code one step is made of; they are no measure of speed. Before the packages were
rearranged (commit a74450b) this script counted 42 files, 237 functions and 1,278 lines; after it 30, 145 and 1,283.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("grpo_core", "grpo_kernels")


@dataclass
class Walk:
    """Executed functions and lines by file, with paths relative to the folder of the package."""

    functions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    lines: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def totals(self) -> dict[str, int]:
        """Count the distinct files, functions and lines."""
        return {
            "files": len(self.lines),
            "functions": sum(map(len, self.functions.values())),
            "lines": sum(map(len, self.lines.values())),
        }

    def table(self) -> str:
        """Format one row per file, longest first, and the totals."""
        width = max(map(len, self.lines))
        rows = [f"{'file':{width}}  functions  lines"]
        for path in sorted(self.lines, key=lambda path: (-len(self.lines[path]), path)):
            rows.append(f"{path:{width}}  {len(self.functions[path]):9}  {len(self.lines[path]):5}")
        total = self.totals()
        rows.append(f"{str(total['files']) + ' files':{width}}  {total['functions']:9}  {total['lines']:5}")
        return "\n".join(rows)

    def as_json(self) -> dict[str, Any]:
        """The totals and, for each file, its functions by name and its number of lines."""
        files = {
            path: {"functions": sorted(self.functions[path]), "lines": len(self.lines[path])} for path in self.lines
        }
        return {**self.totals(), "by_file": dict(sorted(files.items()))}


def package_folders(packages: Sequence[str]) -> dict[str, str]:
    """Map each package's folder, as it appears in code objects, to the package's name."""
    folders = {}
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"package {package!r} is not importable: set PYTHONPATH=.:kernels:model")
        folders[str(Path(spec.submodule_search_locations[0]))] = package
    return folders


def trace(call: Callable[[], object], packages: Sequence[str] = PACKAGES) -> Walk:
    """Run `call` and record which functions and lines of `packages` it executes.

    Only this thread is traced. On a CPU that is all of it: autograd runs the backward pass, and with it the
    `backward` of custom functions, in the thread that called it.
    """
    folders = package_folders(packages)
    walk = Walk()
    names: dict[CodeType, str | None] = {}  # a code object's path below the package; None: not ours

    def path_of(code: CodeType) -> str | None:
        for folder, package in folders.items():
            if code.co_filename.startswith(folder + "/"):
                return package + code.co_filename[len(folder) :]
        return None

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code not in names:
            names[code] = path_of(code)
        path = names[code]
        if path is None:
            return None  # no line events for torch, transformers, the standard library
        # `<lambda>`, `<listcomp>`, `<genexpr>`, and `<module>` of a late import are no named functions
        if not code.co_name.startswith("<"):
            walk.functions[path].add(code.co_qualname)
        lines = walk.lines[path]

        def executed(frame: FrameType, event: str, argument: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return executed

        return executed

    earlier = sys.gettrace()  # a debugger's or a coverage tool's
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(earlier)
    return walk


def toy_trainer(folder: Path) -> Any:
    """A GRPO run that needs seconds: Qwen2 of two layers, LoRA, twelve short prompts, β = 0.1, float32 on a CPU."""
    # imported here, so that `--help` answers at once
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from grpo_core.config.options import AlgorithmConfig, GRPOConfig, OptimConfig, RolloutConfig, RunConfig
    from grpo_core.policy import Policy
    from grpo_core.rollout.sampler import GroupSampler
    from grpo_core.training.grpo import GRPOTrainer
    from grpo_core.types import Prompt

    class CountSevens:
        """Reward: the share of sevens among a completion's tokens."""

        name = "sevens"

        def __call__(self, groups: Sequence[Any]) -> Any:
            return np.array([[c.token_ids.count(7) / len(c.token_ids) for c in g.completions] for g in groups])

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.08,  # four times the usual: the default gives nearly uniform distributions
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0", unk_token="w2")
    config = GRPOConfig(
        AlgorithmConfig(beta=0.1),
        RolloutConfig(group_size=4, max_new_tokens=6),
        OptimConfig(learning_rate=1e-2),
        RunConfig(name="walk", output_dir=folder, max_steps=2, save_steps=0, prompts_per_step=4),
    )
    policy = Policy(model, reference=config.algorithm.reference)
    prompts = [Prompt(f"p{i}", tuple(10 + (i * k) % 50 for k in range(1, 4 + i % 3))) for i in range(12)]
    return GRPOTrainer(policy, GroupSampler(policy, tokenizer, seed=0), prompts, [CountSevens()], config)


def walk_one_step() -> Walk:
    """Train the toy for two steps, and trace the second."""
    walks: list[Walk] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = toy_trainer(Path(folder))
        step = trainer.step

        # train() opens the run's files, then calls self.step(): this instance's attribute comes before the method
        def traced_step() -> dict[str, float]:
            values: list[dict[str, float]] = []
            walks.append(trace(lambda: values.append(step())))
            return values[0]

        trainer.step = traced_step
        with contextlib.redirect_stdout(sys.stderr):  # the progress of a run is no result of this script
            trainer.train()
    return walks[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="name the functions of each file too")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    walk = walk_one_step()
    print(walk.table())
    if args.functions:
        for path in sorted(walk.functions):
            print(f"\n{path}: {', '.join(sorted(walk.functions[path]))}")
    if args.json:
        args.json.write_text(json.dumps(walk.as_json(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
