"""Compile look-up tables from wheels and word lists: word form → cluster index on each wheel at each level."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo_core.errors import InputError

LEVELS = (1, 2)
PUBLISHED_WHEELS = ("wheel1", "wheel2", "wheel3", "wheel4", "wheel5")
MAX_CLUSTERS = 64  # a label set is one uint64 per wheel

Row = tuple[str, str, str]  # a wheel word's path: (level-1 sector, level-2 sector, level-3 word)


class TablesError(InputError):
    """A table file is missing, unreadable or malformed; the message names the file."""


@dataclass(frozen=True)
class Wheel:
    """One wheel: its sectors at both levels in drawing order, and the cluster of each wheel word.

    ``sectors[level - 1]`` are the cluster names; ``cluster[level - 1][word]`` indexes them.
    """

    name: str
    sectors: tuple[tuple[str, ...], tuple[str, ...]]
    cluster: tuple[dict[str, int], dict[str, int]]

    @classmethod
    def from_rows(cls, name: str, rows: Sequence[Row]) -> Wheel:
        """Number the sectors in order of appearance and place each word.

        At level 1 every word belongs to its level-1 sector. At level 2 a level-1 word belongs to the alphabetically
        first of its level-2 sectors, as the metric defines it. A word that appears twice takes its last place.
        """
        sectors1 = tuple(dict.fromkeys(row[0] for row in rows))
        sectors2 = tuple(dict.fromkeys(row[1] for row in rows))
        if max(len(sectors1), len(sectors2)) > MAX_CLUSTERS:
            raise TablesError(f"{name}: more than {MAX_CLUSTERS} sectors on a level")
        level1: dict[str, int] = {}
        level2: dict[str, int] = {}
        for i, outer in enumerate(sectors1):
            inner = dict.fromkeys(row[1] for row in rows if row[0] == outer)
            level1[outer], level2[outer] = i, sectors2.index(min(inner))
            for middle in inner:
                words = [middle, *(row[2] for row in rows if row[:2] == (outer, middle))]
                level1.update(dict.fromkeys(words, i))
                level2.update(dict.fromkeys(words, sectors2.index(middle)))
        return cls(name, (sectors1, sectors2), (level1, level2))


@dataclass(frozen=True)
class Tables:
    """Look-up tables of a score.

    names     the wheels' names, W of them
    sectors   ``sectors[level - 1][wheel]``: cluster names in drawing order
    words     F word forms, lower case
    clusters  int8 [2, W, F]: cluster index of each form at each level, -1 where it is not on the wheel
    base      bool [F]: dictionary words, as opposed to their inflected forms
    """

    names: tuple[str, ...]
    sectors: tuple[tuple[tuple[str, ...], ...], ...]
    words: tuple[str, ...]
    clusters: np.ndarray
    base: np.ndarray
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {word: i for i, word in enumerate(self.words)})


def compile_tables(wheels: Sequence[Wheel], candidates: Mapping[str, Sequence[str]], base: Iterable[str]) -> Tables:
    """Compile tables from each form's candidate wheel words, of which the first that is on a wheel counts."""
    words = tuple(sorted(candidates))
    clusters = np.full((len(LEVELS), len(wheels), len(words)), -1, np.int8)
    for w, wheel in enumerate(wheels):
        for f, word in enumerate(words):
            found = next((c for c in candidates[word] if c in wheel.cluster[0]), None)
            if found is not None:
                clusters[:, w, f] = [wheel.cluster[level - 1][found] for level in LEVELS]
    base = set(base)
    return Tables(
        names=tuple(wheel.name for wheel in wheels),
        sectors=tuple(tuple(wheel.sectors[level - 1] for wheel in wheels) for level in LEVELS),
        words=words,
        clusters=clusters,
        base=np.array([word in base for word in words]),
    )


# --- the project's file -----------------------------------------------------------------------------------------


def save_tables(tables: Tables, path: Path) -> None:
    """Write one .npz of plain arrays (texts as UTF-8 bytes); equal tables give equal arrays."""

    def text(lines: Iterable[str]) -> np.ndarray:
        return np.frombuffer("\n".join(lines).encode(), np.uint8)

    np.savez_compressed(
        path,
        names=text(tables.names),
        sectors_level1=text("\t".join(row) for row in tables.sectors[0]),
        sectors_level2=text("\t".join(row) for row in tables.sectors[1]),
        words=text(tables.words),
        clusters=tables.clusters,
        base=tables.base,
    )


