"""What a user writes is what the program gets, and what cannot be meant is refused with its place and the fix."""

import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_core.algorithm.losses import LOSS_TYPES
from grpo_core.config import (
    MOVED_KEYS,
    AlgorithmConfig,
    ConfigError,
    ConfigSection,
    GRPOConfig,
    OptimConfig,
    RunConfig,
    chosen_by,
    load_config,
    option,
    plugin_files,
    save_config,
    to_dict,
    translate_saved_config,
)
from grpo_core.registry import Registry


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
        ("seed: [1\n", "FILE:2: not valid YAML"),
        ("seed: 1\nseed: 2\n", "the key 'seed' appears twice (again in line 2)"),
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
    assert "'lr' is not an option: write --section.key value" in refusal("lr", "3")


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


# --- options chosen by a name ------------------------------------------------------------------------------------

LAYOUTS: Registry[Any] = Registry("layout")


@LAYOUTS.register("folder")
@dataclass(frozen=True)
class FolderLayout:
    """Clips in folders."""

    pattern: str = "*.mp4"
    """Which files are clips."""


@LAYOUTS.register("table")
@dataclass(frozen=True)
class TableLayout:
    """Clips in a table."""

    language: str = option("english", choices=("english", "chinese"))
    """Column of the text."""
    limit: int | None = None
    header: bool = False
    widths: tuple[int, ...] = ()


@LAYOUTS.register("bare")
@dataclass(frozen=True)
class BareLayout:
    pass


@LAYOUTS.register("sheet")
class SheetLayout(TableLayout):
    """Clips in a spreadsheet."""


@dataclass
class Source(ConfigSection, key="source"):
    """Where clips are."""

    format: str = option("folder", choices=LAYOUTS)
    layout: object = chosen_by("format")
    root: Path = Path("clips")
    share: float = 1.0
    sizes: tuple[int, int] = (1, 2)


@dataclass
class Clips(ConfigSection):
    source: Source = field(default_factory=Source)
    seed: int = 0
    plugins: tuple[Path, ...] = plugin_files()


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ({}, FolderLayout()),
        ({"format": "table"}, TableLayout()),
        ({"format": "bare"}, BareLayout()),
        ({"format": "table", "layout": {"language": "chinese", "widths": [1]}}, TableLayout("chinese", widths=(1,))),
        ({"format": "table", "layout": TableLayout(limit=3)}, TableLayout(limit=3)),
    ],
)
def test_from_python_a_named_entry_brings_its_options(values, layout):
    assert Source(**values).layout == layout


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ([], FolderLayout()),
        (["--source.layout.pattern", "*.avi"], FolderLayout("*.avi")),
        (["--pattern", "*.avi"], FolderLayout("*.avi")),
        (["--format", "table"], TableLayout()),
        (["--source.layout.limit", "3", "--header", "--source.format", "table"], TableLayout(limit=3, header=True)),
        (["source.format=table", "widths=4,5"], TableLayout(widths=(4, 5))),
        (["--format", "bare"], BareLayout()),
    ],
)
def test_from_the_command_line_a_named_entry_brings_its_options(arguments, layout):
    assert load_config(Clips, arguments).source.layout == layout


def test_from_yaml_a_named_entry_brings_its_options_and_another_name_drops_them(write):
    table = write("source: {layout: {limit: 3}, format: table}\n", "table.yaml")
    assert load_config(Clips, ["--config", table]).source.layout == TableLayout(limit=3)
    assert load_config(Clips, ["--config", table, "--limit", "4"]).source.layout == TableLayout(limit=4)
    assert load_config(Clips, ["--config", table, "--format", "folder"]).source.layout == FolderLayout()
    again = write("source: {format: table, layout: {header: true}}\n", "again.yaml")
    assert load_config(Clips, ["--config", table, "--config", again]).source.layout == TableLayout(limit=3, header=True)
    empty = write("source: {format: bare, layout: }\n", "empty.yaml")
    assert load_config(Clips, ["--config", empty]).source.layout == BareLayout()


