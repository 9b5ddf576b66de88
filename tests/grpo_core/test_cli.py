"""What a user writes is what the program gets, and what cannot be meant is refused with its place and the fix."""

import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_core.config import ConfigError, load_config, save_config, to_dict


@dataclass
class Optim:
    """How parameters move."""

    lr: float = 1e-5
    """Peak learning
    rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates."""
    fused: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    """Shape."""

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"optim.lr is {self.lr}: set it to 0 or above")


@dataclass(frozen=True)
class Data:
    root: Path
    """Folder of the clips."""
    stop: tuple[str, ...] = ()
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Weight of each reward."""
    seed: int = 0


@dataclass
class Base:
    seed: int = 0
    """Seed of everything."""


@dataclass
class Config(Base):
    data: Data = field(default_factory=lambda: Data(Path("clips"), limit=7))
    optim: Optim = field(default_factory=Optim)
    name: str = "demo"
    budget: int | Literal["all"] = "all"


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def refusal(*argv, cls=Config):
    with pytest.raises(ConfigError) as error:
        load_config(cls, argv)
    return str(error.value)


def test_without_arguments_all_defaults_hold_those_of_a_section_s_own_default_too():
    assert load_config(Config, []) == Config()
    assert load_config(Config, ["--data.seed", "5"]).data == Data(Path("clips"), limit=7, seed=5)


def test_every_type_is_read_from_yaml(write):
    path = write("""
seed: 3
name: no        # a name, not a truth value
budget: 12
data:
  root: ~/clips
  stop: ["###", 'a, b', null_]
  sizes: [4]
  limit: null
  weights: {accuracy: 1e-1, format: .inf}
optim:
  lr: 1e-5
  betas: [0.8, 1e-1]
  fused: True
  schedule: cosine
