"""What the frozen encoders say of each sample, computed once and kept on disk as safetensors shards.

```
cache_dir/digests.jsonl              content digests of media files, so that an unchanged file is not read again
cache_dir/{fingerprint}/*.safetensors   features under keys made of content, modality and extraction settings
```

A shard appears whole or not at all, under a name of its own: a run may be killed anywhere and goes on from the last
shard, and several processes may fill one cache. A shard that does not match its checksum is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    read_audio,
    read_faces,
    read_frames,
    read_image,
)
from grpo_core.distributed import Distributed, gather_objects

if TYPE_CHECKING:
    from affectgpt.modeling.encoders import Encoders

logger = logging.getLogger(__name__)

MODALITIES = ("frame", "face", "audio", "image")
RULES = 1  # raise when media.py comes to read a file differently, so that old features are not taken for new ones


class FeatureStore(Mapping[str, dict[str, Tensor]]):
    """Sample name → `{"frame": [8, Dv], "face": [8, Dv], "audio": [8, Da], "image": [1, Dv]}`, float32 on the CPU.

    A modality that the sample has not, or that was not asked for, is absent. Tensors are read from the memory-mapped
    shards at each access, so processes on one machine share them, and a large set takes no memory of its own.

    Attributes:
        skipped: names of samples left out → why.
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
        return self._open[path].get_tensor(key).clone()


class _Unit(NamedTuple):
    """One thing to encode: a file, read as a modality. Samples that share a file share it."""

    key: str
    modality: str
    path: Path


def extract_features(
    samples: Sequence[Sample],
    encoders: Encoders | None,
    cache_dir: str | Path,
    modalities: Sequence[str] = ("frame", "face", "audio"),
    progress: bool = True,
    *,
    face_channel_order: ChannelOrder = "rgb",
    dist: Distributed | None = None,
    threads: int = 2,
    batch: int = 16,
    shard_size: int = 256,
) -> FeatureStore:
    """Features of all samples, from the cache where they are in it.

    A sample with a file that cannot be read is left out as a whole: reported once, with the reason, and counted in
    `skipped`. A modality whose path is None is merely absent.

    Args:
        encoders: None when all is cached already (the cache then holds the features of one pair of encoders).
        modalities: which of `frame, face, audio, image`.
        face_channel_order: order of the channels in the face files, see `read_faces`.
        dist: every rank calls this with the same samples; each encodes its share, and all return the same store. None:
            this process encodes everything and talks to no other.
        threads: files decoded at a time.
        batch: files encoded together.
        shard_size: features written together; so many are lost at most when the run is killed.

    Raises:
        ValueError: not one sample is readable; a name twice; an unknown modality; encoders needed but None; non-finite
            features.
    """
    if unknown := sorted(set(modalities) - set(MODALITIES)):
        raise ValueError(f"no modality {unknown[0]!r}; there are {', '.join(MODALITIES)}")
    if len({sample.name for sample in samples}) < len(samples):
        raise ValueError("two samples have the same name; rename one, names are the keys of the features")
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / encoders.fingerprint if encoders else _only_folder(cache_dir)
    dist = dist or Distributed()
    mine = slice(dist.rank, None, dist.world_size)

    sources = {sample.name: {m: path for m in modalities if (path := _source(sample, m))} for sample in samples}
    paths = list(dict.fromkeys(path for parts in sources.values() for path in parts.values()))
    digests, unreadable = (_merge(part, dist) for part in _digest_files(paths[mine], cache_dir, threads))
    needed = {
        name: [_Unit(_key(m, digests[path], face_channel_order), m, Path(path)) for m, path in parts.items()]
        for name, parts in sources.items()
        if unreadable.keys().isdisjoint(parts.values())
    }
    units = list({unit.key: unit for some in needed.values() for unit in some}.values())

    # encode what is not there; then once more over what other ranks should have written but cannot be seen (yet)
    found: dict[str, Path] = {}
    broken: dict[str, str] = {}
    for share in [units[mine], units] if dist.world_size > 1 else [units]:
        found |= _find(folder, {unit.key for unit in share} - found.keys())
        missing = [unit for unit in share if unit.key not in found and unit.key not in broken]
        decoded = _decode_ahead(missing, face_channel_order, threads, 2 * batch)
        quiet = not (progress and missing and dist.main_process)
        with tqdm(total=len(missing), desc="features", unit="file", disable=quiet) as bar:
            broken |= _merge(_encode(decoded, encoders, folder, batch, shard_size, bar), dist)

    skipped: dict[str, str] = {}
    for name, parts in sources.items():
        reasons = [unreadable[path] for path in parts.values() if path in unreadable]
        reasons += [broken[unit.key] for unit in needed.get(name, []) if unit.key in broken]
        if reasons:
            skipped[name] = reasons[0]
    if skipped and dist.main_process:
        for name, reason in skipped.items():
            logger.warning("skipped %s: %s", name, reason)
        logger.warning("skipped %d of %d samples", len(skipped), len(samples))
    if skipped and len(skipped) == len(samples):
        raise ValueError(f"none of the {len(samples)} samples is readable. The first: {next(iter(skipped.values()))}")
    found |= _find(folder, {unit.key for unit in units} - found.keys())
    keys = {name: {unit.modality: unit.key for unit in some} for name, some in needed.items() if name not in skipped}
    return FeatureStore(keys, found, skipped)