def test_an_option_of_another_entry_is_refused_with_those_there_are(write):
    expected = "source.layout.limit{} is not an option of format folder: it has pattern"
    for arguments in (["--source.layout.limit", "3"], ["--limit", "3"]):
        assert refusal(*arguments, cls=Clips) == expected.format(" (command line)")
    path = write("source:\n  layout:\n    limit: 3\n")
    assert refusal("--config", path, cls=Clips) == expected.format(f" ({path}:3)")
    with pytest.raises(ValueError, match=r"^source\.layout\.limit is not an option of format folder: it has pattern$"):
        Source(layout={"limit": 3})
    assert refusal("--format", "bare", "--pattern", "x", cls=Clips).endswith("option of format bare: it has none")
    assert refusal("--source.layout", "x", cls=Clips) == (
        "source.layout (command line) is a section: give its keys below it"
    )


def test_replace_takes_the_defaults_of_a_new_name_but_loses_no_option_that_was_set():
    assert replace(Source(), format="table").layout == TableLayout()
    assert replace(Source(), share=0.5) == Source(share=0.5)
    assert replace(Source(format="table"), layout={"limit": 3}).layout == TableLayout(limit=3)
    with pytest.raises(ValueError, match=r"source\.layout is FolderLayout\(pattern='\*\.avi'\): format table wants"):
        replace(Source(layout={"pattern": "*.avi"}), format="table")


@pytest.mark.parametrize("layout", [FolderLayout("a"), TableLayout("chinese", 3, True, (1,)), BareLayout()])
def test_a_saved_config_with_named_entries_is_read_back_equal(layout, tmp_path):
    (name,) = (name for name in LAYOUTS if LAYOUTS[name] is type(layout))
    config = Clips(Source(name, layout))
    assert to_dict(config)["source"]["layout"] == to_dict(layout)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Clips, ["--config", str(tmp_path / "config.yaml")]) == config


def test_help_has_a_block_for_each_entry_and_shows_what_files_set(write, capsys):
    path = write("source: {format: table, layout: {limit: 3}}\nseed: 7\n")
    with pytest.raises(SystemExit):
        load_config(Clips, ["--config", path, "--help"])
    text = capsys.readouterr().out
    for part in (
        "  --seed  an integer\n      (default: 7)\n",
        "  --source.format  one of folder, table, bare, sheet\n      (default: table)\n",
        "\nsource.layout for format folder: Clips in folders.\n"
        "  --source.layout.pattern  text\n      Which files are clips. (default: *.mp4)\n",
        "\nsource.layout for format table: Clips in a table.\n"
        "  --source.layout.language  one of english, chinese\n      Column of the text. (default: english)\n"
        "  --source.layout.limit  an integer or none\n      (default: 3)\n",
        "\nsource.layout for format bare\n",
    ):
        assert part in text


def test_entries_with_the_same_options_share_their_lines_in_the_help(capsys):
    with pytest.raises(SystemExit):
        load_config(Clips, ["--help"])
    shared = "source.layout for format sheet: Clips in a spreadsheet.\n  the options of table\n"
    assert shared in capsys.readouterr().out


def test_a_list_that_is_given_several_times_adds_up(capsys):
    config = load_config(RunConfig, ["--trackers", "tensorboard", "--trackers", "[tensorboard]", "--max_steps", "3"])
    assert config.trackers == ("tensorboard", "tensorboard")
    rollout = load_config(GRPOConfig, ["--stop_strings", "a,b", "--stop_strings", "c"]).rollout
    assert rollout.stop_strings == ("a", "b", "c")
    assert capsys.readouterr().err == ""


def test_a_list_on_the_command_line_still_overrides_that_of_a_file(write):
    file = write("rollout: {stop_strings: [x]}\n")
    assert load_config(GRPOConfig, ["--config", file, "--stop_strings", "c"]).rollout.stop_strings == ("c",)


def test_of_another_option_that_is_given_twice_the_last_counts_and_is_named(capsys):
    config = load_config(GRPOConfig, ["--run.seed", "1", "--seed", "2", "--betas", "0.5,0.6", "--betas", "0.7,0.8"])
    assert (config.run.seed, config.optim.betas) == (2, (0.7, 0.8))
    said = capsys.readouterr().err
    assert "warning: run.seed is given twice on the command line: 2 counts, not 1\n" in said
    assert "warning: optim.betas is given twice on the command line: ['0.7', '0.8'] counts" in said
    load_config(GRPOConfig, ["--run.seed", "2", "--seed", "2"])
    assert capsys.readouterr().err == ""


