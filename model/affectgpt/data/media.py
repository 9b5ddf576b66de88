"""Read video frames, faces, sound and images from files into the arrays that the encoders take.

The sampling rules are AffectGPT's (MERTools, `MER2025_Track23/my_affectgpt`): 8 uniform frames by index, and 8 clips of
two seconds. All functions raise `MediaError`, which names the file, the fault and the fix, and none of them opens
anything but a regular file. A file whose end is missing is a `TruncatedError`, unless the caller takes what is there.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image, ImageOps

from grpo_core.errors import InputError

ChannelOrder = Literal["rgb", "bgr"]

NUM_STEPS = 8  # frames, faces and sound clips of one sample
FRAME_SIZE = 224
SAMPLE_RATE = 16_000
CLIP_SAMPLES = 2 * SAMPLE_RATE
HELD_SAMPLES = 600 * SAMPLE_RATE  # 38 MB: a longer sound is decoded twice, and never held as a whole
GAP = 0.5  # seconds: a hole in the sound is filled from here on; below it, time stamps may only be imprecise


class MediaError(Exception):
    """A media file cannot be used; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str, fix: str) -> None:
        super().__init__(f"{path}: {reason}. {fix}.")
        self.path, self.reason, self.fix = Path(path), reason, fix


class TruncatedError(MediaError):
    """The end of a file is missing: its header promises more than there is."""


def frame_indices(length: int, count: int = NUM_STEPS) -> np.ndarray:
    """Choose `count` of `length` ≥ 1 frames, uniformly from 0: int64 `[count]`; too few are padded with the last one.

    `arange(0, L, L / min(count, L))` rounded down, as upstream's video processor does.
    """
    taken = min(count, length)
    indices = np.arange(0, length, length / taken).astype(np.int64)[:taken]
    return np.pad(indices, (0, count - taken), mode="edge")


def read_frames(
    path: str | Path, count: int = NUM_STEPS, size: int = FRAME_SIZE, *, truncated: bool = False
) -> np.ndarray:
    """Read uniformly spaced frames of a video: uint8 RGB `[count, size, size, 3]`.

    Each frame is stretched to the square (ignoring its aspect) by swscale's bicubic filter, and turned and mirrored by
    the file's display matrix. Only the chosen frames are kept, so memory does not grow with the length of the video.

    Args:
        truncated: read a file whose end is missing as far as it goes.

    Raises:
        TruncatedError: the end of the file is missing, and `truncated` is False.
        MediaError: the file is missing or corrupt, or has no video stream or no frame.
    """
    path = _existing(path)
    cut = _check_whole(path, truncated)
    # counted first: to choose frames while decoding, the number of frames must be known before the first one
    length = _count_packets(path)
    taken, decoded = _decode_frames(path, frame_indices(max(length, 1), count), size, cut)
    if decoded and decoded != length:  # hidden or broken packets: decode again, with the true number of frames
        taken, decoded = _decode_frames(path, frame_indices(decoded, count), size, cut)
    if not decoded:
        raise MediaError(path, "the video holds no frame", "Record or download it again, or remove the sample")
    return np.stack(taken)


def read_audio(path: str | Path, *, truncated: bool = False) -> np.ndarray:
    """Read the sound of a wav, mp4 or any other file with an audio stream: float32 `[8, 32000]`, see `audio_clips`.

    It needs 64 kB of memory per second of sound, and at most 40 MB: a sound of more than ten minutes is decoded twice,
    first for its length, then for its clips.

    Args:
        truncated: read a file whose end is missing as far as it goes.

    Raises:
        TruncatedError: the end of the file is missing, and `truncated` is False.
        MediaError: the file is missing or corrupt, has no audio stream or no samples, or some are NaN or infinite.
    """
    length, held = 0, []
    for block in _sound(path, truncated):
        length += len(block)
        if length <= HELD_SAMPLES:
            held.append(block)
        else:
            held.clear()
    blocks = held if length <= HELD_SAMPLES else _sound(path, truncated)
    return _normalised(_cut(blocks, clip_starts(length)))


def read_waveform(path: str | Path, *, truncated: bool = False) -> np.ndarray:
    """Read a whole sound at 16 kHz, averaging its channels: float32 `[n]`, n ≥ 1. Arguments and errors: `read_audio`.

    Where the sound begins after the file does, or has a hole of more than half a second, it is silent there, so that
    it stays beside its picture.
    """
    return np.concatenate(list(_sound(path, truncated)))