def load_tables(path: Path) -> Tables:
    """Read a file of `save_tables`.

    Raises:
        TablesError: the file, which is named, is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            texts = {
                key: arrays[key].tobytes().decode().split("\n")
                for key in ("names", "sectors_level1", "sectors_level2", "words")
            }
            clusters, base = arrays["clusters"], arrays["base"]
    except FileNotFoundError:
        raise TablesError(f"{path} is missing: build it with `python -m affectgpt.emotion_wheel build`") from None
    except Exception as error:  # zip, key and decoding errors alike mean a damaged file
        raise TablesError(
            f"{path} is damaged ({error}): `python -m affectgpt.emotion_wheel build` remakes it"
        ) from error
    sectors = tuple(tuple(tuple(line.split("\t")) for line in texts[f"sectors_level{level}"]) for level in LEVELS)
    shape = (len(LEVELS), len(texts["names"]), len(texts["words"]))
    if clusters.shape != shape or base.shape != shape[2:]:
        raise TablesError(f"{path} is damaged (clusters {clusters.shape}, expected {shape}): build it again")
    return Tables(tuple(texts["names"]), sectors, tuple(texts["words"]), clusters, base)


# --- a published folder -----------------------------------------------------------------------------------------


def read_published(folder: str | Path) -> Tables:
    """Read tables of a folder like that of MER2025: ``wheel1.xlsx`` … ``5``, ``format.csv``, ``synonym.xlsx``.

    A surface form leads through ``format.csv`` to base words, each of these through the runs of ``synonym.xlsx`` to
    wheel words; of all reached, the alphabetically first that is on a wheel gives the form's cluster.
    """
    folder = Path(folder)
    wheels = [_read_wheel_sheet(folder / f"{name}.xlsx") for name in PUBLISHED_WHEELS]
    forms = _read_forms(folder / "format.csv")
    synonyms = _read_synonyms(folder / "synonym.xlsx")
    bases_of: dict[str, set[str]] = {}
    for name, surface in forms.items():
        for form in (name, *surface):
            bases_of.setdefault(form, set()).add(name)
    candidates = {
        form: sorted(set().union(*(synonyms.get(name, ()) for name in bases))) for form, bases in bases_of.items()
    }
    return compile_tables(wheels, candidates, base=forms)


def _sheet(path: Path) -> list[tuple[str | None, ...]]:
    """Read the first sheet's cells as text, header first, rows as long as the header; blank cells are None."""
    from openpyxl import load_workbook  # only published folders need it

    if not path.is_file():
        raise TablesError(f"{path} is missing: the published folder must hold it")
    try:
        book = load_workbook(path, read_only=True, data_only=True)
        try:
            cells = book.worksheets[0].iter_rows(values_only=True)
            rows = [tuple(str(c).strip() or None if c is not None else None for c in row) for row in cells]
        finally:
            book.close()
    except Exception as error:  # openpyxl raises zip, XML and key errors alike
        raise TablesError(f"{path} is not a readable xlsx file ({error}): fetch it again") from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise TablesError(f"{path} is empty: fetch it again")
    width = len(rows[0])
    return [(*row, *[None] * width)[:width] for row in rows]


def _read_wheel_sheet(path: Path) -> Wheel:
    header, *body = _sheet(path)
    if header[:3] != ("level1", "level2", "level3") or not body:
        raise TablesError(f"{path}: columns level1, level2, level3 expected, found {header}")
    rows: list[Row] = []
    last = ["", "", ""]
    for cells in body:  # a blank cell repeats the one above
        last = [cell.lower() if cell else above for cell, above in zip(cells[:3], last, strict=True)]
        if not all(last):
            raise TablesError(f"{path}: the first row must fill level1, level2 and level3")
        rows.append((last[0], last[1], last[2]))
    return Wheel.from_rows(path.stem, rows)


def _read_forms(path: Path) -> dict[str, list[str]]:
    """format.csv: base word → surface forms."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise TablesError(f"{path} is missing: the published folder must hold it") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TablesError(f"{path} is not a readable csv file ({error}): fetch it again") from error
    if not rows or not {"name", "format"} <= rows[0].keys():
        raise TablesError(f"{path}: columns name, format expected, found {list(rows[0]) if rows else 'no rows'}")
    if any(row["name"] is None or row["format"] is None for row in rows):
        raise TablesError(f"{path}: a row is cut short: fetch it again")
    forms: dict[str, list[str]] = {}
    for row in rows:
        forms.setdefault(row["name"].strip().lower(), []).extend(_items(row["format"]))
    return forms


def _read_synonyms(path: Path) -> dict[str, set[str]]:
    """synonym.xlsx: base word → wheel words, joined over the runs (column pairs word_runK, synonym_runK)."""
    header, *body = _sheet(path)
    pairs = [
        (i, header.index(f"synonym_{name[5:]}"))
        for i, name in enumerate(header)
        if name and name.startswith("word_run") and f"synonym_{name[5:]}" in header
    ]
    if not pairs or not body:
        raise TablesError(f"{path}: column pairs word_run1, synonym_run1, … expected, found {header}")
    wheel_words: dict[str, set[str]] = {}
    for row in body:
        for left, right in pairs:
            if text := row[left]:
                word = text.lower()
                for base in (word, *_items(row[right] or "")):
                    wheel_words.setdefault(base, set()).add(word)
    return wheel_words


def _items(text: str) -> list[str]:
    return [item for item in (part.strip().lower() for part in text.split(",")) if item]
