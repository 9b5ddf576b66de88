"""Kill runs at random moments, give the same command again, and compare with the run that nobody killed, bit for bit.

    python tests/kills.py                             20 kills a recipe; half SIGKILL, half SIGTERM, half on two ranks
    python tests/kills.py --kills 3 --launch fork     fewer, without a Python start-up for each run
    python tests/kills.py --json kills.json

The recipes are `affectgpt_r1` (cold start, controls, GRPO, scores, report, on a few synthetic clips) and `text_grpo`,
with tiny models made here. A first run of each command, uninterrupted, is traced: when it entered and left each stage.
Then each kill picks a stage in turn, one of the times that the run was in it, and a point of that time at random; waits
until the run is there; and sends the signal. Two ranks are started by torchrun; a SIGTERM goes to torchrun or to one of
the ranks, a SIGKILL to one of the ranks or to everything at once. The same command then runs to its end, and weights,
evaluations, metrics but times, and completions must be equal to the last bit.

Only the run that is killed is traced, by wrappers round a few functions that write a line when they are entered; the
one that goes on is the plain command. With `--launch fork` a run is a fork of this process, which has imported torch
already, and two ranks are started without torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"affectgpt_r1": "recipes/affectgpt_r1.py", "text_grpo": "recipes/examples/text_grpo.py"}
STAGES = {
    "affectgpt_r1": ("cold start", "sampling", "training", "saving", "evaluation", "report", "start"),
    "text_grpo": ("sampling", "training", "saving", "report", "start"),
}
# A step of the cold start is over in milliseconds, so two checkpoints of GRPO are two steps apart and not one.
AFFECTGPT = {
    "data.layout.clips": "[10, 4]",
    "data.validation_fraction": "0.25",
    "cold_start.max_steps": "4",
    "cold_start.eval_steps": "2",
    "cold_start.prompts_per_step": "4",
    "rollout.group_size": "4",
    "rollout.max_new_tokens": "8",
    "run.max_steps": "4",
    "run.prompts_per_step": "4",
    "run.eval_steps": "2",
    "run.save_steps": "2",
    "run.name": "run",
}
TEXT = {
    "run.max_steps": "6",
    "run.prompts_per_step": "4",
    "run.save_steps": "2",
    "rollout.group_size": "4",
    "rollout.max_new_tokens": "8",
    "optim.learning_rate": "1e-2",
    "optim.max_tokens_per_micro_batch": "60",
    "algorithm.beta": "0.01",
    "lora_r": "4",
}
SECONDS = 120  # the longest that a run or its end may take


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Attributes:
        aimed_at, stage: the stage that was picked, and the one in which the signal arrived.
        target: the process that got it: a rank, `torchrun`, or `all`.
        seconds: from the start of the run to the signal.
        status: exit statuses of the run's processes.
        resumed_at: the newest checkpoint that the killed run left.
        differences: what is not as in the uninterrupted run; empty if nothing is.
    """

    recipe: str
    ranks: int
    signal: str
    target: str
    aimed_at: str
    stage: str
    seconds: float
    status: list[int]
    resumed_at: str
    differences: list[str]


@dataclass(frozen=True)
class Visit:
    """A stage's `occurrence`-th time, in seconds from the run's start."""

    stage: str
    occurrence: int
    begin: float
    end: float


@dataclass
class Running:
    """A run under way.

    Attributes:
        launcher: process id of torchrun, None without one.
        processes: process ids that this script waits for.
    """

    trace: Path | None
    ranks: int
    launcher: int | None
    processes: list[int]
    started: float = field(default_factory=time.monotonic)

    def pid(self, rank: int) -> int:
        """Process id of a rank, which its trace begins with."""
        if self.launcher is None:
            return self.processes[rank]
        assert self.trace is not None
        return int(read_when_there(self.trace.with_suffix(f".{rank}")))

    def wait(self) -> list[int]:
        """Wait until every process has ended; returns their exit statuses, negative for a signal.

        Raises:
            TimeoutError: one of them did not end; it is killed.
        """
        deadline, statuses = time.monotonic() + SECONDS, dict.fromkeys(self.processes, 0)
        waiting, failed_at = set(self.processes), 0.0
        while waiting:
            for pid in sorted(waiting):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    waiting.remove(pid)
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid] and not failed_at:
                        failed_at = time.monotonic()
            # as torchrun does: a rank that waits for another one to appear would wait for minutes
            if failed_at and time.monotonic() - failed_at > 5:
                for pid in waiting:
                    os.kill(pid, signal.SIGTERM)
                failed_at = math.inf
            if time.monotonic() > deadline:
                for pid in waiting:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                raise TimeoutError(f"a run of {self.ranks} ranks did not end within {SECONDS} s")
            time.sleep(0.005)
        return [statuses[pid] for pid in self.processes]

    def over(self) -> bool:
        """Whether one of the processes has ended by itself; it is still to be waited for."""
        return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.processes)


