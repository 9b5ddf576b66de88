"""The feature cache: what is in it, what is computed again, and what happens when things break."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import wave
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from affectgpt.data import features
from affectgpt.data.datasets import Sample, load_jsonl
from affectgpt.data.features import FeatureStore, extract_features
from affectgpt.data.media import read_audio, read_faces, read_frames, read_image
from affectgpt.modeling.encoders import Encoders


def write_clip(path, seed, sound=True):
    """Half a second of changing gray, with a tone of its own."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=20)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for index in range(10):
            pixels = np.full((32, 48, 3), (17 * seed + 20 * index) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 20)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio:
            wave = 0.3 * np.sin(np.arange(8000) * 0.03 * (seed + 1), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def make_samples(folder, count):
    """Clips with sound and faces, all of different content."""
    samples = []
    for i in range(count):
        face = folder / f"{i}.npy"
        np.save(face, np.random.default_rng(i).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8))
        samples.append(Sample(f"clip{i}", write_clip(folder / f"{i}.mp4", i), None, face))
    return samples


@pytest.fixture(scope="module")
def encoders(tiny_clip_folder, tiny_hubert_folder):
    return Encoders.from_pretrained(tiny_clip_folder, tiny_hubert_folder)


@pytest.fixture
def samples(tmp_path):
    (tmp_path / "media").mkdir()
    return make_samples(tmp_path / "media", 5)


@pytest.fixture
def reads(monkeypatch):
    """Names of the files decoded, in the order of decoding."""
    seen = []
    decode = features._decode

    def watch(unit, order):
        seen.append((unit.modality, unit.path.name))
        return decode(unit, order)

    monkeypatch.setattr(features, "_decode", watch)
    return seen


def contents(store: FeatureStore):
    return {name: {key: tensor.tolist() for key, tensor in store[name].items()} for name in store}


def test_features_are_the_encoders_outputs_by_name(tmp_path, samples, encoders):
    store = extract_features(samples, encoders, tmp_path / "cache", progress=False, batch=3, shard_size=4)
    assert list(store) == [sample.name for sample in samples]
    assert store.skipped == {}
    for sample in samples:
        expected = {
            "frame": encoders.encode_frames(read_frames(sample.video)),
            "face": encoders.encode_frames(read_faces(sample.face)),
            "audio": encoders.encode_audio(read_audio(sample.video)),
        }
        found = store[sample.name]
        assert set(found) == set(expected)
        for modality, tensor in expected.items():
            assert found[modality].dtype == torch.float32
            torch.testing.assert_close(found[modality], tensor, rtol=1e-4, atol=1e-5)


def test_samples_are_independent_of_their_neighbours(tmp_path, samples, encoders):
    together = extract_features(samples, encoders, tmp_path / "a", progress=False)
    for sample in samples:
        alone = extract_features([sample], encoders, tmp_path / sample.name, progress=False)
        for modality, tensor in alone[sample.name].items():
            torch.testing.assert_close(together[sample.name][modality], tensor, rtol=1e-4, atol=1e-5)


def test_a_second_run_decodes_nothing_and_gives_the_same_bits(tmp_path, samples, encoders, reads):
    first = extract_features(samples, encoders, tmp_path / "cache", progress=False, shard_size=4)
    suffixes = {"frame": "mp4", "audio": "mp4", "face": "npy"}
    assert sorted(reads) == sorted((m, f"{i}.{suffix}") for i in range(5) for m, suffix in suffixes.items())
    reads.clear()
    second = extract_features(samples, encoders, tmp_path / "cache", progress=False)
    without_encoders = extract_features(samples, None, tmp_path / "cache", progress=False)
    assert reads == []
    assert contents(first) == contents(second) == contents(without_encoders)


def test_only_new_files_and_modalities_are_decoded(tmp_path, samples, encoders, reads):
    extract_features(samples[:4], encoders, tmp_path / "cache", ("frame",), progress=False)
    reads.clear()
    store = extract_features(samples, encoders, tmp_path / "cache", ("frame", "face"), progress=False)
    assert sorted(reads) == sorted([("frame", "4.mp4"), *(("face", f"{i}.npy") for i in range(5))])
    assert set(store["clip0"]) == {"frame", "face"}


