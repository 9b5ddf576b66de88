"""Run everything worth running on a GPU, most valuable first, and always report: what `make gpu` calls.

    python bench/gpu_round.py --out DIR [--seconds 540] [--resume EARLIER] [--only NAME …] [--skip NAME …] [--list]

Each stage is a process with its own time limit, so one that crashes, hangs or lacks a package costs its own limit and
nothing else. DIR gets one log a stage, the JSON of the benches, `summary.jsonl` (a line as each stage ends) and
`summary.txt`, which is also what is printed. Stages that passed according to DIR/summary.jsonl, or to
EARLIER/summary.jsonl (the folder of an earlier round for the same code), are not run again. The exit status is 1 if a
stage that ran did not pass.

Test files are found, not listed: every `tests/**/test_*_gpu.py` is a stage of its own, and the GPU tests inside other
files run together in the stage `values-rest`. `FIRST` orders the files by the words in their paths.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PY = sys.executable
PYTEST = [PY, "-m", "pytest", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--tb=short"]

# What an error would spoil most comes first: wrong tokens or log-probs make every later figure worthless. A file's
# place is that of the first of these words that its path contains; files with none of them come last.
FIRST = ("sampl", "decode_gpu", "lm_head", "head", "logprob", "attention", "decode", "layers", "rollout", "training")
# The row pass narrows fp32 logits to a half-precision gradient in place; races there are what the interpreter cannot
# show.
RACECHECK_TESTS = "333 and logprob"
MARKED = re.compile(r"^\s*(@pytest\.mark\.gpu|pytestmark = .*mark\.gpu)", re.MULTILINE)


class Stage(NamedTuple):
    """One process of a round."""

    name: str
    limit: int  # seconds
    command: list[str]


def gpu_test_files() -> tuple[list[Path], list[Path]]:
    """Find the test files with GPU tests, relative to the repository: those named `_gpu`, by value, and all others."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    named = [path for path in files if path.stem.endswith("_gpu")]
    others = [path for path in files if path not in named and MARKED.search((ROOT / path).read_text("utf-8"))]

    def value(path: Path) -> int:
        text = path.as_posix()
        return next((index for index, word in enumerate(FIRST) if word in text), len(FIRST))

    return sorted(named, key=value), others


def stages(out: Path) -> list[Stage]:
    """List the stages, the most valuable first. Results of benches go to `out`."""

    def worker(name: str) -> list[str]:
        return [PY, "bench/gpu_round.py", "--worker", name, "--out", str(out)]

    def bench(result: str, script: str, *options: str) -> list[str]:
        return [PY, f"bench/{script}.py", *options, "--json", str(out / f"{result}.json")]

    named, others = gpu_test_files()
    tests = []
    for path in named:
        folders = path.parts[2:-1]  # below tests/<package>/
        name = "-".join(["values", *folders, path.stem.removeprefix("test_").removesuffix("_gpu")])
        tests.append(Stage(name, 150, [*PYTEST, "--maxfail=12", path.as_posix()]))
    head_tests = [path.as_posix() for path in named if "head" in path.as_posix()]
    sanitizer = ["compute-sanitizer", "--tool", "racecheck"]

    # fmt: off
    return [
        Stage("ceilings", 60, worker("ceilings")),
        *tests,
        Stage("sampling", 60, worker("sampling")),
        Stage("head-7B", 150, bench("head-7B", "kernels", "--sizes", "7B", "--tokens", "4096")),
        Stage("train-7B", 90, bench(
            "train-7B", "train_step", "--preset", "7B", "--lora", "--prompt-tokens", "1024",
            "--completion-tokens", "256", "--copies-per-pass", "4")),
        Stage("rollout", 120, bench(
            "rollout", "rollout", "--preset", "7B", "0.5B", "--prompts", "4", "--completion-tokens", "64",
            "--rounds", "2", "--contenders", "ours")),
        Stage("step-0.5B", 90, bench(
            "step-0.5B", "grpo_step", "--preset", "0.5B", "--prompt-tokens", "512", "--completion-tokens", "128",
            "--group-size", "8", "--contenders", "ours")),
        Stage("head-0.5B", 60, bench("head-0.5B", "kernels", "--sizes", "0.5B", "--tokens", "4096")),
        *([Stage("racecheck", 120, [*sanitizer, *PYTEST, *head_tests, "-k", RACECHECK_TESTS])] if head_tests else []),
        *([Stage("values-rest", 60, [*PYTEST, *(path.as_posix() for path in others)])] if others else []),
    ]
    # fmt: on