""")
    assert load_config(Config, ["--config", path]) == Config(
        seed=3,
        name="no",
        budget=12,
        data=Data(Path.home() / "clips", ("###", "a, b", "null_"), [4], None, {"accuracy": 0.1, "format": math.inf}),
        optim=Optim(1e-5, (0.8, 0.1), True, "cosine"),
    )


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--optim.lr", "1e-3"], "optim.lr", 1e-3),
        (["--optim.lr=1e-3"], "optim.lr", 1e-3),
        (["optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--seed", "-1"], "seed", -1),
        (["--optim.fused"], "optim.fused", True),
        (["--optim.fused", "--seed", "2"], "optim.fused", True),
        (["--optim.fused", "false"], "optim.fused", False),
        (["--optim.betas", "0.5,0.6"], "optim.betas", (0.5, 0.6)),
        (["data.stop=a, b"], "data.stop", ("a", "b")),
        (["data.stop=['a, b']"], "data.stop", ("a, b",)),
        (["data.stop="], "data.stop", ()),
        (["--data.limit", "none"], "data.limit", None),
        (["--name", "a=b"], "name", "a=b"),
        (["--budget", "all"], "budget", "all"),
        (["--data.weights", "{format: 2}"], "data.weights", {"format": 2.0}),
        (["--data.weights.format", "2"], "data.weights", {"accuracy": 1.0, "format": 2.0}),
    ],
)
def test_command_line_forms(arguments, key, value):
    found = load_config(Config, arguments)
    for name in key.split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


def test_later_files_override_earlier_ones_and_the_command_line_overrides_both(write):
    first = write("seed: 1\noptim: {lr: 0.1, fused: true}\n", "first.yaml")
    second = write("optim: {lr: 0.2}\ndata: {weights: {format: 3}}\n", "second.yaml")
    config = load_config(Config, ["--seed", "9", "--config", first, f"--config={second}", "--data.weights.dual", "4"])
    assert (config.seed, config.optim.lr, config.optim.fused) == (9, 0.2, True)
    assert config.data.weights == {"format": 3.0, "dual": 4.0}


def test_the_default_file_is_read_where_no_other_is_given(write):
    default, other = Path(write("seed: 1\nname: given\n", "default.yaml")), write("seed: 2\n", "other.yaml")
    assert load_config(Config, ["--name", "x"], default_config=default) == Config(seed=1, name="x")
    assert load_config(Config, ["--config", other], default_config=default) == Config(seed=2)


def test_empty_files_and_sections_change_nothing(write):
    assert load_config(Config, ["--config", write(""), "--config", write("optim:\n", "b.yaml")]) == Config()


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--optim.lrr", "1"], "optim.lr"),
        (["--optin.lr", "1"], "optim.lr"),
        (["--shedule", "cosine"], "optim.schedule"),
        (["--optim.weights", "1"], "data.weights"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(arguments, near):
    message = refusal(*arguments)
    assert message.startswith(f"unknown key '{arguments[0][2:]}' (command line), did you mean '{near}'?")


def test_an_unknown_key_without_neighbours_points_to_help():
    assert refusal("--zzzzqqqq", "1") == "unknown key 'zzzzqqqq' (command line); --help lists every key"


def test_a_yaml_mistake_is_named_with_file_and_line(write):
    path = write("seed: 1\noptim:\n  fused: true\n  lrr: 3\n")
    assert refusal("--config", path) == (
        f"unknown key 'optim.lrr' ({path}:4), did you mean 'optim.lr'? --help lists every key"
    )
    path = write("seed: 1\noptim:\n  lr: fast\n")
    assert refusal("--config", path) == f"optim.lr ({path}:3) is 'fast': it wants a number"


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("seed=1.5", "an integer"),
        ("seed=", "an integer"),
        ("optim.lr=nan", "a number"),
        ("optim.fused=1", "true or false"),
        ("optim.schedule=linear", "one of constant, cosine"),
        ("optim.betas=0.9", "a list of 2 (a number, a number)"),
        ("data.sizes=1,x", "a list (an integer each)"),
        ("data.limit=some", "an integer or none"),
        ("data.root=", "a path"),
        ("data.weights=3", "a mapping (name to a number)"),
        ("data.weights.format=much", "a mapping (name to a number)"),
        ("budget=half", "an integer or one of all"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_key_value_and_type(argument, wanted):
    key, _, value = argument.partition("=")
    message = refusal(argument)
    assert message.startswith(key.removesuffix(".format") + " (command line) is ")
    assert value.split(",")[-1] in message
    assert message.endswith(f"it wants {wanted}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optim: 3\n", "optim (FILE:1) is a section: give its keys below it"),
        ("- 1\n", "FILE: a config file is a mapping"),
        ("seed: [1\n", "FILE:2: this is not YAML"),
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice (again in line 2)"),
        ("seed: !!python/object/apply:os.getcwd []\n", "the tag tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("seed:\n", "seed (FILE:1) is null: it wants an integer"),
        ("data: {stop: a}\n", "data.stop (FILE:1) is 'a': it wants a list (text each)"),
        ("optim: {lr: -1}\n", "optim.lr is -1.0: set it to 0 or above"),
        ("? [a]\n: 1\n", "a key is a word"),
    ],
)
def test_malformed_files_are_refused(write, text, part):
    path = write(text)
    assert part.replace("FILE", path) in refusal("--config", path)


def test_a_missing_file_and_a_missing_value_are_refused():
    assert "cannot read the config file nowhere.yaml" in refusal("--config", "nowhere.yaml")
    assert refusal("--optim.lr") == "--optim.lr needs a value"
    assert refusal("--optim.lr", "--seed", "1") == "--optim.lr needs a value"
    assert refusal("--config") == "--config needs a value"
    assert "'lr' is no option: write --section.key value" in refusal("lr", "3")


def test_a_required_key_is_asked_for_and_an_ambiguous_one_refused():
    assert refusal(cls=Data) == "root must be given: add --root (a path), or set it in a config file"

    message = refusal("--seed", "1", cls=Pair)
    assert message == "--seed may be --left.seed or --right.seed: write one of them"


@dataclass
class Pair:
    left: Base = field(default_factory=Base)
    right: Base = field(default_factory=Base)


@dataclass
class Unreadable:
    anything: Any = None


def test_a_field_no_text_is_read_as_is_the_programmer_s_error():
    with pytest.raises(TypeError, match="cannot be of type"):
        load_config(Unreadable, [])


def test_help_shows_every_field_with_type_default_and_doc(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(Config, ["--seed", "x", "--help"], description="Trains a thing.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Trains a thing.\n")
    for part in (
        "  --seed  an integer\n      Seed of everything. (default: 0)\n",
        "\noptim: How parameters move.\n  --optim.lr  a number\n      Peak learning rate. (default: 1e-05)\n",
        "\ndata\n  --data.root  a path\n      Folder of the clips. (default: clips)\n",
        "  --data.limit  an integer or none\n      (default: 7)\n",
        "  --optim.betas  a list of 2 (a number, a number)\n      Moment decay rates. (default: 0.9,0.999)\n",
        "  --optim.schedule  one of constant, cosine\n      Shape. (default: constant)\n",
        "  --data.weights  a mapping (name to a number)\n      Weight of each reward. (default: accuracy: 1.0)\n",
    ):
        assert part in text
    assert text.count("\n  --") == 13


def test_a_program_prints_a_mistake_without_a_traceback_and_exits_with_2(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom grpo_core.config.loader import load_config\n"
        "@dataclass\nclass C:\n    seed: int = 0\nprint(load_config(C))\n"
    )
    done = subprocess.run([sys.executable, script, "--sead", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'sead' (command line), did you mean 'seed'? --help lists every key\n"
    done = subprocess.run([sys.executable, script, "--seed", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "C(seed=1)\n")


@settings(max_examples=40, deadline=None)
@example(lr=0.0, stop=["\u2028"], name="\x85", weights={"a\u2029b": 1.0}, limit=None)  # line breaks in YAML
@given(
    lr=st.floats(min_value=0, allow_nan=False),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    weights=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False), max_size=3),
    limit=st.none() | st.integers(),
)
def test_a_saved_config_is_read_back_equal(tmp_path_factory, lr, stop, name, weights, limit):
    data = Data(Path("a b/ü"), tuple(stop), [3], limit, weights)
    config = Config(seed=-4, name=name, data=data, optim=Optim(lr=lr, fused=True), budget=3)
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load_config(Config, ["--config", str(path)]) == config


def test_to_dict_holds_yaml_types_only():
    plain = to_dict(Config())
    assert plain["data"] | {"root": Path("clips"), "stop": ()} == asdict(Config())["data"]
    assert (plain["data"]["root"], plain["data"]["stop"], plain["optim"]["betas"]) == ("clips", [], [0.9, 0.999])
