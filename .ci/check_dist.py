"""Build the sdist and, from it, the wheel; install the wheel into a fresh environment and use it there.

    .venv/bin/python .ci/check_dist.py

What a checkout hides shows here: a package that setup.py does not list, a data file that is not shipped, a file that
the sdist needs to build. The fresh environment takes torch and all other libraries from the Python that runs this
script, so nothing is downloaded. Building needs setuptools in that Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "grpo_core": ROOT / "grpo_core",
    "grpo_kernels": ROOT / "kernels/grpo_kernels",
    "affectgpt": ROOT / "model/affectgpt",
}
SMOKE = r"""
import json, subprocess, sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import affectgpt, grpo_core, grpo_kernels
from affectgpt.configs import CONFIGS
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.report import write_report

environment = Path(sys.prefix).resolve()
for package in (affectgpt, grpo_core, grpo_kernels):
    assert environment in Path(package.__file__).resolve().parents, f"{package.__file__} is not the installed one"
names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
assert "demo" in names and "r1_think" in names, names
wheel = EmotionWheel.default()
assert float(wheel.score(["happy"], ["happy"]).mean()[0]) == 1

run = Path("run")
run.mkdir()
rows = [{"step": step, "reward": 0.1 * step} for step in (1, 2, 3)]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
page = Path(write_report(run, samples={}, wheel=wheel)).read_text(encoding="utf-8")
assert page.rstrip().endswith("</html>"), page[-200:]

grpo = distribution("grpo-core")
scripts = [entry.name for entry in grpo.entry_points if entry.group == "console_scripts"]
for script in scripts:
    program = Path(sys.prefix) / "bin" / script
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.strip(), f"{script} --help shows nothing"
print(f"grpo-core {grpo.version}: {len(names)} configs, {len(page)} bytes of report, commands: {scripts}")
"""


def package_files(folder: Path) -> set[str]:
    """All files of a package, relative to the folder that holds it."""
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def build(source: Path, hook: str, out: Path) -> Path:
    """Call a build hook of PEP 517 in `source`, as `pip` and `build` do, in this Python instead of a downloaded one."""
    code = f"import sys; from setuptools.build_meta import {hook} as hook; print('built', hook(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{hook} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    warnings = [line for line in done.stderr.splitlines() if "Package would be ignored" in line]
    if warnings:
        sys.exit("\n".join(warnings))
    return out / done.stdout.split()[-1]


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment that has the wheel and this Python's libraries; return its Python.

    The libraries' folder is put on the path by a `.pth` file. `.pth` files inside that folder are not read then, so an
    editable install of this project there stays invisible.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # a copy, because setuptools writes *.egg-info into its source and takes file lists from an old one
        source = work / "source"
        skip = shutil.ignore_patterns(
            "__pycache__", "*.egg-info", ".*_cache", ".git", ".venv*", "runs", "build", "dist"
        )
        shutil.copytree(ROOT, source, ignore=skip)
        sdist = build(source, "build_sdist", work)
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "unpacked", filter="data")
        (unpacked,) = (work / "unpacked").iterdir()
        for file in (
            "README.md",
            "LICENSE",
            "CHANGELOG.md",
            "constraints.txt",
            "tests/conftest.py",
            "recipes/affectgpt_r1.py",
        ):
            if not (unpacked / file).is_file():
                sys.exit(f"the sdist lacks {file}: MANIFEST.in says what it takes")
        wheel = build(unpacked, "build_wheel", work)
        shipped = set(zipfile.ZipFile(wheel).namelist())
        shipped = {file for file in shipped if ".dist-info/" not in file}
        expected = set().union(*(package_files(folder) for folder in PACKAGES.values()))
        if missing := sorted(expected - shipped):
            sys.exit(f"the wheel lacks {', '.join(missing)}: package_data in setup.py says what it takes")
        if extra := sorted(shipped - expected):
            sys.exit(f"the wheel has {', '.join(extra)}, which is in none of the packages")
        python = install(wheel, work / "environment")
        (work / "elsewhere").mkdir()
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, "-c", SMOKE], cwd=work / "elsewhere", env=clean, check=True)
        print(f"{sdist.name} {sdist.stat().st_size >> 10} KiB, {wheel.name} {wheel.stat().st_size >> 10} KiB: right")


if __name__ == "__main__":
    main()