def clip_starts(length: int) -> list[int]:
    """Choose where the 8 clips of a sound of `length` samples at 16 kHz begin: clip i at i·(duration − 2)/7 seconds."""
    length = max(length, CLIP_SAMPLES)
    return [i * (length - CLIP_SAMPLES) // (NUM_STEPS - 1) for i in range(NUM_STEPS)]


def audio_clips(waveform: np.ndarray) -> np.ndarray:
    """Cut a 16 kHz waveform `[n]` into 8 clips of 2 s and normalise them: float32 `[8, 32000]`.

    The clips begin at `clip_starts`; a shorter waveform is zero-padded to 2 s. Each clip is centred, then the eight are
    normalised together to zero mean and unit variance. (Upstream's feature extractor normalises over the whole batch;
    over one sample, as here, is what it does in inference, and does not depend on the other samples.)
    """
    return _normalised(_cut([waveform], clip_starts(len(waveform))))


def read_faces(
    path: str | Path, channel_order: ChannelOrder = "rgb", count: int = NUM_STEPS, size: int = FRAME_SIZE
) -> np.ndarray:
    """Read cropped faces from an .npy, uint8 `[T, H, W, 3]` (OpenFace: 112 × 112): uint8 RGB `[count, size, size, 3]`.

    They are chosen by `frame_indices` and resized bilinearly (half-pixel centres, as OpenCV). `channel_order` is the
    order *in the file*: some tools write OpenCV's BGR.

    Raises:
        MediaError: the file is missing or corrupt, has another dtype or shape, or holds no face.
    """
    path = _existing(path)
    fix = "Faces are a numpy array uint8 [T, H, W, 3] with T ≥ 1, saved by numpy.save"
    try:
        with path.open("rb") as file:  # the header first, so that an array of objects, a pickle, is never read
            shape, dtype = _npy_header(file)
        faces = None
        if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape:
            faces = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy reads the header with Python's parser, which may raise nearly anything
        raise MediaError(path, f"not a readable .npy file ({error})", fix) from error
    if faces is None:
        raise MediaError(path, f"it holds {dtype} {list(shape)}, not faces", fix)
    # from the memory map: only the chosen faces are read from the disk
    taken = np.asarray(faces[frame_indices(len(faces), count)])
    if channel_order == "bgr":
        taken = taken[..., ::-1]
    elif channel_order != "rgb":
        raise InputError(f"face_channel_order is {channel_order!r}; it can be 'rgb' or 'bgr'")
    pixels = torch.from_numpy(np.ascontiguousarray(taken)).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def read_image(path: str | Path, size: int = FRAME_SIZE) -> np.ndarray:
    """Read a still image, rotated by its EXIF data and stretched to the square: uint8 RGB `[1, size, size, 3]`.

    Raises:
        MediaError: the file is missing or corrupt.
    """
    path = _existing(path)
    try:
        with Image.open(path) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"not a readable image ({error})", "Save it again as PNG or JPEG") from error
    return np.array(pixels)[None]


def check_regular(path: str | Path) -> int:
    """Refuse what is no regular file: opening a named pipe or a device may wait for ever.

    Returns:
        The file's size in bytes.

    Raises:
        MediaError: there is no such file, or it is something else. Links are followed.
    """
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise MediaError(path, reason, "Check the dataset's root and that its archives are unpacked") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise MediaError(path, f"{kind}, not a file", "Put a regular file there, or remove the sample")
    return status.st_size


def _existing(path: str | Path) -> Path:
    check_regular(path)
    return Path(path)


# --- files whose end is missing --------------------------------------------------------------------------------------

# headers whose lengths are written when the file is complete; other containers state none, or FFmpeg guesses it
_STATES_LENGTH = {"matroska,webm", "flac", "aiff", "caf", "w64"}


def _check_whole(path: Path, truncated: bool) -> bool:
    """Find out whether the end of a file is missing: fewer packets than its header promises.

    Raises:
        TruncatedError: it is missing, and `truncated` is False.
    """
    missing = _missing_end(path)
    if missing and not truncated:
        fix = "Copy or download it again, or set data.truncated to keep to use what is there"
        raise TruncatedError(path, f"its end is missing: {missing}", fix)
    return missing is not None