def test_the_cache_follows_content_and_not_names(tmp_path, samples, encoders, reads):
    extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False)
    before = contents(extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False))
    moved = samples[0].video.rename(tmp_path / "media" / "moved.mp4")
    old, new = samples[1].video, samples[2].video
    stat = old.stat()
    old.write_bytes(new.read_bytes())  # another content under the old name
    os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    reads.clear()
    changed = [Sample("clip0", moved, None, None), *samples[1:]]
    after = contents(extract_features(changed, encoders, tmp_path / "cache", ("frame",), progress=False))
    assert reads == []
    assert after["clip0"] == before["clip0"]
    assert after["clip1"] == before["clip2"] != before["clip1"]


def test_an_unchanged_file_is_not_even_hashed_again(tmp_path, samples, encoders, monkeypatch):
    for sample in samples:
        past = time.time() - 60
        os.utime(sample.video, (past, past))
    extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False)
    with (tmp_path / "cache" / "digests.jsonl").open("a") as file:
        file.write('["/half a li')  # a crash while writing
    monkeypatch.setattr(features.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert len(extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False)) == 5


def test_channel_order_and_encoders_have_features_of_their_own(
    tmp_path, samples, encoders, tiny_clip_folder, tiny_hubert_folder
):
    options = {"modalities": ("face",), "progress": False}
    rgb = extract_features(samples, encoders, tmp_path / "cache", **options)
    bgr = extract_features(samples, encoders, tmp_path / "cache", **options, face_channel_order="bgr")
    expected = encoders.encode_frames(read_faces(samples[0].face, "bgr"))
    torch.testing.assert_close(bgr["clip0"]["face"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rgb["clip0"]["face"], expected, atol=1e-3)
    half = Encoders.from_pretrained(tiny_clip_folder, tiny_hubert_folder, dtype=torch.bfloat16)
    other = extract_features(samples, half, tmp_path / "cache", **options)
    assert 0 < (other["clip0"]["face"] - rgb["clip0"]["face"]).abs().max() < 0.5
    with pytest.raises(ValueError, match="it holds the features of 2 encoders; pass encoders to choose one"):
        extract_features(samples, None, tmp_path / "cache", **options)


def test_a_part_that_a_sample_has_not_is_absent_not_an_error(tmp_path, samples, encoders):
    picture = tmp_path / "media" / "picture.png"
    Image.new("RGB", (50, 40), (200, 10, 60)).save(picture)
    odd = [
        Sample("no_face", samples[0].video, None, None),
        Sample("words_only", None, None, None, subtitle="hm"),
        Sample("picture", None, None, None, image=picture),
    ]
    store = extract_features(odd, encoders, tmp_path / "cache", ("frame", "face", "audio", "image"), progress=False)
    assert {name: set(store[name]) for name in store} == {
        "no_face": {"frame", "audio"},
        "words_only": set(),
        "picture": {"image"},
    }
    expected = encoders.encode_frames(read_image(picture))
    assert expected.shape == (1, 12)
    torch.testing.assert_close(store["picture"]["image"], expected, rtol=1e-4, atol=1e-5)


def test_unreadable_clips_are_reported_once_skipped_and_counted(tmp_path, samples, encoders, caplog):
    media = tmp_path / "media"
    corrupt = media / "corrupt.mp4"
    corrupt.write_bytes(samples[0].video.read_bytes()[:300])
    bad = [
        Sample("missing", media / "missing.mp4", None, samples[0].face),
        Sample("corrupt", corrupt, None, None),
        Sample("mute", write_clip(media / "mute.mp4", 9, sound=False), None, None),
        Sample("bad_face", samples[1].video, None, media / "0.mp4"),
    ]
    with caplog.at_level(logging.WARNING):
        store = extract_features([*samples, *bad], encoders, tmp_path / "cache", progress=False)
    assert list(store) == [sample.name for sample in samples]
    assert list(store.skipped) == ["missing", "corrupt", "mute", "bad_face"]
    assert store.skipped["missing"].startswith(f"{media / 'missing.mp4'}: no such file")
    assert "corrupt or not a media file" in store.skipped["corrupt"]
    assert "it has no audio stream" in store.skipped["mute"]
    assert "not a readable .npy file" in store.skipped["bad_face"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        *(f"skipped {name}: {reason}" for name, reason in store.skipped.items()),
        "skipped 4 of 9 samples",
    ]
    with pytest.raises(KeyError, match=r"sample 'mute' was skipped: .*it has no audio stream"):
        store["mute"]
    with pytest.raises(ValueError, match=r"none of the 4 samples is readable. The first: .*missing.mp4"):
        extract_features(bad, encoders, tmp_path / "cache", progress=False)


def test_a_sample_with_a_fault_and_what_is_no_file_are_skipped(tmp_path, samples, encoders):
    os.mkfifo(tmp_path / "media" / "pipe.mp4")
    (tmp_path / "media" / "zeros.mp4").symlink_to("/dev/zero")
    odd = [
        replace(samples[0], name="fault", fault="its name is odd"),
        Sample("pipe", tmp_path / "media" / "pipe.mp4", None, None),
        Sample("zeros", tmp_path / "media" / "zeros.mp4", None, None),
    ]
    store = extract_features([*samples, *odd], encoders, tmp_path / "cache", ("frame",), progress=False)
    assert list(store) == [sample.name for sample in samples]
    assert store.skipped.pop("fault") == "its name is odd"
    assert [": a pipe, a socket or a device, not a file" in reason for reason in store.skipped.values()] == [True, True]


def test_a_file_whose_end_is_missing_is_skipped_or_kept_but_never_taken_for_a_whole_one(
    tmp_path, samples, encoders, reads, caplog
):
    with wave.open(str(tmp_path / "media" / "cut.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.arange(64_000, dtype=np.int16).tobytes())
    cut = tmp_path / "media" / "cut.wav"
    cut.write_bytes(cut.read_bytes()[:70_000])
    odd, options = [*samples, Sample("cut", None, cut, None)], {"modalities": ("audio",), "progress": False}
    for _ in range(2):  # before and after the features of the cut file are in the cache
        store = extract_features(odd, encoders, tmp_path / "cache", **options)
        assert list(store.skipped) == ["cut"]
        assert "its end is missing: the header promises 128,044 bytes, and there are 70,000" in store.skipped["cut"]
        with caplog.at_level(logging.WARNING):
            kept = extract_features(odd, encoders, tmp_path / "cache", truncated="keep", **options)
        assert caplog.records[-1].getMessage() == f"kept cut, though the end of {cut} is missing"
        assert kept.skipped == {}
        torch.testing.assert_close(
            kept["cut"]["audio"], encoders.encode_audio(read_audio(cut, truncated=True)), rtol=1e-4, atol=1e-5
        )
    assert reads.count(("audio", "cut.wav")) == 3  # kept: encoded once; skipped: looked at in every run


def shards(cache):
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_broken_shard_is_computed_again_with_a_warning(tmp_path, samples, encoders, reads, caplog, damage):
    first = contents(extract_features(samples, encoders, tmp_path / "cache", progress=False, batch=1, shard_size=3))
    assert len(shards(tmp_path / "cache")) == 5
    path = shards(tmp_path / "cache")[2]
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 0x40
    if damage == "foreign":
        data = data.replace(b'"crc32":"', b'"crc23":"')
    path.write_bytes(data[: {"truncated": len(data) - 9, "empty": 0}.get(damage)])
    reads.clear()
    with caplog.at_level(logging.WARNING):
        again = contents(extract_features(samples, encoders, tmp_path / "cache", progress=False))
    assert len(reads) == 3
    assert [f"{path}: broken cache shard" in record.getMessage() for record in caplog.records] == [True]
    assert not path.exists()
    for name, modalities in first.items():
        for modality, rows in modalities.items():
            np.testing.assert_allclose(again[name][modality], rows, rtol=1e-4, atol=1e-5)


def test_an_interrupt_keeps_what_was_done(tmp_path, samples, encoders, reads, monkeypatch):
    encode, calls = encoders.encode_frames, []

    def interrupted(frames):
        calls.append(len(frames))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(frames)

    monkeypatch.setattr(encoders, "encode_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False, batch=1)
    reads.clear()
    monkeypatch.setattr(encoders, "encode_frames", encode)
    store = extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False)
    assert sorted(reads) == [("frame", "3.mp4"), ("frame", "4.mp4")]
    assert len(store) == 5


def test_what_a_killed_build_left_is_removed_but_not_what_a_living_process_writes(tmp_path, samples, encoders):
    folder = tmp_path / "cache" / encoders.fingerprint
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = socket.gethostname()
    files = {
        f"a.{here}.{ended.pid}": False,
        f"b.{here}.{os.getpid()}": True,  # of a living process
        f"c.elsewhere.org.{ended.pid}": True,  # of another machine, and young
        f"d.elsewhere.org.{os.getpid()}": False,  # of another machine, and old
        "e": False,  # as earlier versions named them, and old
    }
    for name in files:
        (folder / f"{name}.unfinished").write_bytes(b"half a shard")
        if name[0] in "de":
            os.utime(folder / f"{name}.unfinished", (time.time() - 2 * 24 * 3600,) * 2)
    extract_features(samples[:1], encoders, tmp_path / "cache", progress=False)
    assert {path.stem for path in folder.glob("*.unfinished")} == {name for name, stays in files.items() if stays}


def test_missing_features_without_encoders_say_what_to_do(tmp_path, samples, encoders):
    extract_features(samples[:3], encoders, tmp_path / "cache", ("frame",), progress=False)
    with pytest.raises(ValueError, match=r"3\.mp4: its features are not in .*; pass encoders to compute them"):
        extract_features(samples, None, tmp_path / "cache", ("frame",), progress=False)


def test_nan_features_are_refused_not_cached(tmp_path, samples, encoders, monkeypatch):
    monkeypatch.setattr(encoders, "encode_frames", lambda frames: torch.full((len(frames), 12), torch.nan))
    with pytest.raises(ValueError, match=r"NaN or infinite features among those of .*0\.mp4"):
        extract_features(samples, encoders, tmp_path / "cache", ("frame",), progress=False)
    assert shards(tmp_path / "cache") == []


def test_wrong_arguments_are_named(tmp_path, samples, encoders):
    with pytest.raises(ValueError, match="unknown modality 'video': choose among frame, face, audio, image"):
        extract_features(samples, encoders, tmp_path, ("video",))
    with pytest.raises(ValueError, match="two samples have the same name"):
        extract_features([samples[0], samples[0]], encoders, tmp_path)


class MeanEncoder:
    """The cheapest encoder there can be."""

    fingerprint = "mean"

    def encode_frames(self, frames):
        return torch.from_numpy(frames).float().mean(dim=(1, 2))


SCRIPT = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    import torch
    from affectgpt.data.datasets import load_jsonl
    from affectgpt.data.features import extract_features
    from grpo_core import distributed

    class MeanEncoder:
        fingerprint = "mean"
        def encode_frames(self, frames):
            if delay:
                print("encoding", flush=True)
                time.sleep(delay)
            return torch.from_numpy(frames).float().mean(dim=(1, 2))

    jsonl, cache, delay = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    dist = distributed.init("cpu", timeout_seconds=60)
    store = extract_features(
        load_jsonl(jsonl), MeanEncoder(), cache, ("frame", "face"), progress=False, batch=1, shard_size=2, dist=dist
    )
    found = {name: {key: value.tolist() for key, value in store[name].items()} for name in store}
    Path(cache, f"rank{dist.rank}.json").write_text(json.dumps([found, store.skipped]))
    distributed.finalize(dist)
    """
)


def start(folder, cache, delay=0.0, rank=0, world=1, port=0):
    environment = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / "clips.jsonl"), str(cache), str(delay)],
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def clips_folder(tmp_path, samples):
    rows = [{"name": s.name, "video": f"media/{s.video.name}", "face": f"media/{s.face.name}"} for s in samples]
    rows.insert(2, {"name": "missing", "video": "media/missing.mp4"})
    (tmp_path / "media" / "corrupt.mp4").write_bytes(b"?" * 99)
    rows.append({"name": "corrupt", "video": "media/corrupt.mp4"})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_killed_run_goes_on_and_two_ranks_agree_with_one_process(clips_folder):
    killed = start(clips_folder, clips_folder / "cache", delay=0.2)
    for _ in range(6):
        assert killed.stdout.readline() == "encoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = len(shards(clips_folder / "cache"))
    assert kept in (2, 3)
    (clips_folder / "cache" / "mean" / "0.unfinished").write_bytes(b"what a kill while writing leaves")

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = [start(clips_folder, clips_folder / "cache", rank=rank, world=2, port=port) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert len(shards(clips_folder / "cache")) > kept

    outcomes = [json.loads((clips_folder / "cache" / f"rank{rank}.json").read_text()) for rank in range(2)]
    samples = load_jsonl(clips_folder / "clips.jsonl")
    single = extract_features(samples, MeanEncoder(), clips_folder / "single", ("frame", "face"), progress=False)
    assert outcomes == [[contents(single), single.skipped]] * 2
    assert len(single) == 5
    assert sorted(single.skipped) == ["corrupt", "missing"]
