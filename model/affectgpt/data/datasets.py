"""Read emotion datasets from disk as `Sample`s: MER2025, MER2026, OV-MERD+, a folder of clips, a jsonl, or a plug-in's.

Loading reads tables only. A missing or broken media file is reported and skipped when its features are extracted, as
is a sample with a `fault`; a missing folder or table, or a table that is wrong, is an error here, with file and line.
Names and relative paths in a table may not leave the data set's folder; links in it are followed.

A layout is a frozen dataclass registered under the name that `data.format` takes: its fields are its options
(`data.layout.…`), its `load` reads the samples. docs/guides/own_dataset.md shows how. Nothing here imports torch.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from affectgpt.emotion_wheel import parse_labels
from grpo_core.config.fields import ConfigSection
from grpo_core.data import check_data_file, read_jsonl
from grpo_core.errors import InputError
from grpo_core.registry import Registry

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
AUDIO_SUFFIXES = (".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus", ".wma")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MER_LABELS = "track2_train_ovmerd.csv"  # MER2025's training table
NO_LABEL = "neutral"  # for an empty label list, as in upstream's loaders


@dataclass(frozen=True)
class Sample:
    """One clip with its subtitle and labels. A path of None means that the sample lacks this modality by design.

    Attributes:
        name: unique in its dataset.
        audio: sound file; None takes the video's sound track.
        face: .npy of cropped faces.
        subtitle: what is said; empty if unknown.
        labels: open-vocabulary emotion labels, as the table spells them, e.g. `[happy, proud]`.
        reason: a description that leads to the labels.
        image: a still picture, for the prompts that take one instead of a video.
        fault: why the sample cannot be used; it is then skipped and counted, as one with an unreadable clip is.
    """

    name: str
    video: Path | None
    audio: Path | None
    face: Path | None
    subtitle: str = ""
    labels: str | None = None
    reason: str | None = None
    image: Path | None = None
    fault: str | None = None


def load_mer2025(
    root: str | Path,
    labels: str | Path = MER_LABELS,
    *,
    subtitle_language: Literal["english", "chinese"] = "english",
    reasons: str | Path | None = None,
    labelled: bool = True,
) -> list[Sample]:
    """Load the samples of a table of the MER2025 dataset, in its order.

    ```
    root/video/{name}.mp4   audio/{name}.wav   openface_face/{name}/{name}.npy   subtitle_chieng.csv   track*.csv
    ```

    A modality whose folder does not exist is None in all samples (the sound is then the video's track).

    Args:
        labels: csv `name,openset`; an absolute path, or relative to root.
        reasons: csv `name,reason`, e.g. `track3_train_ovmerd.csv`.
        labelled: False reads only the names (`track_all_candidates.csv`); labels are then None.

    Raises:
        FileNotFoundError: root or one of the tables is missing.
        InputError: a table lacks a column, or has a name twice.
    """
    return _load(root, labels, labelled, ("subtitle_chieng.csv", subtitle_language), reasons, "{name}/{name}.npy")


def load_mer2026(root: str | Path, labels: str | Path = "track2_train_human.csv", **options: Any) -> list[Sample]:
    """Load MER2026, in the layout and with the arguments of `load_mer2025`."""
    return load_mer2025(root, labels, **options)


def load_ovmerd_plus(
    root: str | Path,
    labels: str | Path = "ovlabel.csv",
    *,
    reasons: str | Path | None = None,
    labelled: bool = True,
) -> list[Sample]:
    """Load OV-MERD+ of MER-UniBench (`ovmerdplus-process`); arguments and errors as in `load_mer2025`.

    ```
    root/video/{name}.mp4   audio/{name}.wav   openface_face/{name}.npy   subtitle_eng.csv   ovlabel.csv
    ```
    """
    return _load(root, labels, labelled, ("subtitle_eng.csv", "sentence"), reasons, "{name}.npy")


def load_folder(root: str | Path, labels: str | Path | None = None, subtitle_encoding: str = "utf-8") -> list[Sample]:
    """Load a folder of clips, in order of name.

    A clip is `{name}.mp4` (or another video), with `{name}.wav` (or another sound), `{name}.npy` (faces) and
    `{name}.txt` (subtitle) if they exist. A picture without a video is a sample too. Suffixes may be in capitals, and
    hidden files are passed over. A clip whose name or subtitle cannot be decoded has a `fault`.

    Args:
        labels: csv `name,openset`; an absolute path, or relative to root. Clips that it does not name have labels None.
        subtitle_encoding: of the .txt files; those with a byte-order mark say their own.

    Raises:
        FileNotFoundError: root or labels is missing.
        InputError: the folder has no clip or two files of one name and kind, or the table is bad or names a clip that
            is missing.
    """
    root = _folder(root)
    videos, sounds = _by_stem(root, VIDEO_SUFFIXES), _by_stem(root, AUDIO_SUFFIXES)
    faces, subtitles = _by_stem(root, (".npy",)), _by_stem(root, (".txt",))
    # a picture with the name of a video is its cover or poster, not another sample
    images = {name: path for name, path in _by_stem(root, IMAGE_SUFFIXES).items() if name not in videos}
    if not videos and not images:
        raise InputError(f"{root}: it holds no clip. A clip is a file that ends in {', '.join(VIDEO_SUFFIXES)}.")
    names = sorted([*videos, *images])  # the order on disk differs between machines, and the split depends on order
    table: dict[str, _Row] = {}
    if labels is not None:
        table = _read_table(root / labels, ("openset",))
        unknown = sorted(set(table) - set(names))
        if unknown:  # refused, as a mistyped name would lose a label without a word
            raise InputError(f"{table[unknown[0]].where}: it labels {unknown[0]!r}, but {root} holds no such clip.")
    samples = []
    for name in names:
        fault, subtitle = _name_fault(name), ""
        if name in subtitles:
            try:
                subtitle = _read_subtitle(subtitles[name], subtitle_encoding)
            except InputError as error:
                fault = fault or str(error)
        row = table.get(name)
        samples.append(
            Sample(
                # bytes that are not UTF-8 are spelled \xe9, so that messages can name the clip
                name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
                videos.get(name),
                sounds.get(name),
                faces.get(name),
                subtitle,
                _labels(row["openset"], row.where) if row else None,
                image=images.get(name),
                fault=fault,
            )
        )
    return samples


def load_jsonl(path: str | Path) -> list[Sample]:
    """Load one JSON object per line: `name`, and any of `video, audio, face, image, subtitle, labels, reason`.

    Paths are absolute, or relative to the jsonl's folder and below it. `labels` is a string, or a list of strings.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: a line is not such an object, or a name appears twice; the message has the line's number.
    """
    path = Path(path)
    known = [field.name for field in fields(Sample) if field.name != "fault"]
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for where, _, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
            raise InputError(f'{where}: an object with a name is needed, such as {{"name": "a", "video": "a.mp4"}}.')
        if unknown := [key for key in row if key not in known]:
            raise InputError(f"{where}: unknown key {unknown[0]!r}. Known are {', '.join(known)}.")
        labels = row.get("labels")
        if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
            if broken := [label for label in labels if "," in label]:
                raise InputError(f"{where}: the label {broken[0]!r} holds a comma. Write it as two labels.")
            # as tables spell a list, so that one parser reads both
            row["labels"] = labels = "[" + ", ".join(labels) + "]"
        for key, value in row.items():
            if value is not None and not isinstance(value, str):
                raise InputError(f"{where}: {key} is {value!r}; a string is needed.")
        _check_name(row["name"], where, seen)
        media = {}
        for key in ("video", "audio", "face", "image"):
            if row.get(key):
                _check_path(row[key], f"{where}: {key}")
            media[key] = path.parent / row[key] if row.get(key) else None
        labels = None if labels is None else _labels(labels, where)
        samples.append(
            Sample(row["name"], **media, subtitle=_text(row.get("subtitle")), labels=labels, reason=row.get("reason"))
        )
    if not samples:
        raise InputError(f"{path}: it holds no sample. Write one JSON object per line.")
    return samples


# --- layouts by name ---------------------------------------------------------------------------------------------


class Layout(Protocol):
    """A registered layout: an instance holds its options."""

    def load(self, root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
        """Read the samples of a label table.

        Args:
            root: `data.root`.
            labels: `data.labels` or `data.test_labels`. Where `data.labels` is not set, it is the class's
                `usual_labels`, and None if it has no such attribute.
            reasons: `data.reasons`, descriptions that think mode learns from.
            labelled: False for prediction, where the table may have names only.
        """


LAYOUTS: Registry[Any] = Registry("dataset layout")
"""Layouts by name; each is a class that keeps `Layout`."""

Loader = TypeVar("Loader", bound=Callable[..., Any])


def register_layout(name: str) -> Callable[[Loader], Loader]:
    """Register the class or function below as the layout of `data.format: name`.

    A class has the method `load` of `Layout`, and becomes a frozen dataclass: its fields are its options. A function
    has no options, and is called like that method.

    Raises:
        InputError: the name is registered already, or a class has no `load` or is a dataclass that is not frozen.
    """

    def decorate(loader: Loader) -> Loader:
        entry: Any = loader
        if not isinstance(loader, type):
            namespace = {"load": staticmethod(loader), "__doc__": loader.__doc__, "__module__": loader.__module__}
            entry = make_dataclass(loader.__name__, [], frozen=True, namespace=namespace)
        elif not callable(getattr(loader, "load", None)):
            raise InputError(f"dataset layout {name!r}: give {loader.__name__} a method load(root, labels, …)")
        elif "__dataclass_fields__" not in vars(loader):  # also where a base has them: this class may add options
            entry = dataclass(frozen=True)(loader)
        elif not loader.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise InputError(f"dataset layout {name!r}: make {loader.__name__} a @dataclass(frozen=True)")
        LAYOUTS.add(name, entry)
        return loader

    return decorate


@register_layout("mer2025")
@dataclass(frozen=True)
class MER2025Layout(ConfigSection, key="data.layout"):
    """The MER2025 dataset, in its published folders."""

    subtitle_language: Literal["english", "chinese"] = "english"
    """Column of the subtitle table."""
    usual_labels: ClassVar[str] = MER_LABELS

    def load(self, root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
        """Load as `load_mer2025`."""
        return load_mer2025(
            root,
            labels or self.usual_labels,
            subtitle_language=self.subtitle_language,
            reasons=reasons,
            labelled=labelled,
        )


@register_layout("mer2026")
@dataclass(frozen=True)
class MER2026Layout(MER2025Layout, key="data.layout"):
    """The MER2026 dataset, with folders and tables as in MER2025."""

    usual_labels: ClassVar[str] = "track2_train_human.csv"


@register_layout("ovmerd_plus")
def _load_ovmerd_plus(root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
    """OV-MERD+ of MER-UniBench."""
    return load_ovmerd_plus(root, labels or "ovlabel.csv", reasons=reasons, labelled=labelled)


@register_layout("folder")
@dataclass(frozen=True)
class FolderLayout(ConfigSection, key="data.layout"):
    """A folder of clips, with a label table if there are labels."""

    subtitle_encoding: str = "utf-8"
    """Encoding of the .txt files, such as gbk; those with a byte-order mark say their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            codecs.lookup(self.subtitle_encoding)
        except LookupError:
            raise InputError(
                f"data.layout.subtitle_encoding is {self.subtitle_encoding!r}: give one that Python knows, such as "
                "utf-8, gbk or cp1252"
            ) from None

    def load(self, root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
        """Load as `load_folder`."""
        _refuse_reasons(reasons, "folder")
        if labelled and labels is None:
            raise InputError(f"data.labels is not set: give the label table of {root}, a csv name,openset")
        if not labelled:  # no table is needed
            return load_folder(root, None, self.subtitle_encoding)
        # the table says which clips are meant: training and test clips may lie in one folder
        samples = load_folder(root, labels, self.subtitle_encoding)
        return [sample for sample in samples if sample.labels is not None]


@register_layout("jsonl")
def _load_jsonl(root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
    """A jsonl that lists clips with their labels; data.root is that file, or the folder of several."""
    _refuse_reasons(reasons, "jsonl")
    if root.is_dir() and labels is None:
        raise InputError(f"data.root is {root}, a folder: give the jsonl itself, or its name in data.labels")
    return load_jsonl(root / labels if root.is_dir() and labels else root.parent / (labels or root.name))


@register_layout("synthetic")
@dataclass(frozen=True)
class SyntheticLayout(ConfigSection, key="data.layout"):
    """The embedded default: clips made from run.seed, and tiny models unless the config names models."""

    clips: tuple[int, int] = (400, 450)
    """Numbers of training and held-out clips."""
    usual_labels: ClassVar[str] = MER_LABELS

    def load(self, root: Path, *, labels: str | None, reasons: str | None, labelled: bool) -> list[Sample]:
        """Load as `load_mer2025`, in whose layout `affectgpt.pipeline.prepare_synthetic` makes the clips."""
        return load_mer2025(root, labels or MER_LABELS, reasons=reasons, labelled=labelled)


# --- tables and files --------------------------------------------------------------------------------------------


def _load(
    root: str | Path,
    labels: str | Path,
    labelled: bool,
    subtitles: tuple[str, str],
    reasons: str | Path | None,
    face_pattern: str,
) -> list[Sample]:
    root = _folder(root)
    rows = _read_table(root / labels, ("openset",) if labelled else ())
    subtitle_file, column = subtitles
    subtitle_rows = _read_table(root / subtitle_file, (column,))
    reason_rows = {} if reasons is None else _read_table(root / reasons, ("reason",))
    # a missing folder is a modality that was not unpacked; a missing file in it is reported when it is read
    has = {folder: (root / folder).is_dir() for folder in ("video", "audio", "openface_face")}
    if not any(has.values()):
        raise FileNotFoundError(f"{root}: none of video, audio, openface_face is there. Unpack the dataset's archives.")

    def path(folder: str, file: str) -> Path | None:
        return root / folder / file if has[folder] else None

    def cell(table: dict[str, _Row], name: str, column: str) -> str:
        return _text(table[name][column]) if name in table else ""

    return [
        Sample(
            name,
            path("video", f"{name}.mp4"),
            path("audio", f"{name}.wav"),
            path("openface_face", face_pattern.format(name=name)),
            cell(subtitle_rows, name, column),
            _labels(row["openset"], row.where) if labelled else None,
            cell(reason_rows, name, "reason") or None,
        )
        for name, row in rows.items()
    ]


class _Row(dict[str, str]):
    """Cells of a table's row by column.

    Attributes:
        where: file and line, as messages begin.
    """

    def __init__(self, where: str, cells: Iterable[tuple[str, str]]):
        super().__init__(cells)
        self.where = where


def _read_table(path: Path, columns: tuple[str, ...]) -> dict[str, _Row]:
    """Read a csv with a `name` column and `columns` as name → row, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no csv in UTF-8, lacks a column, or has a row with too few or too many cells, a quote that
            never closes, or a name that is empty, repeated or a path out of the folder; with the line.
    """
    check_data_file(path, "a csv in UTF-8")
    wanted = ("name", *columns)
    rows: dict[str, _Row] = {}
    seen: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:  # newline="": cells may hold line breaks
        # strict: without it a quote that never closes swallows the rest of the file without a word
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        begin = 1  # line of the row that is being read
        try:
            header = [column.strip() for column in next(reader, [])]
            for column in wanted:
                if header.count(column) != 1:
                    has = ", ".join(header) or "none"
                    problem = f"no column {column}" if column not in header else f"two columns {column}"
                    raise InputError(f"{path}: {problem}. It has {has}; wanted are {', '.join(wanted)}.")
            begin = reader.line_num + 1
            for cells in reader:
                where = f"{path}, line {begin}"
                begin = reader.line_num + 1
                if not cells:
                    continue
                while len(cells) > len(header) and not cells[-1].strip():
                    cells.pop()  # the commas of empty columns, as spreadsheets leave them
                if len(cells) != len(header):
                    raise InputError(
                        f"{where}: {len(cells)} cells, but the header has {len(header)}. Put quotes round a list or a "
                        'text with commas: a,"[happy, sad]".'
                    )
                row = _Row(where, zip(header, cells, strict=True))
                name = row["name"].strip()
                if not name:
                    raise InputError(f"{where}: a row without a name. Fill it in, or remove the row.")
                _check_name(name, where, seen)
                rows[name] = row
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a csv in UTF-8 ({error}). Save it as one.") from error
        except csv.Error as error:
            reason = "its quote never closes" if "end of data" in str(error) else str(error)
            fix = "Put a cell with commas or quotes in quotes, and double the quotes in it"
            raise InputError(f"{path}, line {begin}: {reason}. {fix}.") from error
    return rows


def _check_name(name: str, where: str, seen: dict[str, str]) -> None:
    """Refuse a name that is not unique, that no file can have, or that leads out of the data set's folder."""
    if name in seen:
        raise InputError(
            f"{where}: {name!r} appears twice, first in {seen[name]}. Names are unique; keep one of the two."
        )
    seen[name] = where.rpartition(", ")[2]
    if Path(name).is_absolute():
        raise InputError(f"{where}: the name {name!r} is an absolute path. Names are those of files in the data set.")
    _check_path(name, f"{where}: the name")
    if fault := _name_fault(name):
        raise InputError(f"{where}: {fault}.")


def _check_path(path: str, what: str) -> None:
    """Refuse a path that climbs: what lies above the data set's folder is not part of it."""
    # any `..`, also one that stays inside by its letters: beyond a link it would not
    if ".." in re.split(r"[/\\]", path):
        raise InputError(
            f"{what} {path!r} climbs out of the data set's folder. Write it without '..': an absolute path in a jsonl, "
            "or a link in the folder."
        )
    if "\0" in path:
        raise InputError(f"{what} {path!r} holds a NUL, which no file's name can.")


def _name_fault(name: str) -> str | None:
    """Say why a sample cannot bear a name, which tables, logs and predictions must spell; None if it can."""
    if any(character < " " or character in "\x7f\x85\u2028\u2029" for character in name):
        return f"the name {name!a} holds a line break or another control character: rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the name {name!a} is not UTF-8: rename the file"
    return None


def _read_subtitle(path: Path, encoding: str) -> str:
    """Read a text file; a byte-order mark tells its encoding, otherwise it is `encoding`.

    Raises:
        InputError: it is no regular file, or not in that encoding.
    """
    try:
        check_data_file(path, "a text file")
    except (InputError, OSError) as error:
        if "UTF-16" not in str(error):
            raise InputError(str(error).rstrip(".")) from error
    data = path.read_bytes()
    for mark, marked in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            encoding = marked
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not {encoding} ({error.reason} at byte {error.start}). Save it as UTF-8, or set "
            "data.layout.subtitle_encoding"
        ) from error
    if "\0" in text:  # every second byte of UTF-16 without a mark
        raise InputError(
            f"{path}: it holds NULs, as UTF-16 does. Save it as UTF-8, or set data.layout.subtitle_encoding"
        )
    return text.strip()


def _refuse_reasons(reasons: str | None, layout: str) -> None:
    if reasons is not None:
        where = "write a reason into each line of the jsonl" if layout == "jsonl" else "list the clips in a jsonl"
        raise InputError(f"data.reasons is set, but the layout {layout} has no table of them: {where}")


def _text(value: str | None) -> str:
    """Return a cell's text; some tools write `nan` for a missing cell."""
    text = (value or "").strip()
    return "" if text.lower() == "nan" else text


def _labels(value: str, where: str) -> str:
    """Return a label string as written, or `neutral` if it lists nothing.

    Raises:
        InputError: a bracket opens and does not close, or the other way round: a list was cut at a comma.
    """
    text = _text(value)
    if text.startswith("[") != text.endswith("]"):
        raise InputError(f'{where}: the labels {value!r} are half of a list. Put quotes round it: a,"[happy, sad]".')
    return value if re.sub(r"[\[\]'\",\s]", "", text) else NO_LABEL


def check_emotion_labels(samples: Iterable[Sample], where: str) -> None:
    """Refuse labels that are numbers, as of sentiment data sets: they would be trained as words, and score 0.

    Args:
        where: table or folder that the samples come from.

    Raises:
        InputError: naming the first such sample.
    """
    for sample in samples:
        for label in parse_labels(sample.labels, "strict"):
            try:
                float(label)
            except ValueError:
                continue
            raise InputError(
                f"{where}: sample {sample.name!r} has the label {label!r}, a number and not an emotion. Numbers of "
                "sentiment are for training with reward.names: [sentiment]; give a table of emotion words."
            )


def _by_stem(root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    # hidden files are no clips: macOS keeps a `._a.mp4` beside each file that it copies to a foreign disk
    paths = [path for path in sorted(root.iterdir()) if path.suffix.lower() in suffixes and path.name[0] != "."]
    found: dict[str, Path] = {}
    for path in paths:
        if other := found.get(path.stem):
            raise InputError(
                f"{root}: {path.stem!r} appears twice, as {other.name} and {path.name}. Names are unique; keep one of "
                "the two."
            )
        found[path.stem] = path
    return found


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder. Give the dataset's root.")
    return path
