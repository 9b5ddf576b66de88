"""Read the records that users and runs write, and find those that cannot be trained on, before work begins.

Everything that reads JSON lines does so here: training data, which must be whole, and logs of a run, which a kill may
have cut. Records that cannot be used are named and counted; few of them cost only themselves, many the run. Nothing
here imports torch or NumPy.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo_core import families
from grpo_core.errors import InputError

logger = logging.getLogger(__name__)

# first bytes of what is no text, and what it is
_OTHER_FORMATS = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip or Excel file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A value read from a file, and its place there."""

    where: str
    """File and line, as messages begin."""
    line: int
    """Number of the line, from 1; blank lines count."""
    value: Any


def check_data_file(path: Path, wanted: str) -> None:
    """Refuse what is no regular file, or no text by its first bytes.

    Args:
        path: links are followed.
        wanted: what it should be, as the message ends.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is a folder, a pipe, a device, or a file of another format.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file. Check its name and folder.") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever, and a second read would find it empty
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{path}: {kind}, not a file. Give {wanted}.")
    with path.open("rb") as file:
        head = file.read(8)
    for first_bytes, kind in _OTHER_FORMATS.items():
        if head.startswith(first_bytes):
            raise InputError(f"{path}: {kind}. Convert it to {wanted}.")


def read_jsonl(path: str | Path, broken: list[int] | None = None) -> Iterator[Record]:
    """Read the JSON value of each line, in order.

    A line ends with a line feed and nothing else, as JSON allows U+2028, U+0085 and their like inside a string. A
    byte-order mark and blank lines are passed over.

    Args:
        path: a text file in UTF-8.
        broken: for logs: the numbers of lines that cannot be read are appended to it, and the others are given. The
            last line is left out without a number where a kill has cut it. None refuses the file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is no text, or a line is not JSON, not UTF-8, names a key twice, or holds half of a
            character; without `broken`.
    """
    path = Path(path)
    check_data_file(path, "a text file in UTF-8 with one JSON object per line")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # bytes: text would be split at other characters too
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield Record(where, number, _parse(text, where, strict=broken is None))
            except ValueError:
                if broken is None:
                    raise
                if line.endswith(b"\n"):
                    broken.append(number)


def _parse(text: bytes, where: str, strict: bool) -> Any:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_repeats if strict else None)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        fix = "Write one object per line"
        if text.startswith(b"[") and not text.rstrip().endswith(b"]"):
            fix = "It may be one list over several lines; write one object per line, without brackets and commas"
        raise InputError(f"{where}: not JSON ({error}). {fix}.") from error
    except _RepeatedKeyError as error:
        raise InputError(f"{where}: the key {error.args[0]!r} appears twice. Keep one of the two.") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply. Write a flat object.") from error
    # JSON can spell half of a character as \ud83d, which is in no text: tokenizers refuse it, and so does UTF-8
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            if strict:
                half = error.object[error.start]
                raise InputError(f"{where}: it holds half of a character ({half!a}). Remove it.") from error
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


class _RepeatedKeyError(Exception):
    """An object has a key twice, of which Python's parser would keep the last."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


# --- records that cannot be used -------------------------------------------------------------------------------------


class LengthLimit(NamedTuple):
    """The longest sequence that a model takes, and why."""

    key: str
    """Key of the model's config."""
    tokens: int

    def fault(self, prompt_tokens: int, answer_tokens: int, answer: str) -> str | None:
        """Say that a prompt and its answer are too long together; None if they fit.

        Args:
            answer: what the answer's tokens are, such as `rollout.max_new_tokens`.
        """
        if prompt_tokens + answer_tokens <= self.tokens:
            return None
        return (
            f"its prompt has {prompt_tokens} tokens, which with {answer_tokens} of {answer} is more than the model's "
            f"config.{self.key} {self.tokens}; shorten it"
        )


def longest_sequence(config: Any) -> LengthLimit | None:
    """Find the longest sequence, prompt and answer, that a model is made for; None if its config names none.

    Args:
        config: a transformers `PretrainedConfig`, of a language model or of one with other parts.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = []
    for key in ("max_position_embeddings", "n_positions"):
        if (tokens := getattr(config, key, None)) is not None:
            limits.append(LengthLimit(key, tokens))
    # a window, or a length from which rotations change for all tokens of a pack
    if (threshold := families.length_limit(config)) is not None:
        limits.append(LengthLimit(threshold.key.removeprefix("config."), threshold.tokens))
    return min(limits, key=lambda limit: limit.tokens, default=None)


def refuse_too_long(sizes: Iterable[tuple[str, int, int]], config: Any, answer: str) -> None:
    """Refuse data with a prompt that is too long for the model, naming the first and counting them.

    Training would stop in the step that draws it, or go on beyond the model's positions.

    Args:
        sizes: (id, prompt tokens, answer tokens) of each prompt.
        config: the model's.
        answer: what the answer's tokens are.

    Raises:
        InputError: one or more are too long.
    """
    limit = longest_sequence(config)
    if limit is None:
        return
    faults = [(name, fault) for name, asked, said in sizes if (fault := limit.fault(asked, said, answer))]
    if faults:
        name, fault = faults[0]
        more = f" ({len(faults) - 1} more are too long as well)" if len(faults) > 1 else ""
        raise InputError(f"prompt {name!r}: {fault}, or leave it out{more}")


def report_skipped(skipped: Mapping[str, str], total: int, what: str) -> None:
    """Warn of records that are left out: each with its reason, and how many of `total` they are.

    Args:
        skipped: reason by the record's name, or by its file and line.
        what: what the records are, in the plural.
    """
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
    if skipped:
        logger.warning("skipped %d of %d %s", len(skipped), total, what)


def check_coverage(skipped: Mapping[str, str], total: int, least: float, *, what: str, key: str) -> None:
    """Refuse data of which too little can be used.

    Args:
        skipped: reason by name of the records that cannot.
        total: number of records, with those.
        least: the share that must be usable, 0 to 1.
        what: what the records are, in the plural.
        key: option that holds `least`.

    Raises:
        InputError: nothing can be used, or less than `least`.
    """
    if not skipped:
        return
    name, reason = next(iter(skipped.items()))
    first = f"{name}: {reason.rstrip('.')}"
    usable = total - len(skipped)
    if not usable:
        raise InputError(f"none of the {total:,} {what} can be used. The first, {first}.")
    if usable < least * total:
        raise InputError(
            f"only {usable:,} of {total:,} {what} can be used, and {key} is {least:g}: mend them, or lower {key}. "
            f"The first, {first}."
        )