def _missing_end(path: Path) -> str | None:
    """Say what is missing at the end of a file; None if nothing is, or if its format does not tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":  # wav and avi: FFmpeg replaces the lengths that they state by those that it finds
            promised = int.from_bytes(head[4:8], "little") + 8
            if head[8:] == b"WAVE":
                promised = _end_of_wav_data(file, size)
            # a program that writes to a pipe does not know the size, and states 0 or about 2 or 4 GB; programs also
            # miscount by some bytes, which are less than a millisecond of sound
            unknown = promised in (0, 8) or 0x7FFF0000 <= promised <= 0x80000100 or promised >= 0xFFFF0000
            if not unknown and promised > size + 64:
                return f"the header promises {promised:,} bytes, and there are {size:,}"
            return None
    with _open(path) as container:
        if container.format.name.startswith("mov,"):
            # the index, not the number of frames: an edit list hides packets that are there
            entries = [entry for stream in container.streams for entry in stream.index_entries]
            here = sum(entry.pos + entry.size <= size for entry in entries)
            return f"{here} of {len(entries)} packets are there" if here < len(entries) else None
        if container.format.name not in _STATES_LENGTH and not _states_mp3_length(path, container.format.name):
            return None
        promised_time, start = container.duration, container.start_time or 0
        if not promised_time:
            return None
        ends = [
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in container.demux()
            if packet.pts is not None and packet.time_base is not None
        ]
        promised_seconds = promised_time / 1e6
        found_seconds = max(ends, default=0.0) - start / 1e6
        # the last packet's own duration may be unknown, and a block of flac or mp3 is about 0.1 s long
        if found_seconds < promised_seconds - max(0.2, 0.01 * promised_seconds):
            return f"{found_seconds:.2f} of {promised_seconds:.2f} seconds are there"
    return None


def _end_of_wav_data(file: IO[bytes], size: int) -> int:
    """Walk the chunks of a wav, from byte 12, to its samples, and return where the header says that they end."""
    place = 12
    while place + 8 <= size:
        file.seek(place)
        chunk = file.read(8)
        length = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            # the unknown length stays recognisable: what stands before the samples does not count
            return length if length == 0 or length >= 0x7FFF0000 else place + 8 + length
        place += 8 + length + length % 2  # chunks begin at even places
    return 0


def _states_mp3_length(path: Path, name: str) -> bool:
    """Whether an mp3 begins with a table of its length; without one FFmpeg guesses it from the first bit rate."""
    if name != "mp3":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


@contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file with FFmpeg, and turn its errors, while the file is open, into a MediaError."""
    try:
        # absolute: FFmpeg would take a name such as `a:b.mp4` for a protocol; damaged tags must not cost the clip
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            yield container
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = f"corrupt or not a media file ({getattr(error, 'strerror', None) or error})"
        raise MediaError(path, reason, "Copy or download it again, or remove the sample") from error


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")  # FFmpeg's choice, which prefers a film to a cover picture
    if stream is None:
        raise MediaError(path, "it has no video stream", "Give a video file, or leave frame out of the modalities")
    assert isinstance(stream, av.VideoStream)  # for the type checker
    return stream


def _count_packets(path: Path) -> int:
    """Count the packets of the video stream, which is one per frame in nearly every file."""
    # cheap, as nothing is decoded; the number of frames that a container states may be wrong
    with _open(path) as container:
        packets = container.demux(_video_stream(path, container))
        return sum(1 for packet in packets if packet.size and not packet.is_discard)


def _decode_frames(path: Path, indices: np.ndarray, size: int, cut: bool) -> tuple[list[np.ndarray], int]:
    """Decode a whole video; return its frames at `indices`, uint8 `[size, size, 3]` each, and its number of frames.

    Args:
        cut: the end of the file is missing, so an error there is the end.
    """
    kept: dict[int, np.ndarray] = {}
    wanted, decoded = set(indices.tolist()), 0
    with _open(path) as container:
        for frame in _decoded(container, _video_stream(path, container), cut):
            assert isinstance(frame, av.VideoFrame)  # for the type checker
            if decoded in wanted:
                # one thread, as several files are decoded at once already
                pixels = frame.to_ndarray(format="rgb24", width=size, height=size, interpolation="BICUBIC", threads=1)
                kept[decoded] = _as_displayed(pixels, frame)
            decoded += 1  # by counting, not by seeking, which is inexact in many containers
    return [kept[i] for i in indices.tolist() if i in kept], decoded


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream, cut: bool
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Decode a stream. Where the file is cut, the packet at the cut is left out: it would decode to noise."""
    try:
        for packet in container.demux(stream):
            if not (cut and packet.is_corrupt):
                yield from packet.decode()  # type: ignore[misc]  # frames of this stream's type
    except av.FFmpegError:
        if not cut:
            raise


def _as_displayed(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror a square picture as the frame's display matrix says, to the nearest quarter turn.

    The matrix takes a pixel (x, y) to (a·x + c·y, b·x + d·y), as FFmpeg's `libavutil/display.h` defines it.
    """
    side_data: Any = frame.side_data
    side = side_data.get(SideDataType.DISPLAYMATRIX)
    if side is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].astype(np.int64)
    if max(abs(a), abs(d)) < max(abs(b), abs(c)):  # x and y change places
        pixels, to_left, upwards = pixels.swapaxes(0, 1), c < 0, b < 0
    else:
        to_left, upwards = a < 0, d < 0
    return pixels[:: -1 if upwards else 1, :: -1 if to_left else 1]


