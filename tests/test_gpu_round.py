"""The GPU round can start: what its stages name exists, and needs no more than a GPU machine's image has."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .commands import check

ROOT = Path(__file__).parents[1]
# what the image of the GPU machine has; everything else is missing there, av and nltk among it
IMAGE = {
    *("torch", "triton", "numpy", "pytest", "transformers", "tokenizers", "safetensors", "peft"),
    *("hypothesis", "pandas", "tqdm", "yaml"),
    *("grpo_core", "grpo_kernels", "affectgpt", "tests"),
}
ABSENT = ["av", "nltk", "trl", "liger_kernel", "cut_cross_entropy", "quack", "flash_attn", "openpyxl", "cv2"]


def load_round() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_round", ROOT / "bench/gpu_round.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_round = load_round()


def gpu_test_files() -> list[Path]:
    return [ROOT / path for paths in gpu_round.gpu_test_files() for path in paths]


def imports_at_top(path: Path) -> set[str]:
    """Top-level modules that are imported when a file is; helpers of tests/ are followed by `with_helpers`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not inside functions, nor under `if TYPE_CHECKING`
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def with_helpers(paths: list[Path]) -> set[Path]:
    """The files, the conftests above them, and the helpers in tests/ that they import."""
    todo, seen = list(paths), set()
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        folder = path.parent
        while folder != ROOT:
            todo.append(folder / "conftest.py")
            folder = folder.parent
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("tests.")):
                folder = path.parents[node.level - 1] if node.level else ROOT
                base = folder.joinpath(*(node.module or "").split("."))
                todo += [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
    return seen


def test_every_stage_has_a_name_of_its_own_and_a_limit(tmp_path):
    stages = gpu_round.stages(tmp_path)
    assert len({stage.name for stage in stages}) == len(stages) > 8
    assert all(0 < stage.limit <= 300 for stage in stages)


def test_every_file_with_gpu_tests_has_a_stage(tmp_path):
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8") and path.name != Path(__file__).name
    }
    staged = {word for stage in gpu_round.stages(tmp_path) for word in stage.command if word.startswith("tests/")}
    assert marked == staged


def test_every_command_of_the_round_is_one_its_program_takes(tmp_path):
    """Without av, nltk and the peers, as on the GPU machine."""
    stages = [stage for stage in gpu_round.stages(tmp_path) if stage.command[0] == sys.executable]
    commands = [shlex.join(["python", *stage.command[1:]]) for stage in stages]
    assert len(commands) > 8
    assert check(commands, blocked=ABSENT) == {}


def test_gpu_tests_are_collected_where_media_and_peer_libraries_are_missing(tmp_path):
    """One file that cannot be imported would stop the whole collection before a GPU test runs."""
    stages = [stage for stage in gpu_round.stages(tmp_path) if "pytest" in stage.command]
    files = sorted({word for stage in stages for word in stage.command if word.startswith("tests/")})
    block = f"import sys, pytest; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-m", "gpu", "--collect-only", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-c", block, *options, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert {line.partition("::")[0] for line in collected} == set(files)
    # racecheck picks its tests by the words in their names
    words = gpu_round.RACECHECK_TESTS.split(" and ")
    assert any(all(word in line for word in words) for line in collected if "head" in line)


@pytest.mark.parametrize("folder", ["gpu tests", "bench"])
def test_gpu_tests_and_benches_import_at_the_top_only_what_the_gpu_image_has(folder):
    files = with_helpers(gpu_test_files() if folder == "gpu tests" else sorted((ROOT / "bench").glob("*.py")))
    own = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert len(files) > 5
    found = {
        path.relative_to(ROOT).as_posix(): extra
        for path in files
        if (extra := imports_at_top(path) - IMAGE - sys.stdlib_module_names - own)
    }
    assert found == {}


def run_round(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench/gpu_round.py"), *arguments]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=without_gpu)


def test_a_stage_that_fails_is_reported_and_is_tried_again_while_one_that_passed_is_not(tmp_path):
    """Where no GPU is visible, the stage `ceilings` cannot pass."""
    first = run_round("--out", str(tmp_path), "--only", "ceilings")
    assert first.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["result"]) for row in rows] == [("ceilings", "exit 1")]
    assert rows[0]["last"]
    (tmp_path / "summary.jsonl").write_text(json.dumps(rows[0] | {"result": "passed"}) + "\n")
    again = run_round("--out", str(tmp_path / "again"), "--only", "ceilings", "--resume", str(tmp_path))
    assert again.returncode == 0
    assert again.stdout == ""


def test_a_round_out_of_time_says_so_of_every_stage(tmp_path):
    done = run_round("--out", str(tmp_path), "--seconds", "1", "--skip", "ceilings")
    assert done.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    names = [stage.name for stage in gpu_round.stages(tmp_path)]
    assert [row["stage"] for row in rows] == names[1:]
    assert {row["result"] for row in rows} == {"no time"}


def test_a_stage_that_does_not_exist_is_refused_by_name(tmp_path):
    done = run_round("--out", str(tmp_path), "--only", "ceiling")
    assert done.returncode == 2
    assert "no stage is named ceiling" in done.stderr
