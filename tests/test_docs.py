"""What README.md and docs/ show is true: code runs, commands are ones that programs take, links and paths lead
somewhere.

Every fenced block is covered:

- `python` blocks of a page run in order and share names. HTML comments directly above a block say what keeps it from
  running here: `<!-- needs: data -->`, `<!-- minutes: 5 -->` (see NEEDS). Such a block is still compiled, and its
  imports of ours are looked up. `<!-- sketch -->` marks a block with gaps, which is not even compiled. A multi-line
  comment that opens with `<!-- python` runs as a block that readers of the page do not see: tensors for an example,
  say.
- A `python` block that opens with a comment `# name.py`, or `# name.py: what it is`, is a file that readers write.
  Commands of any page may name it: they are checked in a folder that holds all these files.
- In `bash` blocks each line is a command that must be one of ours with options that it takes, or a known foreign
  program. In blocks without a language (or `text`) this holds for lines that open with a program of ours. Commands
  are never run.
- `yaml` and `json` blocks are parsed.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from .commands import FOREIGN, OURS, check, split
from .names import missing_name

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
# what a marked block may need: datasets, checkpoints of real models, a GPU, a download, a peer that make test-peers
# installs
NEEDS = {"data", "models", "gpu", "network", "trl", "liger"}
LANGUAGES = {"python", "bash", "yaml", "json", "text", ""}
TOP_FOLDERS = ("grpo_core", "kernels", "model", "recipes", "bench", "docs", "tests")
PACKAGES = ("grpo_core", "grpo_kernels", "affectgpt")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden `<!-- python` one. `line` is that of its first line of text, from 1."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[str]:
        """What keeps it from being run: `data`, `5 minutes`, `sketch`."""
        found = []
        for mark in self.marks:
            name, _, value = mark.partition(":")
            if name == "needs":
                found += [reason.strip() for reason in value.split(",")]
            elif name == "minutes":
                found.append(f"{float(value):g} minutes")
            else:
                found.append(name)
        return found

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Read a page's blocks.

    Raises:
        ValueError: a fence is never closed.
    """
    lines = text.splitlines()
    marks: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if fence := re.fullmatch(r"(\s*)(```+)(\w*).*", line):
            indent, ticks, language = fence.groups()
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == ticks), None)
            if end is None:
                raise ValueError(f"{page}:{at + 1}: the fence is never closed")
            yield Block(
                page,
                at + 2,
                language,
                "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end]),
                tuple(marks),
            )
            at, marks = end, []
        elif line.strip() == "<!-- python":
            end = lines.index("-->", at)
            yield Block(page, at + 2, "python", "\n".join(lines[at + 1 : end]), tuple(marks))
            at, marks = end, []
        elif comment := re.fullmatch(r"\s*<!--\s*(.+?)\s*-->", line):
            marks.append(comment[1])
        else:
            marks = []  # a mark belongs to the block directly below
        at += 1


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


BLOCKS = [block for page in PAGES for block in blocks_of(page, read(page))]


def prose(page: str) -> str:
    """A page without its blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", read(page), flags=re.DOTALL)
    return re.sub(r"^(\s*)(```+).*?^\s*\2\s*$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(page: str) -> set[str]:
    return {code.strip() for code in re.findall(r"`([^`]+)`", prose(page))}


def commands_of(block: Block) -> list[str]:
    """The commands of a block, one a line but for continuation lines."""
    lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    lines = [line.removeprefix("$ ").strip() for line in lines]
    if block.language == "bash":
        return [line for line in lines if line and not line.startswith("#")]
    if block.language in ("", "text"):
        return [line for line in lines if line.split(" ")[0] in OURS]
    return []


def files_of_readers() -> dict[str, str]:
    """Files that pages have their readers write, by name: one name is one file, on whatever page it is."""
    files: dict[str, str] = {}
    for block in BLOCKS:
        if block.language == "python" and (name := re.match(r"# (\w+\.py)\b", block.text)):
            assert files.setdefault(name[1], block.text) == block.text, f"{block}: another page has another {name[1]}"
    return files


def imports_of_ours(text: str) -> Iterator[str]:
    """Dotted names that Python code imports from our packages."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES)


