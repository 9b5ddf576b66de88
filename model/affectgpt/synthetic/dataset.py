"""Make the embedded data set: clips with cues split over face, voice and words, in the MER2025 layout."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from affectgpt.synthetic import face, voice
from affectgpt.synthetic.emotions import EMOTIONS, IRONIC, PLAIN_FACE, PLAIN_LINES, PLAIN_VOICE, THINGS, TIMES
from grpo_core.data import read_jsonl
from grpo_core.errors import InputError

VERSION = 3  # raise it when the same seed gives other clips
FPS = 10
FACE_EVERY = 3  # the face tracker keeps every third frame
TRAIN_LABELS, TRAIN_REASONS, TEST_LABELS = "track2_train_ovmerd.csv", "track3_train_ovmerd.csv", "track2_test.csv"

# channels that carry a clip's one emotion, and those that carry its two emotions, with their shares
SINGLE = ((("face",), 0.30), (("voice",), 0.30), (("face", "voice"), 0.25), (("words",), 0.15))
MIXED = ((("face", "voice"), 0.6), (("face", "words"), 0.2), (("voice", "words"), 0.2))
MIXED_SHARE, IRONIC_SHARE, SLIP = 0.35, 0.15, 0.10
PANEL = (0.2, 0.5, 0.3)  # one, two or three annotators


@dataclass(frozen=True)
class Script:
    """Script of a clip, written before it is drawn.

    Attributes:
        name: as in the csv files.
        channels: emotion per channel ("face", "voice", "words"); an absent channel is plain.
        probabilities: probability that an annotator names an emotion, by emotion.
        subtitle, labels, reason: as written to the csv files.
        ironic: the words express the opposite of the emotion.
        seed: seed of the drawing and voicing.
    """

    name: str
    channels: dict[str, str]
    probabilities: dict[str, float]
    subtitle: str
    labels: tuple[str, ...]
    reason: str
    ironic: bool = False
    seed: tuple[int, ...] = field(default=(0,))


def write_script(name: str, rng: np.random.Generator, seed: tuple[int, ...]) -> Script:
    """Draw a clip's emotions, subtitle and labels."""
    names = list(EMOTIONS)
    shares = np.array([EMOTIONS[e].share for e in names])
    first = _pick(rng, names, shares)
    if rng.random() < MIXED_SHARE:
        carriers = _pick(rng, [carriers for carriers, _ in MIXED], [share for _, share in MIXED])
        apart = (first, EMOTIONS[first].near, IRONIC.get(first))  # could not be told from it
        others = [e for e in names if e not in apart and IRONIC.get(e) != first]
        second = _pick(rng, others, np.array([EMOTIONS[e].share for e in others]))
        weight = rng.uniform(0.35, 0.65)
        truth = {first: weight, second: 1 - weight}
        channels = dict(zip(carriers, (first, second), strict=True))
    else:
        truth = {first: 1.0}
        channels = dict.fromkeys(
            _pick(rng, [carriers for carriers, _ in SINGLE], [share for _, share in SINGLE]), first
        )
    probabilities: dict[str, float] = {}
    for emotion, weight in truth.items():  # annotators slip to the nearest emotion now and then
        for e, p in ((emotion, weight * (1 - SLIP)), (EMOTIONS[emotion].near, weight * SLIP)):
            probabilities[e] = probabilities.get(e, 0.0) + p

    ironic = first in IRONIC and len(truth) == 1 and "words" not in channels and rng.random() < IRONIC_SHARE
    spoken = IRONIC[first] if ironic else channels.get("words")
    lines = EMOTIONS[spoken].lines if spoken else PLAIN_LINES
    subtitle = str(rng.choice(lines)).format(thing=rng.choice(THINGS), time=rng.choice(TIMES))
    labels = annotate(probabilities, rng)
    return Script(name, channels, probabilities, subtitle, labels, describe(channels, ironic, labels), ironic, seed)


def annotate(probabilities: dict[str, float], rng: np.random.Generator) -> tuple[str, ...]:
    """Draw one to five label words: each member of a panel writes one or two words for one emotion, and lists merge.

    Words of an emotion have frequencies rank^-0.8 in the order of `Emotion.words`. With 24 words the first covers
    20 % and the first five 51 %, with seven 33 % and 85 %; in OV-MERD's 332 samples these are 18 % and 56 % for the
    words of sadness (43 in use).
    """
    written: list[str] = []
    for _ in range(_pick(rng, (1, 2, 3), PANEL)):
        emotion = _pick(rng, list(probabilities), np.array(list(probabilities.values())))
        words = EMOTIONS[emotion].words
        zipf = np.arange(1, len(words) + 1) ** -0.8
        written += list(rng.choice(words, size=1 + (rng.random() < 0.4), replace=False, p=zipf / zipf.sum()))
    return tuple(dict.fromkeys(str(word) for word in written))[:5]


