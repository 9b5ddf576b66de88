"""Time and memory of the LM head: log-prob, entropy, GRPO loss and their gradients, ours beside other implementations.

    python bench/kernels.py                      on a GPU: head sizes of Qwen2.5, T = 1024 … 65,536, one process
    python bench/kernels.py --device cpu         on a CPU: ours and each peer as two processes side by side

Peers run where they are installed (`pip install liger-kernel trl cut-cross-entropy`); the others are left out and
named. Every contender gets the same tensors and gives a scalar whose backward reaches hidden states and head. Times are
the median of several calls on a GPU (events), the best of several on a CPU (and processor time, which other work on the
machine disturbs less); peaks count what a call allocates beyond its inputs. Results go to
`bench/results/kernels-<device>-<date>.json`. Without a GPU nothing is said about one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import PRESETS, add_device, write_results
from torch import Tensor

from grpo_kernels import grpo_loss, linear_grpo_loss, linear_logprob

HEADS = {size: (shape[0], shape[-1]) for size, shape in PRESETS.items() if size != "tiny"}
"""Hidden size and vocabulary of Qwen2.5."""
TOKENS = (1024, 4096, 16_384, 65_536)
CPU_SIZE = (2048, 512, 32_768)
"""T, H, V of the comparison on a CPU."""


class Batch:
    """Draw inputs of one size: hidden `[T, H]` and head `[V, H]` with logits of unit scale, both to be trained."""

    def __init__(self, tokens: int, width: int, vocabulary: int, device: str, dtype: torch.dtype):
        g = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=g, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=g, device=device, dtype=dtype)
        self.weight = weight.mul_(width**-0.5).requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), generator=g, device=device)
        self.advantages = torch.randn(tokens, generator=g, device=device)
        self.loss_weight = torch.full((tokens,), 1.0 / tokens, device=device)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def surrogate(b: Batch, logprob: Tensor) -> Tensor:
    """Compute the on-policy GRPO loss of log-probs."""
    return -(torch.exp(logprob - logprob.detach()) * b.advantages * b.loss_weight).sum()


def ours_loss(b: Batch) -> Tensor:
    return linear_grpo_loss(b.hidden, b.weight, b.targets, b.advantages, loss_weight=b.loss_weight).loss


def ours_loss_with_entropy(b: Batch) -> Tensor:
    return linear_grpo_loss(
        b.hidden, b.weight, b.targets, b.advantages, loss_weight=b.loss_weight, entropy_coef=0.01
    ).loss


def ours_logprob(b: Batch) -> Tensor:
    return surrogate(b, linear_logprob(b.hidden, b.weight, b.targets).logprob)


def ours_given_logits(b: Batch) -> Tensor:
    logits = b.hidden @ b.weight.T
    return grpo_loss(logits, b.targets, b.advantages, loss_weight=b.loss_weight, inplace=True).loss


def plain(b: Batch) -> Tensor:
    logits = (b.hidden @ b.weight.T).float()
    return surrogate(b, torch.log_softmax(logits, -1).gather(1, b.targets[:, None])[:, 0])


def lse_minus_logit(b: Batch) -> Tensor:
    """verl's formula: the logit minus the log-sum-exp, entropy as lse − Σ p z."""
    logits = (b.hidden @ b.weight.T).float()
    lse = torch.logsumexp(logits, -1)
    entropy = lse - (torch.softmax(logits, -1) * logits).sum(-1)
    logprob = logits.gather(1, b.targets[:, None])[:, 0] - lse
    return surrogate(b, logprob) - 0.0 * entropy.mean()


def linear_cross_entropy(b: Batch) -> Tensor:
    """torch's chunked cross-entropy (a mean, without per-token weights)."""
    return torch.nn.functional.linear_cross_entropy(b.hidden, b.weight, b.targets)


def liger_cross_entropy(b: Batch) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(b.hidden, b.weight, b.targets)


