"""Extract the frozen encoders' features of each sample once, and cache them on disk as safetensors shards.

```
cache_dir/digests.jsonl              content digests of media files, so that an unchanged file is not read again
cache_dir/{fingerprint}/*.safetensors   features under keys made of content, modality and extraction settings
```

A shard appears atomically and under a unique name: a run that is killed anywhere continues after its last shard, and
several processes may fill one cache. A shard that does not match its checksum is removed and computed again, and what a
killed run left half written is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from affectgpt.data.datasets import Sample
from affectgpt.data.media import (
    FRAME_SIZE,
    NUM_STEPS,
    SAMPLE_RATE,
    ChannelOrder,
    MediaError,
    TruncatedError,
    check_regular,
    read_audio,
    read_faces,
    read_frames,
    read_image,
)
from grpo_core.data import read_jsonl, report_skipped
from grpo_core.distributed import Distributed, gather_objects
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from affectgpt.modeling.encoders import Encoders

logger = logging.getLogger(__name__)

MODALITIES = ("frame", "face", "audio", "image")
RULES = 2  # raise it when media.py reads files differently, so that features of the old rules are not used


class FeatureStore(Mapping[str, dict[str, Tensor]]):
    """Sample name → `{"frame": [8, Dv], "face": [8, Dv], "audio": [8, Da], "image": [1, Dv]}`, float32 on the CPU.

    A modality that the sample lacks, or that was not asked for, is absent. Tensors are read from memory-mapped shards
    at each access, so processes on one machine share their memory, and a large set need not fit into it.

    Attributes:
        skipped: reason by name of the samples left out.
    """

    def __init__(self, keys: dict[str, dict[str, str]], shards: dict[str, Path], skipped: dict[str, str]) -> None:
        self._keys, self._shards, self.skipped = keys, shards, skipped
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name in self.skipped:
            raise KeyError(f"sample {name!r} was skipped: {self.skipped[name]}")
        return {modality: self._read(key) for modality, key in self._keys[name].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _read(self, key: str) -> Tensor:
        path = self._shards[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return (
            self._open[path].get_tensor(key).clone()
        )  # a copy: the tensor would otherwise be a view of the memory map


class _Unit(NamedTuple):
    """A file to encode as one modality; samples with the same file share it."""

    key: str
    modality: str
    path: Path
    keep_truncated: bool

    @property
    def truncated_key(self) -> str:
        """Key of the features of a file whose end is missing: a run that skips such files must not find them."""
        return f"{self.key}-truncated"


class _Decoded(NamedTuple):
    """A file as arrays `[rows, …]`, and the key of its features."""

    key: str
    arrays: np.ndarray


def extract_features(
    samples: Sequence[Sample],
    encoders: Encoders | None,
    cache_dir: str | Path,
    modalities: Sequence[str] = ("frame", "face", "audio"),
    progress: bool = True,
    *,
    face_channel_order: ChannelOrder = "rgb",
    truncated: Literal["skip", "keep"] = "skip",
    dist: Distributed | None = None,
    threads: int = 2,
    batch: int = 16,
    shard_size: int = 256,
) -> FeatureStore:
    """Read the features of all samples from the cache, encoding those that it lacks.

    A sample with a `fault`, or with a file that cannot be read, is left out as a whole: reported once, with the reason,
    and listed in `skipped`. A modality whose path is None is merely absent.

    Args:
        encoders: None if everything is cached already, in a cache of one pair of encoders.
        modalities: any of `frame, face, audio, image`.
        face_channel_order: order of the channels in the face files, see `read_faces`.
        truncated: what becomes of files whose end is missing: `skip` takes them for unreadable, `keep` uses what is
            there and reports them.
        dist: every rank calls this with the same samples; each encodes its share, and all return the same store. With
            None, this process encodes everything without any collective.
        threads: files decoded concurrently.
        batch: files encoded together.
        shard_size: features written together, and the most that are lost when the run is killed.

    Raises:
        InputError: no sample is readable, a name appears twice, a modality is unknown, encoders are needed but None, or
            a feature is not finite.
    """
    if unknown := sorted(set(modalities) - set(MODALITIES)):
        raise InputError(f"unknown modality {unknown[0]!r}: choose among {', '.join(MODALITIES)}")
    if len({sample.name for sample in samples}) < len(samples):
        raise InputError("two samples have the same name; rename one, names are the keys of the features")
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / encoders.fingerprint if encoders else _only_folder(cache_dir)
    dist = dist or Distributed()
    _clean(folder)
    mine = slice(dist.rank, None, dist.world_size)

    # file of each modality by sample; then every file once, in an order that is the same on all ranks
    faults = {sample.name: sample.fault for sample in samples if sample.fault is not None}
    sources = {
        sample.name: {m: path for m in modalities if (path := _source(sample, m))}
        for sample in samples
        if sample.name not in faults
    }
    paths = list(dict.fromkeys(path for files in sources.values() for path in files.values()))
    digests, unreadable = (_merge(found, dist) for found in _digest_files(paths[mine], cache_dir, threads))
    needed = {
        name: [
            _Unit(_key(m, digests[path], face_channel_order), m, Path(path), truncated == "keep")
            for m, path in files.items()
        ]
        for name, files in sources.items()
        if unreadable.keys().isdisjoint(files.values())
    }
    # by key, which is by content: copies of a file are encoded once
    units = list({unit.key: unit for some in needed.values() for unit in some}.values())

    # each rank encodes its share; then every rank encodes what it cannot see of the others' (a file system may show
    # new files late, or not be shared)
    found: dict[str, Path] = {}
    broken: dict[str, str] = {}
    for share in [units[mine], units] if dist.world_size > 1 else [units]:
        found |= _find(folder, _wanted(share) - found.keys())
        missing = [unit for unit in share if _found_key(unit, found) is None and unit.key not in broken]
        decoded = _decode_ahead(missing, face_channel_order, threads, 2 * batch)
        quiet = not (progress and missing and dist.main_process)
        with tqdm(total=len(missing), desc="features", unit="file", disable=quiet) as bar:
            # merged in both rounds, whether or not anything is missing here: every rank makes the same collectives
            broken |= _merge(_encode(decoded, encoders, folder, batch, shard_size, bar), dist)

    skipped = dict(faults)
    for name, files in sources.items():
        reasons = [unreadable[path] for path in files.values() if path in unreadable]
        reasons += [broken[unit.key] for unit in needed.get(name, []) if unit.key in broken]
        if reasons:
            skipped[name] = reasons[0]
    if dist.main_process:
        report_skipped(skipped, len(samples), "samples")
    if skipped and len(skipped) == len(samples):  # more likely a wrong root than a broken dataset
        raise InputError(f"none of the {len(samples)} samples is readable. The first: {next(iter(skipped.values()))}")
    found |= _find(folder, _wanted(units) - found.keys())
    keys = {
        name: {unit.modality: _found_key(unit, found) or unit.key for unit in some}
        for name, some in needed.items()
        if name not in skipped
    }
    if dist.main_process:
        for name, some in needed.items():
            if cut := [unit.path for unit in some if keys.get(name, {}).get(unit.modality) == unit.truncated_key]:
                logger.warning("kept %s, though the end of %s is missing", name, cut[0])
    return FeatureStore(keys, found, skipped)


def _wanted(units: Iterable[_Unit]) -> set[str]:
    """List the keys under which the features of files may be in the cache."""
    return {key for unit in units for key in (unit.key, *((unit.truncated_key,) if unit.keep_truncated else ()))}


def _found_key(unit: _Unit, found: Mapping[str, Path]) -> str | None:
    return next((key for key in (unit.key, unit.truncated_key) if key in found), None)


def lacking(sample: Sample, modalities: Iterable[str]) -> list[str]:
    """List the modalities that a sample has no file for."""
    return [modality for modality in modalities if _source(sample, modality) is None]


def _source(sample: Sample, modality: str) -> str | None:
    """Return the file from which a modality is read."""
    sources = {"frame": sample.video, "face": sample.face, "audio": sample.audio or sample.video, "image": sample.image}
    return str(sources[modality]) if sources[modality] else None


def _key(modality: str, digest: str, face_channel_order: str) -> str:
    # everything that changes the arrays that media.py reads; what the encoders do is in their fingerprint
    settings = {
        "frame": f"{NUM_STEPS}x{FRAME_SIZE}",
        "face": f"{NUM_STEPS}x{FRAME_SIZE} {face_channel_order}",
        "audio": f"{NUM_STEPS}x2s {SAMPLE_RATE}",
        "image": f"{FRAME_SIZE}",
    }[modality]
    return hashlib.sha256(f"{RULES} {modality} {settings} {digest}".encode()).hexdigest()[:32]


def _only_folder(cache_dir: Path) -> Path:
    folders = [path for path in cache_dir.iterdir() if path.is_dir()]
    if len(folders) != 1:
        raise InputError(f"{cache_dir}: it holds the features of {len(folders)} encoders; pass encoders to choose one")
    return folders[0]


def _merge(mine: dict[str, str], dist: Distributed) -> dict[str, str]:
    """Merge the dictionaries of all ranks."""
    return {key: value for one in gather_objects(mine, dist) for key, value in one.items()}


def _digest_files(paths: list[str], cache_dir: Path, threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Compute the content digests of files, and the reasons why others cannot be read, both by path.

    A file whose path, size and time of change are in `digests.jsonl` is not read again.
    """
    ledger_file = cache_dir / "digests.jsonl"
    ledger: dict[tuple[str, int, int], str] = {}
    if ledger_file.is_file():
        for _, _, entry in read_jsonl(ledger_file, broken=[]):  # a crash may have cut a line
            if isinstance(entry, list) and len(entry) == 4:
                path, size, mtime, content = entry
                ledger[path, size, mtime] = content

    def digest(path: str) -> tuple[tuple[str, int, int] | None, str]:
        try:
            check_regular(path)
            stat = os.stat(path)
            entry = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
            if entry in ledger:
                return None, ledger[entry]
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            fix = "Check the dataset's root and that its archives are unpacked"
            raise MediaError(path, error.strerror or "unreadable", fix) from error
        # a file changed in the last two seconds is not recorded: it may change again under the same time, since clocks
        # of file systems are coarse (FAT's ticks every two seconds)
        return (entry if time.time_ns() - stat.st_mtime_ns > 2_000_000_000 else None), content

    digests, unreadable, news = {}, {}, []
    # threads: hashing releases the interpreter's lock
    with ThreadPoolExecutor(threads) as pool:
        for path, future in [(path, pool.submit(digest, path)) for path in paths]:
            try:
                entry, digests[path] = future.result()
                if entry:
                    news.append(json.dumps([*entry, digests[path]]) + "\n")
            except MediaError as error:
                unreadable[path] = str(error)
    if news:
        with ledger_file.open("a", encoding="utf-8") as file:
            file.write("".join(news))  # appended, as other ranks do: a line that gets torn is skipped when read
    return digests, unreadable