def read_when_there(path: Path) -> str:
    """Read a file of one line as soon as it is there."""
    deadline = time.monotonic() + SECONDS
    while not (path.exists() and path.read_text().endswith("\n")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} was not written within {SECONDS} s")
        time.sleep(0.005)
    return path.read_text()


# In the process of a traced run


def run_recipe(recipe: str, arguments: Sequence[str], trace: Path | None) -> None:
    """Run a recipe as `python RECIPE …` does; with a trace, write when rank 0 enters and leaves its stages."""
    rank = int(os.environ.get("RANK", 0))
    if trace is not None:
        if rank == 0:
            trace_stages(trace)
        trace.with_suffix(f".{rank}").write_text(f"{os.getpid()}\n")
    script = ROOT / RECIPES[recipe]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def trace_stages(path: Path) -> None:
    """Wrap what a run's stages are made of, each with the name of its stage."""
    import affectgpt.report
    from affectgpt.pipeline import Stages
    from grpo_core import report
    from grpo_core.storage.checkpoint import CheckpointManager
    from grpo_core.training import grpo, sft

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    counts: dict[str, int] = {}

    def write(stage: str, occurrence: int, what: str) -> None:
        os.write(file, f"{json.dumps([time.time(), stage, occurrence, what])}\n".encode())

    def wrap(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def traced(*arguments: Any, **options: Any) -> Any:
            if not counts:
                write("start", 0, "end")
            occurrence = counts[stage] = counts.get(stage, -1) + 1
            write(stage, occurrence, "begin")
            try:
                return function(*arguments, **options)
            finally:
                write(stage, occurrence, "end")

        setattr(owner, name, traced)

    wrap(sft.SFTTrainer, "step", "cold start")
    wrap(grpo.GRPOTrainer, "sample", "sampling")
    wrap(grpo.GRPOTrainer, "learn", "training")
    wrap(CheckpointManager, "save", "saving")
    wrap(Stages, "score", "evaluation")
    wrap(affectgpt.report, "write_report", "report")
    wrap(report, "try_report", "report")
    write("start", 0, "begin")


# In this script's process


def start(recipe: str, arguments: Sequence[str], ranks: int, launch: str, log: Path, trace: Path | None) -> Running:
    """Start a run of a recipe, its output in `log`."""
    if launch == "command":
        runner = [str(ROOT / RECIPES[recipe])]
        if trace is not None:
            runner = [__file__, "traced", recipe, str(trace)]  # no options: torchrun would take some for its own
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *torchrun, *runner, *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=log.parent,
            )
        process.returncode = 0  # this script waits for it by its id
        return Running(trace, ranks, process.pid if ranks > 1 else None, [process.pid])
    place = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sys.stdout.flush()
    processes = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(place | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {}))
            in_child(recipe, arguments, log, trace)
        processes.append(pid)
    return Running(trace, ranks, None, processes)


