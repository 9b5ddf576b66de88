"""Read emotion datasets from disk as `Sample`s: MER2025, MER2026, OV-MERD+, a folder of clips, a jsonl, or a plug-in's.

Loading reads tables only. A missing or broken media file is reported and skipped when its features are extracted; a
missing folder or table, or a table without its columns, is an error here.

A layout is a frozen dataclass registered under the name that `data.format` takes: its fields are its options
(`data.layout.…`), its `load` reads the samples. docs/data.md shows how to add one. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from grpo_core.config.fields import ConfigSection
from grpo_core.registry import Registry

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
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
    """

    name: str
    video: Path | None
    audio: Path | None
    face: Path | None
    subtitle: str = ""
    labels: str | None = None
    reason: str | None = None
    image: Path | None = None


def load_mer2025(
    root: str | Path,
    labels: str | Path = "track2_train_ovmerd.csv",
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
        ValueError: a table lacks a column, or has a name twice.
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


def load_folder(root: str | Path, labels: str | Path | None = None) -> list[Sample]:
    """Load a folder of clips, in order of name.

    A clip is `{name}.mp4` (or another video), with `{name}.wav`, `{name}.npy` (faces) and `{name}.txt` (subtitle) if
    they exist. A picture without a video is a sample too.

    Args:
        labels: csv `name,openset`; an absolute path, or relative to root. Clips that it does not name have labels None.

    Raises:
        FileNotFoundError: root or labels is missing.
        ValueError: the folder has no clip or two of one name, or the table is bad or names a clip that is missing.
    """
    root = _folder(root)
    videos = _by_stem(root, VIDEO_SUFFIXES)
    # a picture with the name of a video is its cover or poster, not another sample
    images = {name: path for name, path in _by_stem(root, IMAGE_SUFFIXES).items() if name not in videos}
    if not videos and not images:
        raise ValueError(f"{root}: it holds no clip. A clip is a file that ends in {', '.join(VIDEO_SUFFIXES)}.")
    names = sorted([*videos, *images])  # the order on disk differs between machines, and the split depends on order
    table: dict[str, dict[str, str]] = {}
    if labels is not None:
        table = _read_table(root / labels, ("openset",))
        unknown = sorted(set(table) - set(names))
        if unknown:  # refused, as a mistyped name would lose a label without a word
            raise ValueError(
                f"{root / labels}: it labels {unknown[0]!r}, but {root} holds no such clip. Check the names."
            )

    def beside(name: str, suffix: str) -> Path | None:
        return path if (path := root / f"{name}{suffix}").is_file() else None

    samples = []
    for name in names:
        subtitle = beside(name, ".txt")
        samples.append(
            Sample(
                name,
                videos.get(name),
                beside(name, ".wav"),
                beside(name, ".npy"),
                subtitle.read_text("utf-8-sig").strip() if subtitle else "",
                _labels(table[name]["openset"]) if name in table else None,
                image=images.get(name),
            )
        )
    return samples


def load_jsonl(path: str | Path) -> list[Sample]:
    """Load one JSON object per line: `name`, and any of `video, audio, face, image, subtitle, labels, reason`.

    Paths are relative to the jsonl. `labels` is a string, or a list of strings.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line is not such an object, or a name appears twice; the message has the line's number.
    """
    path = _file(path)
    known = [field.name for field in fields(Sample)]
    samples: list[Sample] = []
    # utf-8-sig: editors on Windows put a byte-order mark first, which would become part of the first key
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}). Write one object per line.") from error
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
            raise ValueError(f'{where}: an object with a name is needed, such as {{"name": "a", "video": "a.mp4"}}.')
        if unknown := [key for key in row if key not in known]:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}. Known are {', '.join(known)}.")
        labels = row.get("labels")
        if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
            # as tables spell a list, so that one parser reads both
            row["labels"] = labels = "[" + ", ".join(labels) + "]"
        for key, value in row.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: {key} is {value!r}; a string is needed.")
        media = {key: path.parent / row[key] if row.get(key) else None for key in ("video", "audio", "face", "image")}
        labels = None if labels is None else _labels(labels)
        samples.append(
            Sample(row["name"], **media, subtitle=_text(row.get("subtitle")), labels=labels, reason=row.get("reason"))
        )
    _unique((sample.name for sample in samples), path)
    return samples


# --- layouts by name ---------------------------------------------------------------------------------------------