# --- checks of values from Python --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (OptimConfig, {"lr_scheduler": "cosin"}, "optim.lr_scheduler is 'cosin': it wants one of constant, linear"),
        (AlgorithmConfig, {"loss_type": "gpro"}, "algorithm.loss_type is 'gpro': it wants one of grpo, bnpo, dapo"),
        (AlgorithmConfig, {"kl_in": "rewards"}, "algorithm.kl_in is 'rewards': it wants one of loss, reward"),
        (AlgorithmConfig, {"baseline": "loo"}, "algorithm.baseline is 'loo': it wants one of mean, leave_one_out"),
        (AlgorithmConfig, {"sampler_correction": "tis"}, "algorithm.sampler_correction is 'tis': it wants one of none"),
        (AlgorithmConfig, {"multi_objective_aggregation": "sum"}, "algorithm.multi_objective_aggregation is 'sum'"),
        (AlgorithmConfig, {"scale_rewards": True}, "algorithm.scale_rewards is True: it wants one of group, batch"),
        (AlgorithmConfig, {"importance_sampling_level": "word"}, "one of token, sequence, sequence_token, "),
        (AlgorithmConfig, {"reference": "base"}, "algorithm.reference is 'base': it wants one of frozen, adapter_off"),
        (AlgorithmConfig, {"beta_schedule": "step"}, "algorithm.beta_schedule is 'step': it wants one of linear, cos"),
        (AlgorithmConfig, {"kl_estimator": "k4"}, "algorithm.kl_estimator is 'k4': it wants one of k1, k2, k3, full"),
        (AlgorithmConfig, {"loss": 3}, "algorithm.loss is 3: loss_type dapo wants DAPO, or a mapping of its options"),
        (AlgorithmConfig, {"reward_weights": {"a": "much"}}, r"it wants a mapping \(name to a number\)"),
        (OptimConfig, {"learning_rate": "1e-5"}, "optim.learning_rate is '1e-5': it wants a number"),
        (OptimConfig, {"learning_rate": math.nan}, "optim.learning_rate is nan: it wants a number"),
        (OptimConfig, {"warmup_steps": 1.5}, "optim.warmup_steps is 1.5: it wants an integer"),
        (OptimConfig, {"betas": (0.9,)}, r"optim.betas is \(0.9,\): it wants a list of 2"),
        (RunConfig, {"seed": True}, "run.seed is True: it wants an integer"),
        (RunConfig, {"output_dir": 3}, "run.output_dir is 3: it wants a path"),
        (Source, {"format": "table", "layout": {"limit": "3"}}, "source.layout.limit is '3': it wants an integer or"),
        (Source, {"format": "table", "layout": TableLayout("latin")}, "source.layout.language is 'latin'"),
        (GRPOConfig, {"algorithm": {"beta": 0.1}}, "algorithm is {'beta': 0.1}: it wants AlgorithmConfig"),
    ],
)
def test_a_wrong_value_from_python_is_refused_with_key_and_what_is_valid(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_values_that_python_writes_in_another_type_become_the_field_s():
    source = Source(root="a/b", share=1, sizes=[3, 4])
    assert (source.root, source.share, source.sizes) == (Path("a/b"), 1, (3, 4))


# --- plug-ins ----------------------------------------------------------------------------------------------------

PLUGIN = """
from pathlib import Path

from grpo_core.algorithm.losses import register_loss

with Path(__file__).with_suffix(".log").open("a") as log:
    log.write("imported\\n")


@register_loss({name!r}, average="token")
class Mine:
    '''Of {name}.'''

    slope: float = 2.0
    '''How steep.'''

    def __call__(self, logprob, ratio, advantages):
        return -self.slope * ratio * advantages
"""


def test_a_plugin_is_imported_once_before_options_are_checked_and_saved_with_its_full_path(
    write, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(LOSS_TYPES, "_entries", dict(LOSS_TYPES._entries))  # what plug-ins add is undone
    first, second = write(PLUGIN.format(name="mine"), "mine.py"), write(PLUGIN.format(name="other"), "other.py")
    monkeypatch.chdir(tmp_path)
    file = write("algorithm: {loss_type: mine, loss: {slope: 3}}\nrun: {plugins: [mine.py]}\n")
    config = load_config(GRPOConfig, ["--config", file, "--plugins", "other.py", "--plugins", first])
    assert config.algorithm.loss.slope == 3
    assert config.run.plugins == (Path(first), Path(second))
    monkeypatch.chdir("/")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(GRPOConfig, ["--config", str(tmp_path / "config.yaml")]) == config
    assert load_config(GRPOConfig, ["--plugins", second, "--loss_type", "other"]).algorithm.loss.slope == 2
    with pytest.raises(SystemExit):
        load_config(GRPOConfig, ["--plugins", second, "--help"])
    shown = "loss_type mine: Of mine.\n  --algorithm.loss.slope  a number\n      How steep. (default: 2.0)\n"
    assert shown in capsys.readouterr().out
    assert [Path(path).with_suffix(".log").read_text() for path in (first, second)] == ["imported\n"] * 2


def test_a_plugin_that_is_missing_or_raises_is_named_with_the_exception(write):
    assert refusal("--plugins", "/nowhere/x.py", cls=Clips) == "plugins (command line): there is no file /nowhere/x.py"
    path = write("import math\nmath.nothing\n", "broken.py")
    assert refusal("--plugins", path, cls=Clips) == (
        f"plugins (command line): {path}, line 2, raises AttributeError: module 'math' has no attribute 'nothing'"
    )
    assert refusal("--plugins", cls=Clips) == "--plugins needs a value"
    file = write("plugins: mine.py\n")
    assert refusal("--config", file, cls=Clips) == f"plugins ({file}:1) is 'mine.py': it wants a list (a path each)"


# --- keys that moved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [key for key in MOVED_KEYS if key.startswith("algorithm.")])
def test_a_key_that_moved_is_refused_with_its_new_name(old, write):
    assert refusal(f"--{old}", "1", cls=GRPOConfig) == f"{old} (command line) is now {MOVED_KEYS[old]}"
    path = write(f"algorithm:\n  {old.partition('.')[2]}: 1\n")
    assert refusal("--config", path, cls=GRPOConfig) == f"{old} ({path}:2) is now {MOVED_KEYS[old]}"


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("dapo", {"epsilon": 0.1, "epsilon_high": None, "delta": 2.0}),
        ("cispo", {"cispo_cap": 3.0}),
        ("sapo", {"temperature_pos": 1.0, "temperature_neg": 1.2}),
    ],
)
def test_a_config_saved_before_keys_moved_is_today_s_config_of_the_same_run(loss_type, loss):
    config = GRPOConfig(AlgorithmConfig(loss_type, loss, beta=0.1), run=RunConfig("old"))
    saved = to_dict(config)
    old = {"epsilon": 0.1, "epsilon_high": None, "delta": 2.0, "cispo_cap": 3.0}
    old |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.2}
    del saved["algorithm"]["loss"], saved["run"]["plugins"]
    saved["algorithm"] |= old
    before = str(saved)
    assert translate_saved_config(saved, GRPOConfig) == to_dict(config)
    assert str(saved) == before
    assert translate_saved_config(to_dict(config), GRPOConfig) == to_dict(config)


def test_options_and_help_of_a_run_need_no_torch():
    code = (
        "import contextlib, sys\nfrom grpo_core.config import GRPOConfig, load_config\n"
        "with contextlib.suppress(SystemExit):\n    load_config(GRPOConfig, ['--help'])\n"
        "load_config(GRPOConfig, ['--loss_type', 'sapo'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(("saved", "trackers"), [(False, []), (True, ["tensorboard"])])
def test_a_run_saved_with_a_switch_for_tensorboard_names_it_among_its_trackers(saved, trackers):
    before = to_dict(GRPOConfig())
    del before["run"]["trackers"]
    before["run"]["tensorboard"] = saved
    assert translate_saved_config(before, GRPOConfig) == to_dict(GRPOConfig(run=RunConfig(trackers=tuple(trackers))))


def test_the_switch_for_tensorboard_is_refused_with_its_new_name():
    with pytest.raises(ConfigError, match=r"run.tensorboard.* run.trackers"):
        load_config(GRPOConfig, ["--run.tensorboard", "true"])