def measure_ceilings(out: Path) -> None:
    """Measure what the device reaches: copying memory, and matrix products of the shapes of an LM head."""
    import torch
    import transformers
    import triton
    from triton.testing import do_bench

    properties = torch.cuda.get_device_properties(0)
    result: dict[str, str | float] = {
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }

    def copy_speed() -> float:
        """Terabytes a second, read and written. A function, so that its 8 GiB are free again after it."""
        source = torch.randn(2**30, device="cuda")  # 4 GiB: far beyond any cache
        target = torch.empty_like(source)
        return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e9

    result["copy_TB_s"] = copy_speed()
    for name, (t, h, v) in {
        "square": (8192, 8192, 8192),
        "head7B": (4096, 3584, 152_064),
        "head0.5B": (4096, 896, 151_936),
    }.items():
        a = torch.randn(t, h, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(v, h, device="cuda", dtype=torch.bfloat16)
        flop = 2 * t * h * v
        half = do_bench(lambda a=a, b=b: a @ b.t(), return_mode="median")
        full = do_bench(lambda a=a, b=b: torch.mm(a, b.t(), out_dtype=torch.float32), return_mode="median")
        result[f"{name}_bf16_TFLOP_s"] = flop / half / 1e9
        result[f"{name}_out_fp32_TFLOP_s"] = flop / full / 1e9
        del a, b
    print(json.dumps(result, indent=1))
    (out / "ceilings.json").write_text(json.dumps(result))


def measure_sampling(out: Path) -> None:
    """Time `sample_head` beside the matrix product it contains, and compare its log-probs with float64."""
    import torch
    from torch import Tensor
    from triton.testing import do_bench

    from grpo_kernels import SampledTokens, sample_head

    results = []
    for size, h, v in (("0.5B", 896, 151_936), ("7B", 3584, 152_064)):
        weight = (torch.randn(v, h, device="cuda") / h**0.5).bfloat16()
        for rows in (16, 64, 256, 512):
            hidden = torch.randn(rows, h, device="cuda").bfloat16()
            keys = torch.randint(2**60, (rows,), device="cuda")
            offsets = torch.zeros(rows, dtype=torch.int64, device="cuda")

            def sample(
                hidden: Tensor = hidden, weight: Tensor = weight, keys: Tensor = keys, offsets: Tensor = offsets
            ) -> SampledTokens:
                return sample_head(hidden, weight, keys, offsets)

            def product(hidden: Tensor = hidden, weight: Tensor = weight) -> Tensor:
                return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

            row: dict[str, str | float] = {
                "size": size,
                "rows": rows,
                "sample_head_ms": do_bench(sample, return_mode="median"),
                "gemm_ms": do_bench(product, return_mode="median"),
            }
            sampled = sample()
            expected = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, sampled.token[:, None])[:, 0]
            row["logprob_error"] = float((sampled.raw_logprob.double() - expected).abs().max())
            results.append(row)
            print(row, flush=True)
    (out / "sampling.json").write_text(json.dumps(results))


WORKERS = {"ceilings": measure_ceilings, "sampling": measure_sampling}


def run(stage: Stage, seconds: float, out: Path) -> dict[str, str | float]:
    """Run one stage for at most `seconds`; whatever happens to it, return a row of the summary."""
    environment = os.environ | {"PYTHONPATH": ".:kernels:model", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    start, log = time.monotonic(), out / f"{stage.name}.log"
    with log.open("w") as file:
        try:
            # a session of its own, so that a stage can be stopped with all it started and nothing else is touched
            process = subprocess.Popen(
                stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            return {"stage": stage.name, "result": f"not started: {error}", "seconds": 0.0, "last": ""}
        try:
            code = process.wait(seconds)
            result = "passed" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"stopped after {seconds:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if " passed" in line or " failed" in line or "Error" in line] or lines
    last = telling[-1].strip()[:200] if telling else ""
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - start, 1), "last": last}


def passed_stages(*folders: Path | None) -> set[str]:
    """Read which stages passed in earlier rounds, from the summaries in `folders`."""
    files = [folder / "summary.jsonl" for folder in folders if folder is not None]
    rows = [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()]
    return {row["stage"] for row in rows if row["result"] == "passed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu_round")), help="folder of the results"
    )
    parser.add_argument("--seconds", type=float, default=540, help="for the whole round (default: %(default)s)")
    parser.add_argument(
        "--resume", type=Path, help="folder of an earlier round for the same code: skip what passed there"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these stages alone")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="do not run these stages")
    parser.add_argument("--list", action="store_true", help="print the stages and their limits, run nothing")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    planned = stages(out)
    unknown = {*options.only, *options.skip} - {stage.name for stage in planned}
    if unknown:
        parser.error(f"no stage is named {', '.join(sorted(unknown))}: --list shows the names")
    if options.list:
        for stage in planned:
            print(f"{stage.name:28}{stage.limit:5} s  {' '.join(stage.command[1:])}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        WORKERS[options.worker](out)
        return 0

    end = time.monotonic() + options.seconds
    passed = passed_stages(out, options.resume)
    lines, failed = [], False
    for stage in planned:
        if (options.only and stage.name not in options.only) or stage.name in options.skip or stage.name in passed:
            continue
        left = end - time.monotonic()
        if left > 15:  # less does not import torch and compile a kernel
            row = run(stage, min(stage.limit, left), out)
        else:
            row = {"stage": stage.name, "result": "no time", "seconds": 0.0, "last": ""}
        with (out / "summary.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        lines.append(f"{row['stage']:28}{row['seconds']:7.1f} s  {row['result']:24}{row['last']}")
        print(lines[-1][:170], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")  # after each stage: the round itself may be cut short
        failed |= row["result"] != "passed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