def liger_grpo(b: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    members = 8
    shape = (members, len(b.targets) // members)
    head = LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0, compiled=b.hidden.is_cuda)
    return head(
        b.hidden.view(*shape, -1),
        b.weight,
        b.targets.view(shape),
        torch.ones_like(b.targets).view(shape),
        b.advantages[:members],
    )[0]


def cut_cross_entropy(b: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    return surrogate(b, -cce(b.hidden, b.weight, b.targets, reduction="none"))


def trl_chunked(b: Batch) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprob, *_ = ChunkedLogProbFunction.apply(
        b.hidden, b.weight, None, b.targets, 1.0, 32_768, None, 1.0, ("log_probs", "entropy")
    )
    return surrogate(b, logprob)


COMPILED = "torch.compile"
CONTENDERS: dict[str, tuple[Callable[[Batch], Tensor], str]] = {
    "ours: linear_grpo_loss": (ours_loss, "torch"),
    "ours: GRPO loss with an entropy bonus": (ours_loss_with_entropy, "torch"),
    "ours: linear_logprob": (ours_logprob, "torch"),
    "ours: grpo_loss, logits in place": (ours_given_logits, "torch"),
    "torch: log_softmax + gather": (plain, "torch"),
    COMPILED: (plain, "torch"),
    "verl's formula": (lse_minus_logit, "torch"),
    "torch: linear_cross_entropy": (linear_cross_entropy, "torch"),
    "Liger: fused linear cross-entropy": (liger_cross_entropy, "liger_kernel"),
    "Liger: LigerFusedLinearGRPOLoss": (liger_grpo, "liger_kernel"),
    "cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy"),
    "TRL: chunked head": (trl_chunked, "trl"),
}


def available(device: str) -> dict[str, Callable[[Batch], Tensor]]:
    """List the contenders that are installed and run on the device, and print which are not."""
    found, missing = {}, []
    for name, (function, package) in CONTENDERS.items():
        triton_only = name in ("Liger: fused linear cross-entropy", "cut-cross-entropy")
        absent = importlib.util.find_spec(package) is None
        absent |= function is linear_cross_entropy and not hasattr(torch.nn.functional, "linear_cross_entropy")
        if absent or (device == "cpu" and (triton_only or name == COMPILED)):
            missing.append(name + (" (not installed)" if absent else " (not on a CPU)"))
        else:
            found[name] = torch.compile(function) if name == COMPILED else function
    if missing:
        print("left out: " + ", ".join(missing))
    return found


def step(function: Callable[[Batch], Tensor], batch: Batch) -> None:
    batch.clear()
    function(batch).backward()


# ---------------------------------------------------------------- CPU: pairs of processes


def status_mib(field: str) -> float:
    """Read a memory figure of this process from the operating system (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def cpu_worker(name: str, rounds: int) -> dict[str, float]:
    """Time one contender in this process: best seconds of forward and backward, peak MiB beyond the inputs."""
    torch.set_num_threads(1)
    batch = Batch(*CPU_SIZE, "cpu", torch.float32)
    before = status_mib("VmRSS")
    seconds, processor = [], []
    for _ in range(rounds):
        start, start_processor = time.perf_counter(), time.process_time()
        step(CONTENDERS[name][0], batch)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return {"seconds": min(seconds), "cpu_seconds": min(processor), "peak_mib": status_mib("VmHWM") - before}


def cpu_pair(ours: str, peer: str, rounds: int) -> dict[str, dict[str, float]]:
    """Time both at the same time, on one thread each."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {
        n: subprocess.Popen([*command, n], stdout=subprocess.PIPE, text=True, env=environment) for n in (ours, peer)
    }
    return {name: json.loads(run.communicate()[0].splitlines()[-1]) for name, run in runs.items()}


def run_cpu(rounds: int) -> dict:
    tokens, width, vocabulary = CPU_SIZE
    print(
        f"CPU, float32, T = {tokens}, H = {width}, V = {vocabulary}, forward and backward, head trained, side by side"
    )
    names = list(available("cpu"))
    rows = []
    for ours in [name for name in names if name.startswith("ours: linear")]:
        for peer in [name for name in names if not name.startswith("ours")]:
            pair = cpu_pair(ours, peer, rounds)
            a, b = pair[ours], pair[peer]
            row = {
                "ours": ours,
                "peer": peer,
                "time_ratio": a["seconds"] / b["seconds"],
                "cpu_time_ratio": a["cpu_seconds"] / b["cpu_seconds"],
                "memory_ratio": b["peak_mib"] / a["peak_mib"],
                "results": pair,
            }
            rows.append(row)
            print(
                f"{ours:24s} {a['seconds']:6.2f} s {a['peak_mib']:5.0f} MiB   {peer:32s} {b['seconds']:6.2f} s "
                f"{b['peak_mib']:5.0f} MiB   time ×{row['time_ratio']:.2f} (processor ×{row['cpu_time_ratio']:.2f})  "
                f"memory 1/{row['memory_ratio']:.1f}"
            )
    return {"size": CPU_SIZE, "pairs": rows}


# ---------------------------------------------------------------- GPU


def gpu_ms(function: Callable[[], object], calls: int) -> float:
    """Return the median milliseconds of a call, after two warm-up calls."""
    times = []
    for call in range(calls + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if call >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def gemms_ms(b: Batch, calls: int) -> dict[str, float]:
    """Time the three GEMMs of the head alone, which are the ceiling at this size."""
    hidden, weight = b.hidden.detach(), b.weight.detach()
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    grad = logits.view(hidden.dtype)[:, : weight.shape[0]]
    return {
        "logits": gpu_ms(lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits), calls),
        "hidden": gpu_ms(lambda: torch.mm(grad, weight), calls),
        "weight": gpu_ms(lambda: torch.mm(grad.T, hidden), calls),
    }