class Layout(Protocol):
    """A registered layout: an instance holds its options."""

    def load(self, root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
        """Read the samples of a label table.

        Args:
            root: `data.root`.
            labels: `data.labels` or `data.test_labels`; a layout without tables ignores it.
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
        ValueError: the name is registered already, or a class has no `load` or is a dataclass that is not frozen.
    """

    def decorate(loader: Loader) -> Loader:
        entry: Any = loader
        if not isinstance(loader, type):
            namespace = {"load": staticmethod(loader), "__doc__": loader.__doc__, "__module__": loader.__module__}
            entry = make_dataclass(loader.__name__, [], frozen=True, namespace=namespace)
        elif not callable(getattr(loader, "load", None)):
            raise ValueError(f"dataset layout {name!r}: give {loader.__name__} a method load(root, labels, …)")
        elif "__dataclass_fields__" not in vars(loader):  # also where a base has them: this class may add options
            entry = dataclass(frozen=True)(loader)
        elif not loader.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise ValueError(f"dataset layout {name!r}: make {loader.__name__} a @dataclass(frozen=True)")
        LAYOUTS.add(name, entry)
        return loader

    return decorate


@register_layout("mer2025")
@dataclass(frozen=True)
class MER2025Layout(ConfigSection, key="data.layout"):
    """The MER2025 dataset, in its published folders."""

    subtitle_language: Literal["english", "chinese"] = "english"
    """Column of the subtitle table."""

    def load(self, root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
        """Load as `load_mer2025`."""
        return load_mer2025(root, labels, subtitle_language=self.subtitle_language, reasons=reasons, labelled=labelled)


@register_layout("mer2026")
@dataclass(frozen=True)
class MER2026Layout(MER2025Layout, key="data.layout"):
    """The MER2026 dataset, with folders and tables as in MER2025."""


@register_layout("ovmerd_plus")
def _load_ovmerd_plus(root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
    """OV-MERD+ of MER-UniBench."""
    return load_ovmerd_plus(root, labels, reasons=reasons, labelled=labelled)


@register_layout("folder")
def _load_folder(root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
    """A folder of clips, with a label table if there are labels."""
    # without labels no table is needed; `data.labels` still has its default, which is not there
    return load_folder(root, labels if labelled else None)


@register_layout("jsonl")
def _load_jsonl(root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
    """A jsonl that lists clips with their labels; data.root is the file, and no tables are read."""
    return load_jsonl(root)


@register_layout("synthetic")
@dataclass(frozen=True)
class SyntheticLayout(ConfigSection, key="data.layout"):
    """The embedded default: clips made from run.seed, and tiny models unless the config names models."""

    clips: tuple[int, int] = (400, 450)
    """Numbers of training and held-out clips."""

    def load(self, root: Path, *, labels: str, reasons: str | None, labelled: bool) -> list[Sample]:
        """Load as `load_mer2025`, in whose layout `affectgpt.pipeline.prepare_synthetic` makes the clips."""
        return load_mer2025(root, labels, reasons=reasons, labelled=labelled)


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

    return [
        Sample(
            name,
            path("video", f"{name}.mp4"),
            path("audio", f"{name}.wav"),
            path("openface_face", face_pattern.format(name=name)),
            _text(subtitle_rows.get(name, {}).get(column)),
            _labels(row["openset"]) if labelled else None,
            _text(reason_rows.get(name, {}).get("reason")) or None,
        )
        for name, row in rows.items()
    ]


def _read_table(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Read a csv with a `name` column and `columns` as name → row, in the file's order."""
    path = _file(path)
    wanted = ("name", *columns)
    with path.open(encoding="utf-8-sig", newline="") as file:  # newline="": cells may hold line breaks
        try:
            reader = csv.DictReader(file)
            found = [column.strip() for column in reader.fieldnames or []]
            if missing := [column for column in wanted if column not in found]:
                has = ", ".join(found) or "none"
                raise ValueError(
                    f"{path}: no column {', '.join(missing)}. It has {has}; wanted are {', '.join(wanted)}."
                )
            reader.fieldnames = found
            # `or ""`: the cells that a short row lacks are None
            rows = [{column: row[column] or "" for column in wanted} for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a csv in UTF-8 ({error}). Save it as one.") from error
    for row in rows:
        row["name"] = row["name"].strip()
        if not row["name"]:
            raise ValueError(f"{path}: a row without a name, {row}. Fill it in, or remove the row.")
    _unique((row["name"] for row in rows), path)
    return {row["name"]: row for row in rows}


def _unique(names: Iterable[str], path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path}: {name!r} appears twice. Names are unique; keep one of the two.")
        seen.add(name)


def _text(value: str | None) -> str:
    """Return a cell's text; some tools write `nan` for a missing cell."""
    text = (value or "").strip()
    return "" if text.lower() == "nan" else text


def _labels(value: str) -> str:
    """Return a label string as written, or `neutral` if it lists nothing."""
    return value if re.sub(r"[\[\]'\",\s]", "", _text(value)) else NO_LABEL


def _by_stem(root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    paths = [path for path in sorted(root.iterdir()) if path.suffix.lower() in suffixes]
    _unique((path.stem for path in paths), root)
    return {path.stem: path for path in paths}


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder. Give the dataset's root.")
    return path


def _file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check its name and the dataset's root.")
    return path