# --- sound -----------------------------------------------------------------------------------------------------------


def _sound(path: str | Path, truncated: bool) -> Iterator[np.ndarray]:
    """Decode a sound at 16 kHz, channels averaged, in blocks: float32 `[n]` each. Errors as in `read_audio`."""
    path = _existing(path)
    cut = _check_whole(path, truncated)
    empty = True
    for block in _resampled(path, cut):
        if not np.isfinite(block).all():
            raise MediaError(path, "the sound holds NaN or infinite samples", "Export it again as 16-bit PCM")
        empty = empty and not len(block)
        yield block
    if empty:
        raise MediaError(path, "the audio stream holds no sound", "Record or download it again, or remove the sample")


def _resampled(path: Path, cut: bool) -> Iterator[np.ndarray]:
    with _open(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            raise MediaError(
                path, "it has no audio stream", "Give the sample a wav, or leave audio out of the modalities"
            )
        assert isinstance(stream, av.AudioStream)  # for the type checker
        start, duration = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
        resampler: av.AudioResampler | None = None
        setup: tuple[str, str, int] | None = None
        elapsed: float | None = None  # seconds from the file's start to the end of the last frame; None before it
        for frame in _decoded(container, stream, cut):
            assert isinstance(frame, av.AudioFrame)  # for the type checker
            time = elapsed or 0.0 if frame.time is None else frame.time - start
            gap = time - (elapsed or 0.0)
            # at the start every gap counts; a time stamp beyond the file's length is wrong, and says nothing
            if gap > (0.0 if elapsed is None else GAP) and time <= duration:
                yield from _averaged(resampler, None)
                resampler = setup = None
                yield from _silence(round(gap * SAMPLE_RATE))
                elapsed = time
            elapsed = (elapsed or 0.0) + frame.samples / frame.sample_rate
            if (frame.format.name, frame.layout.name, frame.sample_rate) != setup:  # may change within a file
                # the old resampler holds back samples until it is flushed
                yield from _averaged(resampler, None)
                # packed: PyAV reads planes beyond the eighth, which planar formats of many channels have, out of bounds
                resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=SAMPLE_RATE)
                setup = (frame.format.name, frame.layout.name, frame.sample_rate)
            yield from _averaged(resampler, frame)
        yield from _averaged(resampler, None)


def _averaged(resampler: av.AudioResampler | None, frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
    """Push a frame (None flushes) and give the resampled blocks, channels averaged: float32 `[n]` each."""
    for out in resampler.resample(frame) if resampler else ():
        yield out.to_ndarray().reshape(-1, out.layout.nb_channels).mean(axis=1, dtype=np.float32)


def _silence(samples: int) -> Iterator[np.ndarray]:
    """Give blocks of zeros, a second each, so that a long hole needs no memory."""
    for begin in range(0, samples, SAMPLE_RATE):
        yield np.zeros(min(SAMPLE_RATE, samples - begin), np.float32)


def _cut(blocks: Iterable[np.ndarray], starts: list[int]) -> np.ndarray:
    """Cut clips out of a waveform that comes in blocks: float32 `[8, 32000]`, zero where the waveform has ended."""
    clips = np.zeros((len(starts), CLIP_SAMPLES), np.float32)
    begin = 0
    for block in blocks:
        end = begin + len(block)
        for clip, start in zip(clips, starts, strict=True):
            first, last = max(begin, start), min(end, start + CLIP_SAMPLES)
            if first < last:
                clip[first - start : last - start] = block[first - begin : last - begin]
        begin = end
    return clips


def _normalised(clips: np.ndarray) -> np.ndarray:
    """Centre each clip, and scale all together to unit variance."""
    # float64: sums over 256,000 samples lose digits in float32
    wide = clips.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    wide = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-7)  # the 1e-7 is Wav2Vec2FeatureExtractor's
    return wide.astype(np.float32)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
