"""Read video frames, faces, sound and images from files into the arrays that the encoders take.

The sampling rules are AffectGPT's (MERTools, `MER2025_Track23/my_affectgpt`): 8 uniform frames by index, and 8 clips of
two seconds. All functions raise `MediaError`, which names the file, the fault and the fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import av
import numpy as np
import torch
from PIL import Image, ImageOps

ChannelOrder = Literal["rgb", "bgr"]

NUM_STEPS = 8  # frames, faces and sound clips of one sample
FRAME_SIZE = 224
SAMPLE_RATE = 16_000
CLIP_SAMPLES = 2 * SAMPLE_RATE


class MediaError(Exception):
    """A media file cannot be used; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str, fix: str) -> None:
        super().__init__(f"{path}: {reason}. {fix}.")
        self.path, self.reason, self.fix = Path(path), reason, fix


def frame_indices(length: int, count: int = NUM_STEPS) -> np.ndarray:
    """Choose `count` of `length` ≥ 1 frames, uniformly from 0: int64 `[count]`; too few are padded with the last one.

    `arange(0, L, L / min(count, L))` rounded down, as upstream's video processor does.
    """
    taken = min(count, length)
    indices = np.arange(0, length, length / taken).astype(np.int64)[:taken]
    return np.pad(indices, (0, count - taken), mode="edge")


def read_frames(path: str | Path, count: int = NUM_STEPS, size: int = FRAME_SIZE) -> np.ndarray:
    """Read uniformly spaced frames of a video: uint8 RGB `[count, size, size, 3]`.

    Each frame is stretched to the square (ignoring its aspect) by swscale's bicubic filter, and rotated by the file's
    rotation. Only the chosen frames are kept, so memory does not grow with the length of the video.

    Raises:
        MediaError: the file is missing or corrupt, or has no video stream or no frame.
    """
    path = _existing(path)
    # counted first: to choose frames while decoding, the number of frames must be known before the first one
    length = _count_packets(path)
    taken, decoded = _decode_frames(path, frame_indices(max(length, 1), count), size)
    if decoded and decoded != length:  # hidden or broken packets: decode again, with the true number of frames
        taken, decoded = _decode_frames(path, frame_indices(decoded, count), size)
    if not decoded:
        raise MediaError(path, "the video holds no frame", "Record or download it again, or remove the sample")
    return np.stack(taken)


def read_audio(path: str | Path) -> np.ndarray:
    """Read the sound of a wav, mp4 or any other file with an audio stream: float32 `[8, 32000]`, see `audio_clips`.

    It needs 64 kB of memory per second of sound.

    Raises:
        MediaError: the file is missing or corrupt, has no audio stream or no samples, or some are NaN or infinite.
    """
    return audio_clips(read_waveform(path))


def read_waveform(path: str | Path) -> np.ndarray:
    """Read an audio stream at 16 kHz, averaging its channels: float32 `[n]`, n ≥ 1. Errors as in `read_audio`."""
    path = _existing(path)
    chunks: list[np.ndarray] = []
    with _open(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            raise MediaError(
                path, "it has no audio stream", "Give the sample a wav, or leave audio out of the modalities"
            )
        resampler: av.AudioResampler | None = None
        setup: tuple[str, str, int] | None = None
        for frame in container.decode(stream):
            assert isinstance(frame, av.AudioFrame)  # for the type checker: the stream is an audio stream
            if (frame.format.name, frame.layout.name, frame.sample_rate) != setup:  # may change within a file
                # the old resampler holds back samples until it is flushed
                chunks += _resampled(resampler, None)
                resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=SAMPLE_RATE)
                setup = (frame.format.name, frame.layout.name, frame.sample_rate)
            chunks += _resampled(resampler, frame)
        chunks += _resampled(resampler, None)
    waveform = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    if not waveform.size:
        raise MediaError(path, "the audio stream holds no sound", "Record or download it again, or remove the sample")
    if not np.isfinite(waveform).all():
        raise MediaError(path, "the sound holds NaN or infinite samples", "Export it again as 16-bit PCM")
    return waveform


def audio_clips(waveform: np.ndarray) -> np.ndarray:
    """Cut a 16 kHz waveform `[n]` into 8 clips of 2 s and normalise them: float32 `[8, 32000]`.

    Clip i starts at i·(duration − 2)/7 seconds; a shorter waveform is zero-padded to 2 s. Each clip is centred, then
    the eight are normalised together to zero mean and unit variance. (Upstream's feature extractor normalises over the
    whole batch; over one sample, as here, is what it does in inference, and does not depend on the other samples.)
    """
    waveform = np.pad(waveform, (0, max(0, CLIP_SAMPLES - len(waveform))))
    starts = [i * (len(waveform) - CLIP_SAMPLES) // (NUM_STEPS - 1) for i in range(NUM_STEPS)]
    # float64: sums over 256,000 samples lose digits in float32
    clips = np.stack([waveform[start : start + CLIP_SAMPLES] for start in starts]).astype(np.float64)
    clips -= clips.mean(axis=1, keepdims=True)
    clips = (clips - clips.mean()) / np.sqrt(clips.var() + 1e-7)  # the 1e-7 is Wav2Vec2FeatureExtractor's
    return clips.astype(np.float32)


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
        raise ValueError(f"face_channel_order is {channel_order!r}; it can be 'rgb' or 'bgr'")
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


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file", "Check the dataset's root and that its archives are unpacked")
    return path


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


def _decode_frames(path: Path, indices: np.ndarray, size: int) -> tuple[list[np.ndarray], int]:
    """Decode a whole video; return its frames at `indices`, uint8 `[size, size, 3]` each, and its number of frames."""
    kept: dict[int, np.ndarray] = {}
    wanted, decoded = set(indices.tolist()), 0
    with _open(path) as container:
        for frame in container.decode(_video_stream(path, container)):
            if decoded in wanted:
                # one thread, as several files are decoded at once already
                pixels = frame.to_ndarray(format="rgb24", width=size, height=size, interpolation="BICUBIC", threads=1)
                kept[decoded] = np.rot90(pixels, round(frame.rotation / 90))
            decoded += 1  # by counting, not by seeking, which is inexact in many containers
    return [kept[i] for i in indices.tolist() if i in kept], decoded


def _resampled(resampler: av.AudioResampler | None, frame: av.AudioFrame | None) -> list[np.ndarray]:
    """Push a frame (None flushes) and return the resampled chunks, channels averaged: float32 `[n]` each."""
    if resampler is None:
        return []
    return [out.to_ndarray().mean(axis=0, dtype=np.float32) for out in resampler.resample(frame)]


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