def slugs(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_blocks_and_their_marks_are_read():
    marks = "<!-- needs: data, gpu -->\n<!-- minutes: 5 -->\n"
    text = marks + "```python\nx = 1\n```\n\n```\nmake x\n```\n<!-- python\ny = 2\n-->\n"
    assert [(block.line, block.language, block.text, block.reasons) for block in blocks_of("p", text)] == [
        (4, "python", "x = 1", ["data", "gpu", "5 minutes"]),
        (8, "", "make x", []),
        (11, "python", "y = 2", []),
    ]
    with pytest.raises(ValueError, match="p:1: the fence is never closed"):
        list(blocks_of("p", "```python\nx"))


def test_a_wrong_command_is_noticed():
    wrong = {
        "python recipes/missing.py": "there is no recipes/missing.py",
        "python recipes/affectgpt_r1.py --algorithm.bta 1": "unknown key 'algorithm.bta'",
        "python recipes/affectgpt_r1.py --config nosuch": "there is no such file or config",
        "python bench/rollout.py --round 2 --lora": "unrecognized arguments: --lora",
        "python bench/rollout.py --preset 8B": "invalid choice",
        "python -m affectgpt.synthetic make": "required",
        "make tests": "no target 'tests'",
        'make demo ARGS="--sed 1"': "unknown key 'sed'",
        'make gpu ARGS="--jobs 2"': "unrecognized arguments: --jobs",
        'make docs ARGS="--strict"': "takes no ARGS",
        "pytest tests/test_missing.py": "there is no tests/test_missing.py",
        "pyhton x.py": "'pyhton' is neither",
    }
    right = [
        'make demo ARGS="--seed 1"',
        'make gpu ARGS="--list"',
        "python recipes/affectgpt_r1.py --config mine.yaml --help",
        "pip install x",
    ]
    found = check([*wrong, *right])
    assert found.keys() == wrong.keys()
    assert not {command: found[command] for command, text in wrong.items() if text not in found[command]}


def test_every_block_has_a_language_and_marks_that_are_known():
    unknown = {str(block): block.language for block in BLOCKS if block.language not in LANGUAGES}
    assert unknown == {}
    reasons = Counter(reason for block in BLOCKS for reason in block.reasons)
    assert {reason for reason in reasons if not reason.endswith(" minutes")} <= NEEDS | {"sketch"}
    # a mark that excuses nothing would hide what it is later put above
    assert not [str(block) for block in BLOCKS if block.marks and block.language != "python"]
    print(f"python blocks: {sum(block.language == 'python' for block in BLOCKS)}, not run for {dict(reasons)}")


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [page])  # a page's program gets no options
    names: dict[str, object] = {"__name__": "__page__"}
    for block in BLOCKS:
        if block.page != page or block.language != "python" or "sketch" in block.reasons:
            continue
        # line numbers of the page, so that a traceback points into it
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec", dont_inherit=True)
        if block.reasons:
            assert not [missing for name in imports_of_ours(block.text) if (missing := missing_name(name))]
        else:
            exec(code, names)


def test_commands_are_ones_that_their_programs_take(tmp_path):
    commands = {command: block for block in BLOCKS for command in commands_of(block)}
    for page in PAGES:
        for code in inline_code(page):
            words = code.split()
            if (words[0] in OURS - {"affectgpt"} and len(words) > 1) or code.startswith("affectgpt "):
                commands.setdefault(code.replace("\n", " "), Block(page, 0, "", code))
    assert len(commands) > 10
    for name, text in files_of_readers().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    wrong = check(list(commands), folder=tmp_path)
    assert {str(commands[command]): text for command, text in wrong.items()} == {}


def test_bash_blocks_hold_nothing_but_commands():
    lines = [(str(block), line) for block in BLOCKS if block.language == "bash" for line in commands_of(block)]
    assert not [(at, line) for at, line in lines if split(line)[0] not in OURS | FOREIGN]


def test_yaml_and_json_blocks_are_read():
    for block in BLOCKS:
        if block.language == "yaml":
            assert yaml.safe_load(block.text) is not None, block
        elif block.language == "json":
            # one object, or one a line as in a jsonl
            texts = [block.text] if block.text.lstrip().startswith("{\n") else block.text.splitlines()
            assert [json.loads(text) for text in texts if text.strip()], block


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue  # https:, mailto:
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in slugs(file.resolve().relative_to(ROOT).as_posix())):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page):
    """`grpo_core/policy.py`, `tests/grpo_core/`, `bench/*.py`, also with `:name` or `::test_name` after them."""
    known = re.compile(rf"(?:{'|'.join(TOP_FOLDERS)})/[\w./*{{}},-]*")
    paths = {match[0].rstrip(".,") for code in inline_code(page) if (match := known.match(code))}
    paths |= {
        path.rstrip(".,")
        for block in BLOCKS
        if block.page == page
        for path in re.findall(rf"(?<![\w/.-]){known.pattern}", block.text)
    }
    assert not [path for path in sorted(paths) if "{" not in path and not list(ROOT.glob(path.rstrip("/")))]


def test_every_package_is_on_an_api_page():
    """A package brings its modules, but for rooms that the page leaves to pages of their own."""
    shown, left_out = set(), set()
    for page in PAGES:
        for name, options in re.findall(r"^::: +([\w.]+)\n((?: +.*\n)*)", read(page), re.MULTILINE):
            shown.add(name)
            left_out |= {
                f"{name}.{room}" for rooms in re.findall(r"!\^\((.+?)\)\$", options) for room in rooms.split("|")
            }
    assert set(PACKAGES) <= shown
    assert left_out - shown <= {"affectgpt.configs"}  # which holds YAML


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_of_ours_are_found(page):
    """`grpo_core.policy.Policy`, `affectgpt.rewards`, also with `(…)` after them."""
    dotted = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?=$|[\s(\[:,])")
    names = {match[0] for code in inline_code(page) if (match := dotted.match(code))}
    names |= set(re.findall(r"^::: +([\w.]+)", read(page), re.MULTILINE))  # mkdocstrings
    assert not [name for name in sorted(names) if missing_name(name)]


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page):
    """`test_x`, `test_file.py::test_x`."""
    sources: dict[str, str] = {}  # text by file name, of all files of that name
    for file in (ROOT / "tests").rglob("test_*.py"):
        sources[file.name] = sources.get(file.name, "") + file.read_text("utf-8")
    everything = "".join(sources.values())
    missing = []
    for code in inline_code(page):
        if match := re.fullmatch(r"(?:[\w/]*?(test_\w+\.py)::)?(test_\w+)", code):
            file_name, test = match.groups()
            text = sources.get(file_name, "") if file_name else everything
            if not re.search(rf"def {test}\(", text) and f"{test}.py" not in sources:
                missing.append(code)
    assert not missing