def in_child(recipe: str, arguments: Sequence[str], log: Path, trace: Path | None) -> None:
    """Run a recipe in a fork, and end it as an interpreter would."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        run_recipe(recipe, arguments, trace)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def visits(trace: Path) -> list[Visit]:
    """Read the stages of a whole run."""
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    began: dict[tuple[str, int], float] = {}
    found = []
    for at, stage, occurrence, what in rows:
        if what == "begin":
            began[stage, occurrence] = at
        elif (stage, occurrence) in began:
            found.append(Visit(stage, occurrence, began[stage, occurrence] - rows[0][0], at - rows[0][0]))
    return found


def stage_now(trace: Path) -> str:
    """Name the innermost stage that a run is in, or the one that it has left last."""
    inside, last = [], "start"
    for line in trace.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the line that a SIGKILL has cut
            _, stage, occurrence, what = json.loads(line)
            last = stage
            if what == "begin":
                inside.append((stage, occurrence))
            elif (stage, occurrence) in inside:
                inside.remove((stage, occurrence))
    return inside[-1][0] if inside else f"after {last}"


def result(folder: Path) -> dict[str, Any]:
    """What a run left that must not depend on kills: files by name; rows of logs without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # a line a start, and a file a process: what must differ
        if "checkpoints/" in name or name == "sessions.jsonl" or not path.is_file():
            continue
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in rows]
        elif path.suffix == ".safetensors" or path.parent.name == "evaluations":
            found[name] = path.read_bytes()
    return found


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what differs from the uninterrupted run."""
    found = result(folder)
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    # another run beside this one means that the command did not go on with it
    return wrong + [path.name for path in folder.parent.iterdir() if path.is_dir() and path != folder]


def newest_checkpoint(folder: Path) -> str:
    """Name the newest checkpoint of the last stage that has one."""
    found = [(path.stat().st_mtime_ns, path) for path in folder.rglob("step-*") if path.parent.name == "checkpoints"]
    if not found:
        return "-"
    path = max(found)[1]
    stage = path.parents[1].relative_to(folder).as_posix()
    return f"{'' if stage == '.' else f'{stage} '}{int(path.name.partition('.')[0].removeprefix('step-'))}"


@dataclass
class Case:
    """A recipe on a number of ranks: its command and what it leaves uninterrupted."""

    recipe: str
    ranks: int
    launch: str
    arguments: list[str]
    folder: Path
    visits: list[Visit] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)

    def command(self, place: Path) -> list[str]:
        return [*self.arguments, "--run.output_dir", str(place / "runs")]

    def prepare(self) -> None:
        """Make the run that nobody kills."""
        place = self.folder / "whole"
        place.mkdir(parents=True)
        run = start(self.recipe, self.command(place), self.ranks, self.launch, place / "log", place / "trace")
        if any(run.wait()):
            raise RuntimeError(f"the uninterrupted {self.recipe} failed:\n{(place / 'log').read_text()[-3000:]}")
        self.visits = visits(place / "trace")
        self.expected = result(place / "runs" / "run")
        assert self.expected, "a run must leave something to compare"

    def kill(self, stage: str, signum: signal.Signals, draw: random.Random) -> Kill:
        """Kill a run in a stage, and let the same command finish it."""
        for _ in range(5):
            visit = draw.choice([visit for visit in self.visits if visit.stage == stage])
            place = self.folder / f"{draw.getrandbits(32):08x}"
            place.mkdir()
            trace = place / "trace"
            run = start(self.recipe, self.command(place), self.ranks, self.launch, place / "log", trace)
            there = f'"{visit.stage}", {visit.occurrence}, "begin"'
            while not (trace.exists() and there in trace.read_text()) and not run.over():
                time.sleep(0.002)
            time.sleep(draw.random() * (visit.end - visit.begin))
            target = self.send(run, signum, draw)
            seconds, hit = time.monotonic() - run.started, stage_now(trace)
            status = run.wait()
            if not (place / "runs" / "run" / "finished.json").exists():
                break
            shutil.rmtree(place)  # it was over before the signal came
        else:
            raise RuntimeError(f"{self.recipe} was over before {signum.name} in {stage}, five times")
        at = newest_checkpoint(place / "runs" / "run")
        again = start(self.recipe, self.command(place), self.ranks, self.launch, place / "log", None)
        wrong = [f"exit status {code} when it went on" for code in again.wait() if code]
        wrong += differences(place / "runs" / "run", self.expected)
        if wrong:
            print((place / "log").read_text()[-3000:], file=sys.stderr)
        else:
            shutil.rmtree(place)
        return Kill(
            self.recipe, self.ranks, signum.name, target, stage, hit, round(seconds, 2), status, at, sorted(set(wrong))
        )

    def send(self, run: Running, signum: signal.Signals, draw: random.Random) -> str:
        """Send the signal to one of the run's processes; returns its name."""
        rank = draw.randrange(run.ranks)
        everything = run.ranks > 1 and draw.random() < 0.5
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            if everything and signum == signal.SIGKILL:
                for pid in (*run.processes, *(run.pid(each) for each in range(run.ranks))):
                    os.kill(pid, signum)
                return "all"
            if everything and run.launcher is not None:
                os.kill(run.launcher, signum)
                return "torchrun"
            os.kill(run.pid(rank), signum)
        return f"rank {rank}"


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Make clips, tiny models, prompts and a reward; returns each recipe's options."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from affectgpt.synthetic import make_dataset
    from tests.conftest import make_tokenizer, save_tiny_clip, save_tiny_hubert, save_tiny_llm

    make_dataset(folder / "clips", seed=0, train=10, test=4, workers=1)
    emotions = AFFECTGPT | {
        "data.root": folder / "clips",
        "data.cache_dir": folder / "features",
        "model.llm": save_tiny_llm(folder / "llm", make_tokenizer()),
        "model.visual_encoder": save_tiny_clip(folder / "clip"),
        "model.audio_encoder": save_tiny_hubert(folder / "hubert"),
    }

    letters = {letter: i for i, letter in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    spelling = Tokenizer(models.BPE(letters, merges=[]))
    spelling.pre_tokenizer, spelling.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "text")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=28, num_hidden_layers=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "text")
    rows = [{"prompt": "abcdefgh"[i:] + "e", "wanted": "g"} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text("def share(completion, wanted):\n    return completion.count(wanted) / 8\n")
    text = TEXT | {
        "model": folder / "text",
        "data": folder / "prompts.jsonl",
        "reward": f"{folder / 'rewards.py'}:share",
    }
    return {
        recipe: [part for key, value in options.items() for part in (f"--{key}", str(value))]
        for recipe, options in (("affectgpt_r1", emotions), ("text_grpo", text))
    }


def table(kills: Sequence[Kill]) -> str:
    """Format the kills, one a row."""
    head = ("recipe", "ranks", "signal", "sent to", "stage hit", "seconds", "status", "resumed at", "equal")
    rows = [
        (
            kill.recipe,
            str(kill.ranks),
            kill.signal,
            kill.target,
            kill.stage,
            f"{kill.seconds:.2f}",
            " ".join(map(str, kill.status)),
            kill.resumed_at,
            "yes" if not kill.differences else f"NO: {', '.join(kill.differences)}",
        )
        for kill in kills
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def run_kills(
    folder: Path,
    kills: int,
    launch: str,
    seed: int = 0,
    recipes: Sequence[str] = tuple(RECIPES),
    rank_counts: Sequence[int] = (1, 2),
    show: Callable[[Kill], object] = lambda kill: None,
) -> list[Kill]:
    """Kill each recipe `kills` times, signals and numbers of ranks in turn, stages in turn for each of these."""
    # one thread, for runs that are bit for bit the same; and no time spent on bytecode of files that change
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, import_paths()))}
    draw = random.Random(seed)
    inputs = make_inputs(folder / "inputs")
    if launch == "fork":  # once for all forks
        import peft  # noqa: F401

    cases: dict[tuple[str, int], Case] = {}
    done = []
    for recipe in recipes:
        for number in range(kills):
            signum = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            ranks = rank_counts[number // 2 % len(rank_counts)]
            case = cases.get((recipe, ranks))
            if case is None:
                case = cases[recipe, ranks] = Case(recipe, ranks, launch, inputs[recipe], folder / f"{recipe}-{ranks}")
                case.prepare()
            # by a number that grows by one for each signal and number of ranks, so that each meets every stage
            stages = STAGES[recipe]
            stage = stages[(number // 4 + number * len(stages) // kills) % len(stages)]
            done.append(case.kill(stage, signum, draw))
            show(done[-1])
    return done


def import_paths() -> Iterator[Path]:
    """Where this working copy's packages are."""
    yield from (ROOT, ROOT / "kernels", ROOT / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each recipe")
    parser.add_argument("--launch", choices=("command", "fork"), default="command")
    parser.add_argument("--recipe", choices=tuple(RECIPES), action="append", help="this one alone; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the results go")
    sys.path[:1] = map(str, import_paths())  # in place of this folder, in which grpo_core is another package
    if sys.argv[1:2] == ["traced"]:
        _, _, recipe, trace, *arguments = sys.argv
        run_recipe(recipe, arguments, Path(trace))
        return
    args = parser.parse_args()

    def show(kill: Kill) -> None:
        print(table([kill]).splitlines()[1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        kills = run_kills(Path(folder), args.kills, args.launch, args.seed, args.recipe or tuple(RECIPES), show=show)
    equal = sum(not kill.differences for kill in kills)
    print(f"\n{table(kills)}\n\n{equal} of {len(kills)} runs are equal to the uninterrupted one")
    if args.json:
        args.json.write_text(json.dumps([asdict(kill) for kill in kills], indent=1) + "\n", encoding="utf-8")
    sys.exit(equal < len(kills))


if __name__ == "__main__":
    main()
