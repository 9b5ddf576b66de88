"""Real files, written by FFmpeg, read back into what the encoders take."""

import itertools
import os
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from affectgpt.data import media
from affectgpt.data.media import (
    MediaError,
    TruncatedError,
    audio_clips,
    frame_indices,
    read_audio,
    read_faces,
    read_frames,
    read_image,
    read_waveform,
)

RATE = 16_000


def gray(index, shape=(48, 64)):
    """A frame whose brightness tells its index."""
    return np.full((*shape, 3), 10 + 7 * index, np.uint8)


def write_video(path, frames, *, codec="libx264", pix_fmt="yuv420p", pts=None, audio=None, starts=(0.0,), options=None):
    """An encoded video of RGB frames; `pts` in frames of 1/25 s; `audio` float [channels, n] at 16 kHz as AAC.

    The audio is played once from each of `starts`, in seconds.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else {})
        stream.height, stream.width = frames[0].shape[:2] if len(frames) else (48, 64)
        stream.pix_fmt = pix_fmt
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=RATE, layout="mono" if len(audio) == 1 else "stereo")
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (pts[index] if pts else index), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in starts:
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio, np.float32), "fltp", sound.layout)
                frame.sample_rate, frame.pts, frame.time_base = RATE, round(start * RATE), Fraction(1, RATE)
                container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return path


def write_sound(path, samples, *, rate=RATE, codec="pcm_s16le"):
    """An encoded sound of float samples [channels, n] in -1..1."""
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1", 16: "hexadecagonal", 24: "22.2"}[len(samples)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        # packed: PyAV does not reach the planes beyond the eighth
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T, np.float32).reshape(1, -1), "flt", layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return path


def tone(seconds, rate=RATE, frequency=200.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate))[None]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [0] * 8),
        (3, [0, 1, 2, 2, 2, 2, 2, 2]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (12, [0, 1, 3, 4, 6, 7, 9, 10]),
        (20, [0, 2, 5, 7, 10, 12, 15, 17]),
        (100, [0, 12, 25, 37, 50, 62, 75, 87]),
    ],
)
def test_frame_indices_are_uniform_and_repeat_the_last(length, expected):
    assert frame_indices(length).tolist() == expected


def test_frame_indices_stay_inside_for_every_length_and_count():
    for length, count in itertools.product(range(1, 130), (1, 3, 6, 7, 8, 49)):
        indices = frame_indices(length, count)
        assert indices.shape == (count,)
        assert indices[0] == 0
        assert indices[-1] < length
        assert (np.diff(indices) >= (1 if count <= length else 0)).all()


def test_frames_are_those_of_the_index_rule(tmp_path):
    frames = read_frames(write_video(tmp_path / "a.mp4", [gray(i) for i in range(20)]))
    assert frames.shape == (8, 224, 224, 3)
    assert frames.dtype == np.uint8
    expected = [10 + 7 * i for i in [0, 2, 5, 7, 10, 12, 15, 17]]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), expected, atol=2)


def test_frames_are_rgb_and_stretched_to_the_square(tmp_path):
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48] = (200, 30, 40)
    pixels[24:, 48:] = (20, 60, 220)
    frames = read_frames(write_video(tmp_path / "a.mp4", [pixels] * 3))
    np.testing.assert_allclose(frames[:, 112, 50], [(200, 30, 40)] * 8, atol=12)
    np.testing.assert_allclose(frames[:, 170, 170], [(20, 60, 220)] * 8, atol=12)
    np.testing.assert_allclose(frames[:, 50, 170], [(0, 0, 0)] * 8, atol=12)


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        # where the bright corner (top left) and the gray one (top right) go
        ((0, 1, -1, 0), ("top right", "bottom right")),  # turned by 90° clockwise
        ((-1, 0, 0, -1), ("bottom right", "bottom left")),
        ((0, -1, 1, 0), ("bottom left", "top left")),
        ((-1, 0, 0, 1), ("top right", "top left")),  # mirrored, as a phone's front camera does
        ((1, 0, 0, -1), ("bottom left", "bottom right")),
        ((0, 1, 1, 0), ("top left", "bottom left")),  # mirrored and turned
        ((0, -1, -1, 0), ("bottom right", "top right")),
    ],
)
def test_frames_stand_as_the_file_says_they_are_turned_and_mirrored(tmp_path, matrix, corners):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:] = 255, 120
    path = write_video(tmp_path / "a.mp4", [pixels] * 3)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):  # 16.16 fixed point
        data[start + place : start + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    frame = read_frames(path)[0, ..., 0]
    places = {"top left": (50, 50), "top right": (50, 170), "bottom right": (170, 170), "bottom left": (170, 50)}
    shown = {name: int(frame[place]) for name, place in places.items()}
    dark = [shown.pop(name) for name in places if name not in corners]
    assert max(dark) < 20
    assert [shown[name] for name in corners] == [pytest.approx(255, abs=12), pytest.approx(120, abs=12)]


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt", "shape"),
    [
        ("mp4", "libx264", "yuv420p", (48, 64)),
        ("mkv", "ffv1", "gray", (31, 45)),
        ("mkv", "ffv1", "yuv420p", (31, 45)),
        ("avi", "mjpeg", "yuvj420p", (33, 17)),
        ("webm", "libvpx-vp9", "yuv420p", (18, 34)),
        ("mp4", "libx264", "yuv444p", (49, 63)),
    ],
)
def test_other_codecs_odd_sizes_and_grayscale(tmp_path, suffix, codec, pix_fmt, shape):
    path = tmp_path / f"a.{suffix}"
    write_video(path, [gray(i, shape) for i in range(10)], codec=codec, pix_fmt=pix_fmt)
    means = read_frames(path).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, [10 + 7 * i for i in [0, 1, 2, 3, 5, 6, 7, 8]], atol=6)


def test_a_variable_frame_rate_counts_frames_not_seconds(tmp_path):
    pts = [0, 1, 2, 3, 40, 41, 42, 43, 90, 91, 92, 93, 94, 95, 96, 97]
    frames = read_frames(write_video(tmp_path / "a.mp4", [gray(i) for i in range(16)], pts=pts))
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [10 + 7 * i for i in range(0, 16, 2)], atol=2)


def test_a_wrong_count_of_frames_does_no_harm(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [gray(i) for i in range(20)])
    expected = read_frames(path)
    for lie in (0, 3, 19, 400):
        monkeypatch.setattr(media, "_count_packets", lambda path, lie=lie: lie)
        np.testing.assert_array_equal(read_frames(path), expected)


def test_frames_of_a_long_video_do_not_pile_up_in_memory(tmp_path):
    path = write_video(tmp_path / "a.mp4", [gray(i % 30) for i in range(300)])
    read_frames(path)
    tracemalloc.start()
    read_frames(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 224 * 224 * 3  # 8 frames as decoded, and stacked; all 300 would be 45 MB


def test_a_waveform_is_cut_at_the_stated_starts():
    waveform = np.random.default_rng(0).normal(size=5 * RATE).astype(np.float32)
    clips = audio_clips(waveform)
    assert clips.shape == (8, 32_000)
    assert clips.dtype == np.float32
    starts = [0, 6857, 13714, 20571, 27428, 34285, 41142, 48_000]  # i · (5 − 2) / 7 seconds, in samples, rounded down
    for clip, start in zip(clips, starts, strict=True):
        assert np.corrcoef(clip, waveform[start : start + 32_000])[0, 1] > 0.9999


def test_clips_are_normalised_together_but_centred_each():
    waveform = np.concatenate([0.1 + 0.01 * tone(8)[0], 0.2 + 0.4 * tone(8)[0]])
    clips = audio_clips(waveform)
    np.testing.assert_allclose(clips.mean(axis=1), 0, atol=1e-5)
    assert clips.std() == pytest.approx(1, abs=1e-4)
    assert clips[-1].std() / clips[0].std() == pytest.approx(40, rel=1e-3)  # loudness within a sample is kept


def test_a_tenth_of_a_second_is_padded_with_zeros(tmp_path):
    clips = read_audio(write_sound(tmp_path / "a.wav", tone(0.1)))
    assert clips.shape == (8, 32_000)
    np.testing.assert_array_equal(clips, np.broadcast_to(clips[0], clips.shape))
    assert np.ptp(clips[0, 1600:]) == 0
    assert np.ptp(clips[0, :1600]) > 10


def test_silence_is_zeros(tmp_path):
    np.testing.assert_array_equal(read_audio(write_sound(tmp_path / "a.wav", np.zeros((1, 40_000)))), 0)


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "tolerance"),
    [
        ("wav", "pcm_s16le", 16_000, 1e-3),
        ("wav", "pcm_u8", 16_000, 0.02),
        ("wav", "pcm_s24le", 48_000, 0.01),
        ("wav", "pcm_f32le", 44_100, 0.01),
        ("wav", "pcm_s16le", 8_000, 0.01),
        ("mp3", "libmp3lame", 44_100, 0.1),
        ("flac", "flac", 22_050, 0.01),
    ],
)
def test_any_rate_and_sample_format_gives_the_same_sound(tmp_path, suffix, codec, rate, tolerance):
    clips = read_audio(write_sound(tmp_path / f"a.{suffix}", tone(3, rate), rate=rate, codec=codec))
    expected = audio_clips(tone(3)[0].astype(np.float32))
    middle = slice(4_000, 28_000)  # codecs and resamplers ring at the ends; mp3 may be early by its encoder's delay
    for clip, wanted in zip(clips, expected, strict=True):
        phase = np.exp(-2j * np.pi * 200 * np.arange(24_000) / RATE)
        amplitude = 2 * abs((clip[middle] * phase).mean())
        assert amplitude == pytest.approx(2 * abs((wanted[middle] * phase).mean()), rel=0.03)
        assert (clip[middle] ** 2).mean() == pytest.approx(amplitude**2 / 2, rel=tolerance)


@pytest.mark.parametrize("channels", [2, 6, 8, 16, 24])
def test_channels_are_averaged(tmp_path, channels):
    samples = np.stack([tone(3, frequency=100 * (i + 1), amplitude=0.5)[0] for i in range(channels)])
    waveform = read_waveform(write_sound(tmp_path / "a.wav", samples, codec="pcm_f32le"))
    np.testing.assert_allclose(waveform, samples.mean(axis=0), atol=1e-5)


def test_sound_of_an_mp4_is_its_own_track(tmp_path):
    path = write_video(tmp_path / "a.mp4", [gray(0)] * 75, audio=tone(3))
    waveform = media.read_waveform(path)
    assert len(waveform) == pytest.approx(3 * RATE, abs=2048)
    spectrum = np.abs(np.fft.rfft(waveform[4000:36_000]))
    assert spectrum.argmax() * RATE / 32_000 == pytest.approx(200, abs=1)
    assert waveform.std() == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("flac", "flac")])
def test_eight_channels_of_planes_are_averaged(tmp_path, suffix, codec):
    samples = np.repeat(tone(2), 8, axis=0)
    waveform = read_waveform(write_sound(tmp_path / f"a.{suffix}", samples, codec=codec))
    assert np.abs(waveform[2000:30_000]).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_stays_beside_its_picture(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", [gray(0)] * 200, audio=tone(1), starts=(1.5, 5.0))
    waveform = read_waveform(path)
    assert len(waveform) == pytest.approx(6 * RATE, abs=2048)
    loud = [np.abs(waveform[round(second * RATE) :][: RATE // 2]).max() for second in (0.5, 1.75, 3.5, 5.25)]
    assert loud == [0, pytest.approx(0.5, abs=0.1), pytest.approx(0, abs=0.01), pytest.approx(0.5, abs=0.1)]


def test_a_wrong_time_stamp_makes_no_silence(tmp_path):
    path = write_video(tmp_path / "a.mkv", [gray(0)] * 50, audio=tone(2))
    data = bytearray(path.read_bytes())
    place = data.index(b"\x1f\x43\xb6\x75")  # the first cluster; its time stamp is all of its blocks'
    stamp = data.index(b"\xe7\x81", place) + 2
    data[stamp] = 0xFF
    duration = data.index(b"\x44\x89\x88") + 3
    data[duration : duration + 8] = np.array(100.0, ">f8").tobytes()  # 0.1 s: less than the stamp
    path.write_bytes(data)
    assert len(read_waveform(path)) == pytest.approx(2 * RATE, abs=2048)


def test_a_long_sound_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "HELD_SAMPLES", 4 * RATE)
    sound = 0.1 * np.random.default_rng(0).normal(size=(1, 60 * RATE))
    path = write_sound(tmp_path / "a.wav", sound)
    tracemalloc.start()
    clips = read_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # eight clips, also in float64; all 60 seconds three times over would be 11.5 MB
    np.testing.assert_array_equal(clips, audio_clips(read_waveform(path)))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for reader, name in itertools.product(
        (read_frames, read_audio, read_waveform, read_faces, read_image), os.listdir(tmp_path)
    ):
        with pytest.raises(MediaError, match=r"a pipe, a socket or a device, not a file\. Put a regular file there"):
            reader(tmp_path / name)
    write_sound(tmp_path / "a.wav", tone(1))
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    assert len(read_waveform(tmp_path / "link.wav")) == RATE


def write_cut_files(folder):
    """(reader, file) of each container that states its length."""
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(50)]
    # faststart: the index in front, as files for downloads have it
    film = write_video(folder / "a.mp4", frames, audio=tone(2), options={"movflags": "faststart"})
    yield from ((read_frames, film), (read_audio, film))
    yield read_frames, write_video(folder / "a.webm", frames, codec="libvpx-vp9")
    for suffix in ("mkv", "avi"):
        yield read_frames, write_video(folder / f"a.{suffix}", frames, audio=tone(2))
    for suffix, codec in (("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("aiff", "pcm_s16be")):
        sound = tone(2) + 0.1 * noise.normal(size=(1, 2 * RATE))
        yield read_audio, write_sound(folder / f"a.{suffix}", sound, codec=codec)


def test_a_file_whose_end_is_missing_is_refused_or_read_as_far_as_it_goes(tmp_path):
    for reader, path in write_cut_files(tmp_path):
        whole = path.read_bytes()
        expected = reader(path)
        np.testing.assert_array_equal(reader(path, truncated=True), expected)
        for tenths in (3, 8):
            path.write_bytes(whole[: len(whole) * tenths // 10])
            with pytest.raises(TruncatedError, match=r"its end is missing: .*set data\.truncated to keep"):
                reader(path)
            kept = reader(path, truncated=True)
            assert kept.shape == expected.shape
            assert (kept != expected).any()
        path.write_bytes(whole)


def test_a_wav_of_unknown_length_is_whole(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(1))
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    for unknown in (0xFFFFFFFF, 0x7FFFFFFF):  # what programs write that write to a pipe
        data[4:8] = data[place : place + 4] = unknown.to_bytes(4, "little")
        path.write_bytes(data)
        assert len(read_waveform(path)) == pytest.approx(RATE, abs=64)


def faces_file(path, count=20, **save):
    faces = np.stack([gray(i, (112, 112)) for i in range(count)])
    faces[..., 2] = 0  # no blue
    np.save(path, faces, **save)
    return path


def test_faces_follow_the_index_rule_and_the_channel_order(tmp_path):
    path = faces_file(tmp_path / "a.npy")
    expected = [10 + 7 * i for i in [0, 2, 5, 7, 10, 12, 15, 17]]
    faces = read_faces(path)
    assert faces.shape == (8, 224, 224, 3)
    assert faces.dtype == np.uint8
    for channel, wanted in enumerate([expected, expected, [0] * 8]):
        np.testing.assert_array_equal(faces[..., channel], np.array(wanted)[:, None, None] * np.ones((1, 224, 224)))
    np.testing.assert_array_equal(read_faces(path, "bgr"), faces[..., ::-1])
    with pytest.raises(ValueError, match="face_channel_order is 'grb'; it can be 'rgb' or 'bgr'"):
        read_faces(path, "grb")


def test_faces_are_resized_bilinearly_about_pixel_centres(tmp_path):
    faces = np.zeros((1, 112, 112, 3), np.uint8)
    faces[0, 50, 60] = 160
    np.save(tmp_path / "a.npy", faces)
    patch = read_faces(tmp_path / "a.npy")[0, 99:103, 119:123, 0]
    weights = np.array([0.25, 0.75, 0.75, 0.25])
    np.testing.assert_array_equal(patch, np.outer(weights, weights) * 160)


def test_an_image_is_turned_as_its_exif_says_and_loses_its_alpha(tmp_path):
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:30, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to show
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (1, 224, 224, 3)
    assert image[0, 50, 170].min() > 200
    assert image[0, 50, 50].max() < 50
    Image.new("LA", (5, 7), (90, 255)).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), np.full((1, 224, 224, 3), 90))


def save_pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def broken_files(folder):
    """(reader, path, words of the error) for files that are no good."""
    video = write_video(folder / "good.mp4", [gray(i) for i in range(10)], audio=tone(1))
    sound = write_sound(folder / "good.wav", tone(1))
    silent = write_video(folder / "silent.mp4", [gray(0)] * 5)
    faces = faces_file(folder / "good.npy")
    for reader, suffix, good in ((read_frames, "mp4", video), (read_audio, "wav", sound), (read_faces, "npy", faces)):
        yield reader, folder / f"absent.{suffix}", "no such file. Check the dataset's root"
        for name, content in (
            ("empty", b""),
            ("text", b"not media at all\n" * 20),
            ("half", good.read_bytes()[: 40 if suffix == "wav" else len(good.read_bytes()) // 2]),
        ):
            path = folder / f"{name}.{suffix}"
            path.write_bytes(content)
            yield reader, path, "not a readable .npy file" if suffix == "npy" else "corrupt or not a media file"
    yield read_audio, silent, "it has no audio stream. Give the sample a wav"
    yield read_frames, sound, "it has no video stream. Give a video file"
    yield read_frames, folder, "a folder, not a file"
    with wave.open(str(folder / "nothing.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    yield read_audio, folder / "nothing.wav", "the audio stream holds no sound"
    write_sound(folder / "nan.wav", np.full((1, 3000), np.nan), codec="pcm_f32le")
    yield read_audio, folder / "nan.wav", "the sound holds NaN or infinite samples"
    for name, array in (
        ("floats", np.zeros((3, 112, 112, 3), np.float32)),
        ("gray", np.zeros((3, 112, 112), np.uint8)),
        ("planar", np.zeros((3, 3, 112, 112), np.uint8)),
        ("none", np.zeros((0, 112, 112, 3), np.uint8)),
    ):
        np.save(folder / f"{name}.npy", array)
        yield read_faces, folder / f"{name}.npy", f"it holds {array.dtype} {list(array.shape)}, not faces"
    save_pickled(folder / "pickled.npy")
    yield read_faces, folder / "pickled.npy", "it holds object [1], not faces"
    (folder / "text.png").write_bytes(b"no picture")
    yield read_image, folder / "text.png", "not a readable image"
    yield read_image, folder / "absent.png", "no such file"


def test_every_bad_file_is_named_with_its_reason_and_a_fix(tmp_path):
    for reader, path, words in broken_files(tmp_path):
        with pytest.raises(MediaError) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: "), path
        assert words in str(caught.value), path
        assert caught.value.path == path
        assert caught.value.reason
        assert caught.value.fix


def test_a_video_without_a_frame_says_so(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        container.start_encoding()
    with pytest.raises(MediaError, match="the video holds no frame"):
        read_frames(path)


def test_random_damage_gives_arrays_or_media_errors_and_nothing_else(tmp_path):
    files = [
        (read_frames, write_video(tmp_path / "a.mp4", [gray(i) for i in range(10)])),
        (read_audio, write_video(tmp_path / "b.mp4", [gray(0)] * 5, audio=tone(1))),
        (read_audio, write_sound(tmp_path / "c.wav", tone(0.3))),
        (read_faces, faces_file(tmp_path / "d.npy", 2)),
    ]
    rng = np.random.default_rng(0)
    outcomes = set()
    for reader, path in files:
        good = np.frombuffer(path.read_bytes(), np.uint8)
        for trial in range(15):
            bad = good.copy()
            where = rng.integers(0, len(bad) if trial % 2 else min(len(bad), 400), size=8)
            bad[where] = rng.integers(0, 256, size=8)
            path.write_bytes(bad.tobytes())
            try:
                outcomes.add(len(reader(path)))
            except MediaError:
                outcomes.add("error")
    assert outcomes == {8, "error"}