def _decode(unit: _Unit, face_channel_order: ChannelOrder) -> _Decoded:
    if unit.modality == "face":
        return _Decoded(unit.key, read_faces(unit.path, face_channel_order))
    if unit.modality == "image":
        return _Decoded(unit.key, read_image(unit.path))
    read: Callable[..., np.ndarray] = read_frames if unit.modality == "frame" else read_audio
    try:
        return _Decoded(unit.key, read(unit.path))
    except TruncatedError:
        if not unit.keep_truncated:
            raise
        return _Decoded(unit.truncated_key, read(unit.path, truncated=True))


def _decode_ahead(
    units: Iterable[_Unit], face_channel_order: ChannelOrder, threads: int, ahead: int
) -> Iterator[tuple[_Unit, _Decoded | MediaError]]:
    """Decode in order, in threads, at most `ahead` files before they are taken."""

    def result(future: Future[_Decoded]) -> _Decoded | MediaError:
        try:
            return future.result()
        except MediaError as error:
            return error

    waiting: deque[tuple[_Unit, Future[_Decoded]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for unit in units:
            waiting.append((unit, pool.submit(_decode, unit, face_channel_order)))
            if len(waiting) == ahead:
                unit, future = waiting.popleft()
                yield unit, result(future)
        for unit, future in waiting:
            yield unit, result(future)
    finally:
        pool.shutdown(cancel_futures=True)  # also when the consumer stops early: an error must not decode the rest


def _encode(
    decoded: Iterator[tuple[_Unit, _Decoded | MediaError]],
    encoders: Encoders | None,
    folder: Path,
    batch: int,
    shard_size: int,
    bar: tqdm,
) -> dict[str, str]:
    """Encode files and write shards; return the reason by key of the files that could not be read."""
    broken: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    try:
        while group := list(islice(decoded, batch)):
            broken |= {unit.key: str(result) for unit, result in group if isinstance(result, MediaError)}
            files = [(unit, result) for unit, result in group if not isinstance(result, MediaError)]
            if files and encoders is None:
                path = files[0][0].path
                raise InputError(f"{path}: its features are not in {folder}; pass encoders to compute them")
            # frames, faces and images go through one encoder, so they share its batches
            for is_audio in (False, True):
                some = [(unit, result) for unit, result in files if (unit.modality == "audio") == is_audio]
                if some:
                    assert encoders is not None  # for the type checker: refused above
                    encode = encoders.encode_audio if is_audio else encoders.encode_frames
                    rows = encode(np.concatenate([result.arrays for _, result in some]))
                    # before they are written: a cached NaN would come back in every run
                    if not torch.isfinite(rows).all():
                        names = ", ".join(str(unit.path) for unit, _ in some)
                        raise InputError(f"NaN or infinite features among those of {names}; load encoders in float32")
                    features = rows.split([len(result.arrays) for _, result in some])
                    for (_, result), feature in zip(some, features, strict=True):
                        shard[result.key] = feature.clone()  # safetensors refuses tensors that share memory
            if len(shard) >= shard_size:
                _write(folder, shard)
                shard = {}
            bar.update(len(group))
    finally:  # keep what was encoded before an error or an interrupt
        if shard:
            _write(folder, shard)
    return broken


def _write(folder: Path, shard: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    # its writer's name is in it, for `_clean`
    unfinished = folder / f"{name}.{socket.gethostname()}.{os.getpid()}.unfinished"
    save_file(shard, unfinished, metadata={"crc32": _checksum(shard)})
    # no fsync: what a power cut spoils fails its checksum, and is computed again
    os.replace(unfinished, folder / f"{name}.safetensors")


def _clean(folder: Path) -> None:
    """Remove the unfinished shards of builds that were killed.

    One of a process that still runs on this machine is left alone, and so is one younger than a day whose process is
    elsewhere or unknown: a shard is written within seconds, but clocks of machines that share a folder may differ.
    """
    for path in folder.glob("*.unfinished"):
        host, _, pid = path.stem.partition(".")[2].rpartition(".")  # a host's name may have dots
        try:
            if host == socket.gethostname() and pid.isdigit():
                killed = not _runs(int(pid))
            else:
                killed = time.time() - path.stat().st_mtime > 24 * 3600
            if killed:
                path.unlink()
                logger.info("%s: removed, a build that was killed had left it", path)
        except OSError:  # another process has removed it, or may alone
            continue


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _checksum(shard: Mapping[str, Tensor]) -> str:
    crc = 0
    for key in sorted(shard):  # a file lists its tensors in another order than the dict that was saved
        crc = zlib.crc32(shard[key].contiguous().numpy().data, zlib.crc32(key.encode(), crc))
    return f"{crc:08x}"


def _find(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Find the shard of each wanted key. Shards that are used are checked; a broken one is removed with a warning."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                keys = list(shard.keys())
                if wanted.isdisjoint(keys):  # not read: a checksum reads the whole shard
                    continue
                checksum = (shard.metadata() or {}).get("crc32")
                if checksum != _checksum({key: shard.get_tensor(key) for key in keys}):
                    raise SafetensorError("checksum does not match")
        except FileNotFoundError:  # removed by another process just now
            continue
        except SafetensorError as error:
            logger.warning("%s: broken cache shard (%s); its features are computed again", path, error)
            path.unlink(missing_ok=True)
            continue
        found.update((key, path) for key in keys if key in wanted)
    return found