def _source(sample: Sample, modality: str) -> str | None:
    """The file a modality is read from."""
    sources = {"frame": sample.video, "face": sample.face, "audio": sample.audio or sample.video, "image": sample.image}
    return str(sources[modality]) if sources[modality] else None


def _key(modality: str, digest: str, face_channel_order: str) -> str:
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
        raise ValueError(f"{cache_dir}: it holds the features of {len(folders)} encoders; pass encoders to say which")
    return folders[0]


def _merge(mine: dict[str, str], dist: Distributed) -> dict[str, str]:
    """The dictionaries of all ranks as one."""
    return {key: value for part in gather_objects(mine, dist) for key, value in part.items()}


def _digest_files(paths: list[str], cache_dir: Path, threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Content digests of `paths`, and why the others cannot be read.

    A file whose path, size and time of change are in `digests.jsonl` is not read. One changed in the last two seconds
    is never noted there: a clock tick later it might hold something else under the same time.
    """
    ledger_file = cache_dir / "digests.jsonl"
    ledger: dict[tuple[str, int, int], str] = {}
    if ledger_file.is_file():
        for line in ledger_file.read_text("utf-8", errors="replace").splitlines():
            try:
                path, size, mtime, content = json.loads(line)
                ledger[path, size, mtime] = content
            except (ValueError, TypeError):  # the end of a line may be missing after a crash
                continue

    def digest(path: str) -> tuple[tuple[str, int, int] | None, str]:
        try:
            stat = os.stat(path)
            entry = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
            if entry in ledger:
                return None, ledger[entry]
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            fix = "Check the dataset's root and that its archives are unpacked"
            raise MediaError(path, error.strerror or "unreadable", fix) from error
        return (entry if time.time_ns() - stat.st_mtime_ns > 2_000_000_000 else None), content

    digests, unreadable, news = {}, {}, []
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
            file.write("".join(news))
    return digests, unreadable


def _decode(unit: _Unit, face_channel_order: ChannelOrder) -> np.ndarray:
    if unit.modality == "face":
        return read_faces(unit.path, face_channel_order)
    return {"frame": read_frames, "audio": read_audio, "image": read_image}[unit.modality](unit.path)


def _decode_ahead(
    units: Iterable[_Unit], face_channel_order: ChannelOrder, threads: int, ahead: int
) -> Iterator[tuple[_Unit, np.ndarray | MediaError]]:
    """Decode in order, in threads, never more than `ahead` files before they are asked for."""

    def result(future: Future[np.ndarray]) -> np.ndarray | MediaError:
        try:
            return future.result()
        except MediaError as error:
            return error

    waiting: deque[tuple[_Unit, Future[np.ndarray]]] = deque()
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
        pool.shutdown(cancel_futures=True)


def _encode(
    decoded: Iterator[tuple[_Unit, np.ndarray | MediaError]],
    encoders: Encoders | None,
    folder: Path,
    batch: int,
    shard_size: int,
    bar: tqdm,
) -> dict[str, str]:
    """Encode and write shards; key → reason of the files that could not be read."""
    broken: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    try:
        while group := list(islice(decoded, batch)):
            broken |= {unit.key: str(result) for unit, result in group if isinstance(result, MediaError)}
            arrays = {unit: result for unit, result in group if not isinstance(result, MediaError)}
            if arrays and encoders is None:
                path = next(iter(arrays)).path
                raise ValueError(f"{path}: its features are not in {folder}; pass encoders to compute them")
            for is_audio in (False, True):
                some = {unit: array for unit, array in arrays.items() if (unit.modality == "audio") == is_audio}
                if some:
                    assert encoders is not None  # for the type checker: refused above
                    encode = encoders.encode_audio if is_audio else encoders.encode_frames
                    rows = encode(np.concatenate(list(some.values())))
                    if not torch.isfinite(rows).all():
                        files = ", ".join(str(unit.path) for unit in some)
                        raise ValueError(f"NaN or infinite features among those of {files}; load encoders in float32")
                    for unit, part in zip(some, rows.split([len(array) for array in some.values()]), strict=True):
                        shard[unit.key] = part.clone()
            if len(shard) >= shard_size:
                _write(folder, shard)
                shard = {}
            bar.update(len(group))
    finally:  # also what was done before an interrupt
        if shard:
            _write(folder, shard)
    return broken


def _write(folder: Path, shard: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    unfinished = folder / f"{name}.unfinished"
    save_file(shard, unfinished, metadata={"crc32": _checksum(shard)})
    os.replace(unfinished, folder / f"{name}.safetensors")


def _checksum(shard: Mapping[str, Tensor]) -> str:
    crc = 0
    for key in sorted(shard):
        crc = zlib.crc32(shard[key].contiguous().numpy().data, zlib.crc32(key.encode(), crc))
    return f"{crc:08x}"


def _find(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Which shard holds which wanted key. Each shard used is checked; a broken one is removed with a warning."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                keys = list(shard.keys())
                if wanted.isdisjoint(keys):
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