def describe(channels: dict[str, str], ironic: bool, labels: Sequence[str]) -> str:
    """Describe a clip for think mode: what is seen, heard and said, and what follows from it."""
    seen = EMOTIONS[channels["face"]].seen if "face" in channels else PLAIN_FACE
    heard = EMOTIONS[channels["voice"]].heard if "voice" in channels else PLAIN_VOICE
    said = "ironic" if ironic else "telling" if "words" in channels else "plain"
    felt = " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
    return f"The person shows {seen} and speaks in {heard}. The words are {said}. The person seems {felt}."


def expression_curves(emotion: str | None, frames: int, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Draw a face's curves `[frames]` at `FPS`: onset and hold of the emotion, idle movement, blinks, talking lips.

    The lips follow a separate rhythm, not the sound, so that nothing of a tone of voice can be seen.
    """
    t = np.arange(frames) / FPS
    target = EMOTIONS[emotion].face if emotion else {}
    strength = rng.uniform(0.75, 1.1) * np.clip((t + 0.1) / rng.uniform(0.3, 0.6), 0, 1)
    curves = {}
    for name in face.EXPRESSION:
        idle = 0.06 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * t + rng.uniform(0, 6.28))
        curves[name] = target.get(name, 0.0) * strength + idle + rng.normal(0, 0.07)
    sway = target.get("sway", 0.1) * np.sin(2 * np.pi * target.get("sway_hz", 0.5) * t + rng.uniform(0, 6.28))
    curves["head_roll"] = curves["head_roll"] + sway
    talk = np.abs(np.sin(np.pi * rng.uniform(2.0, 3.5) * t + rng.uniform(0, 3.14)))
    curves["mouth_open"] = np.clip(curves["mouth_open"], 0, None) + 0.2 * talk
    for blink in rng.uniform(0, frames / FPS, rng.integers(1, 3)):
        curves["eye_open"] = curves["eye_open"] - 1.2 * (np.abs(t - blink) < 0.08)
    return {name: np.clip(curve, -1.2, 1.2).astype(np.float32) for name, curve in curves.items()}


def tone_of(emotion: str | None, rng: np.random.Generator) -> dict[str, float]:
    """Draw a tone of voice (`voice.TONE`) around the emotion's."""
    offsets = EMOTIONS[emotion].tone if emotion else {}
    strength = rng.uniform(0.8, 1.15)
    spread = {"pitch": 0.7, "pitch_range": 0.2, "pitch_slope": 0.7, "tempo": 0.25, "effort": 0.1}
    tone = {k: v + strength * offsets.get(k, 0.0) + rng.normal(0, spread.get(k, 0.0)) for k, v in voice.REST.items()}
    return tone | {"pitch_range": max(tone["pitch_range"], 0.2), "tempo": max(tone["tempo"], 1.8)}


def film(script: Script) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Draw and voice a clip: frames `[T, 144, 144, 3]`, face crops `[T/3, 112, 112, 3]`, sound `[n]` at 16 kHz."""
    who, speaker, seconds = cast(script)
    looks, sounds = _stream(script, "looks"), _stream(script, "sounds")
    frames = face.render(expression_curves(script.channels.get("face"), round(seconds * FPS), looks), who)
    sound = voice.speak(tone_of(script.channels.get("voice"), sounds), speaker, seconds, sounds)
    return frames, face.face_crops(frames[::FACE_EVERY], who), sound


def cast(script: Script) -> tuple[face.Appearance, voice.Speaker, float]:
    """Draw a clip's person, speaker and length in seconds, independently of its emotions."""
    rng = _stream(script, "person")
    return face.Appearance.random(rng), voice.Speaker.random(rng), round(rng.uniform(2.2, 2.8), 1)


def _stream(script: Script, purpose: str) -> np.random.Generator:
    # a stream per purpose, so that a change to the drawing leaves the sound as it is; counted from 1, because NumPy
    # takes (a, b, c, 0) for (a, b, c), the stream from which the script itself was drawn
    return np.random.default_rng((*script.seed, 1 + ("person", "looks", "sounds").index(purpose)))


def write_wav(path: Path, sound: NDArray[np.float32]) -> None:
    """Write sound `[n]` in −1…1 as a 16-bit mono wav at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(voice.SAMPLE_RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def write_mp4(path: Path, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
    """Encode frames `[T, H, W, 3]` at `FPS` (H.264, or MPEG-4 where PyAV lacks it) and sound `[n]` at 16 kHz (AAC)."""
    # bitexact and one thread below: the same clip gives the same bytes, and so the same key in the feature cache
    h264 = "libx264" in av.codecs_available
    options = {"preset": "ultrafast", "crf": "18"} if h264 else {"qscale": "2"}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264" if h264 else "mpeg4", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt, video.thread_count = frames.shape[2], frames.shape[1], "yuv420p", 1
        audio = container.add_stream("aac", rate=voice.SAMPLE_RATE, layout="mono")
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())  # flushes the encoder
        block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        block.sample_rate, block.time_base, block.pts = voice.SAMPLE_RATE, Fraction(1, voice.SAMPLE_RATE), 0
        container.mux(audio.encode(block))
        container.mux(audio.encode())


def make_dataset(root: str | Path, *, seed: int = 0, train: int = 400, test: int = 450, workers: int = 2) -> Path:
    """Make `train` + `test` clips in the MER2025 layout under `root` and return it.

    Writes video/, audio/, openface_face/, subtitle_chieng.csv, track2_train_ovmerd.csv, track3_train_ovmerd.csv,
    track2_test.csv (held out), truth.jsonl (the scripts) and, last, manifest.json. A folder whose manifest has the same
    seed, sizes and version is left unchanged. An interrupted run's files are made again.

    Raises:
        FileExistsError: the folder holds something else, or another data set, which a run may still need.
    """
    root = Path(root)
    manifest = {"made_by": "affectgpt.synthetic", "version": VERSION, "seed": seed, "train": train, "test": test}
    mark = root / "manifest.json"
    if mark.is_file():
        found = json.loads(mark.read_text())
        if found == manifest:
            return root
        raise FileExistsError(
            f"{root} holds a synthetic data set of other seed, sizes or version ({found}): name a new folder"
        )
    if root.exists() and any(root.iterdir()) and not (root / "truth.jsonl").is_file():
        raise FileExistsError(f"{root} holds files that are not a synthetic data set: name an empty or a new folder")
    root.mkdir(parents=True, exist_ok=True)
    scripts = write_scripts(seed, train, test)
    for folder in ("video", "audio", "openface_face"):
        # of an interrupted run: truth.jsonl is there, and no manifest
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
    (root / "truth.jsonl").write_text("".join(json.dumps(asdict(s)) + "\n" for s in scripts))
    _film_all(root, workers)
    _write_csv(
        root / "subtitle_chieng.csv", ("name", "chinese", "english"), [(s.name, "", s.subtitle) for s in scripts]
    )
    openset = [(s.name, f"[{', '.join(s.labels)}]") for s in scripts]
    _write_csv(root / TRAIN_LABELS, ("name", "openset"), openset[:train])
    _write_csv(root / TEST_LABELS, ("name", "openset"), openset[train:])
    _write_csv(root / TRAIN_REASONS, ("name", "reason"), [(s.name, s.reason) for s in scripts[:train]])
    mark.write_text(json.dumps(manifest))  # last: its presence means that all files are complete
    return root


def write_scripts(seed: int, train: int, test: int) -> list[Script]:
    """Write the clips' scripts, training clips first; clip k is the same whatever the sizes."""
    return [
        write_script(f"sample_{split}{k:07d}", np.random.default_rng((seed, split, k)), (seed, split, k))
        for split, count in enumerate((train, test))
        for k in range(count)
    ]


def read_truth(root: str | Path) -> list[Script]:
    """Read the scripts of a generated data set, training clips first."""
    rows = (record.value for record in read_jsonl(Path(root) / "truth.jsonl"))
    return [Script(**row | {"labels": tuple(row["labels"]), "seed": tuple(row["seed"])}) for row in rows]


def shuffle_media(samples: Sequence, seed: int) -> list:
    """Give each sample another sample's video, sound, face and subtitle, keeping names and labels, as a control.

    `samples` are two or more `affectgpt.data.datasets.Sample`; none keeps its clip.
    """
    if len(samples) < 2:
        raise InputError("shuffling media needs two or more samples")
    order = np.random.default_rng(seed).permutation(len(samples))
    # each takes from the one before it in a random cycle, so none takes from itself
    donors = dict(zip(order, np.roll(order, 1), strict=True))
    return [
        replace(s, video=d.video, audio=d.audio, face=d.face, subtitle=d.subtitle)
        for s, d in ((sample, samples[donors[i]]) for i, sample in enumerate(samples))
    ]


def film_part(root: Path, worker: int, workers: int) -> None:
    """Film every `workers`-th clip of `truth.jsonl`, starting at clip `worker`."""
    for script in read_truth(root)[worker::workers]:
        _write_clip(root, script)


def _film_all(root: Path, workers: int) -> None:
    # plain child processes: multiprocessing would import the caller's main module, torch and all, into each of them
    command = [sys.executable, "-m", "affectgpt.synthetic", "film", str(root)]
    children = [subprocess.Popen([*command, str(worker), str(workers)]) for worker in range(1, workers)]
    try:
        film_part(root, 0, workers)
    finally:
        codes = [child.wait() for child in children]  # also after an error here: no child outlives the call
    if any(codes):
        raise RuntimeError(
            f"filming clips into {root} failed in a child process (exit codes {codes}); see its message above"
        )


def _write_clip(root: Path, script: Script) -> None:
    frames, faces, sound = film(script)
    write_mp4(root / "video" / f"{script.name}.mp4", frames, sound)
    write_wav(root / "audio" / f"{script.name}.wav", sound)
    folder = root / "openface_face" / script.name
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{script.name}.npy", faces)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _pick(rng: np.random.Generator, options: Sequence[Any], weights: Any) -> Any:
    """Draw one of the options, by weights `[n]` that need not sum to 1."""
    shares = np.asarray(weights, float)
    return options[rng.choice(len(options), p=shares / shares.sum())]