def gpu_errors(b: Batch) -> dict[str, float]:
    """Compute the largest log-prob errors of the first rows against float64; a time means nothing without them."""
    rows = slice(0, min(64, len(b.targets)))
    hidden, weight, targets = b.hidden.detach()[rows], b.weight.detach(), b.targets[rows]
    want = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    errors = {}
    for name, chunk_bytes in (("logits", None), ("no logits", 1)):
        with torch.no_grad():
            got = linear_logprob(hidden, weight, targets, chunk_bytes=chunk_bytes).logprob
        errors[name] = float((got - want).abs().max())
    return errors


def run_gpu(sizes: list[str], tokens: list[int], calls: int) -> dict:
    contenders = available("cuda")
    rows = []
    for size in sizes:
        for count in tokens:
            width, vocabulary = HEADS[size]
            batch = Batch(count, width, vocabulary, "cuda", torch.bfloat16)
            flop = 2 * count * width * vocabulary
            row: dict[str, Any] = {
                "size": size,
                "tokens": count,
                "errors": gpu_errors(batch),
                "gemms_ms": {},
                "contenders": {},
            }
            print(f"\n{size}  H = {width}, V = {vocabulary}, T = {count}   log-prob errors {row['errors']}")
            try:
                row["gemms_ms"] = gemms_ms(batch, calls)
            except torch.cuda.OutOfMemoryError:
                print("  the logits of one GEMM do not fit: no ceiling at this size")
            ceiling = sum(row["gemms_ms"].values()) or float("nan")
            print(f"  {'three GEMMs alone':36s} {ceiling:9.2f} ms  {3 * flop / ceiling / 1e9:7.0f} TFLOP/s")
            with torch.no_grad():
                for name, chunk_bytes in (("forward, log-prob + entropy", None), ("the same, no logits", 1)):
                    ms = gpu_ms(
                        lambda chunk_bytes=chunk_bytes, b=batch: linear_logprob(
                            b.hidden, b.weight, b.targets, entropy=True, chunk_bytes=chunk_bytes
                        ),
                        calls,
                    )
                    row["contenders"][name] = {"ms": ms, "tflops": flop / ms / 1e9}
                    print(f"  {name:36s} {ms:9.2f} ms  {flop / ms / 1e9:7.0f} TFLOP/s")
            for name, function in contenders.items():
                row["contenders"][name] = result = gpu_contender(function, batch, calls)
                if "error" in result:
                    print(f"  {name:36s} {result['error']}")
                    continue
                result |= {"tflops": 3 * flop / result["ms"] / 1e9, "of_ceiling": ceiling / result["ms"]}
                print(
                    f"  {name:36s} {result['ms']:9.2f} ms  {result['tflops']:7.0f} TFLOP/s "
                    f"{100 * result['of_ceiling']:5.1f} % of the GEMMs {result['peak_gb']:7.2f} GB"
                )
            rows.append(row)
            del batch
    return {"rows": rows, "row_pass": row_pass(calls)}


def gpu_contender(function: Callable[[Batch], Tensor], batch: Batch, calls: int) -> dict:
    """Measure milliseconds and peak GB beyond the inputs, or say why it failed."""
    batch.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(function, batch)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        return {"ms": gpu_ms(lambda: step(function, batch), calls), "peak_gb": peak}
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # a peer that refuses a size must not end the table
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
    finally:
        batch.clear()


def row_pass(calls: int) -> dict[str, float]:
    """Time the element-wise pass alone (fp32 logits in, bf16 gradient out, in place) and a copy of as many bytes."""
    from grpo_kernels.lm_head._rows import RowStatistics, Transform, TritonRows
    from grpo_kernels.lm_head.token_loss import LossConfig, LossInputs

    count, vocabulary = 4096, 152_064
    logits = torch.randn(count, vocabulary, device="cuda")
    out = logits.view(torch.bfloat16)[:, :vocabulary]
    targets = torch.randint(vocabulary, (count,), device="cuda")
    ones = torch.ones(count, device="cuda")
    inputs = LossInputs(
        weight=ones,
        advantages=ones,
        old_logprob=None,
        reference_logprob=None,
        completion_index=None,
        num_completions=None,
        config=LossConfig(),
    )
    stats = RowStatistics.empty(count, logits.device, torch.float32, entropy=True, kl=False)
    ms = gpu_ms(lambda: TritonRows(logits, targets, Transform(), stats, out=out).loss_gradient_(inputs), calls)
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / gpu_ms(lambda: target.copy_(source), calls) / 1e6
    speed = 6 * count * vocabulary / ms / 1e6
    print(f"\nrow pass, T = {count}, V = {vocabulary}: {ms:.3f} ms, {speed:.0f} GB/s; copy {copy:.0f} GB/s")
    return {"ms": ms, "gb_per_s": speed, "copy_gb_per_s": copy, "of_copy": speed / copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(cpu_worker(args.worker, args.rounds)))
        return
    results = run_gpu(args.sizes, args.tokens, args.rounds) if args.device == "cuda" else run_cpu(args.rounds)
    if args.device == "cpu":
        print("not run on a GPU: this table says nothing about one")
    write_results(results, args, "kernels-{device}")


if __name__ == "__main__":
    main()
