"""Synthetic clips are real files, repeatable, split over channels as they say, and told apart by the tiny encoders."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from affectgpt.data.datasets import load_mer2025
from affectgpt.data.media import read_audio, read_faces, read_frames
from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.synthetic import dataset, face, make_dataset, read_truth, shuffle_media, tiny_encoders, tiny_llm, voice
from affectgpt.synthetic.ceiling import ceilings
from affectgpt.synthetic.emotions import EMOTIONS, IRONIC
from affectgpt.synthetic.tiny_models import make_tiny_models

TRAIN, TEST = 6, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("clips"), seed=3, train=TRAIN, test=TEST, workers=1)


@pytest.fixture(scope="module")
def scripts():
    return dataset.write_scripts(0, 400, 150)


def test_same_seed_gives_same_bytes_and_another_seed_does_not(root, tmp_path):
    again = make_dataset(tmp_path / "again", seed=3, train=TRAIN, test=TEST, workers=2)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert len(files) == 3 * (TRAIN + TEST) + 6
    for path in files:
        assert (again / path).read_bytes() == (root / path).read_bytes(), path
    other = dataset.film(dataset.write_scripts(4, 1, 0)[0])
    assert not np.array_equal(other[0][0], dataset.film(read_truth(root)[0])[0][0])


def test_a_finished_folder_is_kept_and_a_foreign_one_refused(root, tmp_path):
    before = (root / "manifest.json").stat().st_mtime_ns
    make_dataset(root, seed=3, train=TRAIN, test=TEST)
    assert (root / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        make_dataset(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_another_data_set_is_never_made_over_one_that_a_run_may_still_need(root):
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for other in ({"seed": 4}, {"seed": 3, "test": TEST + 1}):
        with pytest.raises(FileExistsError, match="holds a synthetic data set of other seed, sizes or version"):
            make_dataset(root, **{"train": TRAIN, "test": TEST} | other)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == kept


def test_an_interrupted_data_set_is_made_again_beside_what_a_user_put_there(root, tmp_path):
    (tmp_path / "video").mkdir()
    (tmp_path / "video/half.mp4").write_text("")
    (tmp_path / "truth.jsonl").write_text("")
    (tmp_path / "thesis.txt").write_text("mine")
    make_dataset(tmp_path, seed=3, train=TRAIN, test=TEST)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "video").iterdir()} == {path.name for path in (root / "video").iterdir()}


def test_other_tiny_models_are_not_made_over_those_that_an_adapter_may_need(tmp_path):
    (tmp_path / "manifest.json").write_text('{"seed": 1}')
    (tmp_path / "llm").mkdir()
    with pytest.raises(FileExistsError, match="holds tiny models of another seed or version"):
        make_tiny_models(tmp_path, seed=0)
    assert (tmp_path / "llm").is_dir()


def test_the_ordinary_loader_and_decoders_read_every_clip(root):
    samples = load_mer2025(root, reasons="track3_train_ovmerd.csv")
    held_out = load_mer2025(root, labels="track2_test.csv")
    assert (len(samples), len(held_out)) == (TRAIN, TEST)
    assert not {s.name for s in samples} & {s.name for s in held_out}
    for sample in (*samples, *held_out):
        assert 1 <= len(parse_labels(sample.labels, "strict")) <= 5
        assert sample.subtitle
        assert read_frames(sample.video).shape == (8, 224, 224, 3)
        assert read_faces(sample.face).shape == (8, 224, 224, 3)
        heard, heard_in_video = read_audio(sample.audio), read_audio(sample.video)
        assert heard.shape == heard_in_video.shape == (8, 32000)
        with av.open(str(sample.video)) as container:
            assert container.streams.video[0].codec_context.name in ("h264", "mpeg4")
            assert container.streams.audio[0].rate == 16000
    assert all("seems" in s.reason for s in samples)


def test_the_video_shows_what_was_drawn(root):
    script = read_truth(root)[0]
    frames, faces, _ = dataset.film(script)
    with av.open(str(root / "video" / f"{script.name}.mp4")) as container:
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    stored = np.load(root / "openface_face" / script.name / f"{script.name}.npy")
    np.testing.assert_array_equal(stored, faces)
    assert stored.dtype == np.uint8


def test_what_is_only_heard_cannot_be_seen_and_the_other_way_round(scripts):
    """Pictures depend on the face channel alone, sound on the voice channel alone, to the last bit."""
    script = replace(scripts[0], channels={"voice": "anger"})
    plain = dataset.film(replace(script, channels={}))
    for channel, same, other in (("voice", 0, 2), ("face", 2, 0)):
        for emotion in EMOTIONS:
            clip = dataset.film(replace(script, channels={channel: emotion}))
            np.testing.assert_array_equal(clip[same], plain[same])
            assert not np.array_equal(clip[other], plain[other])


def test_who_is_cast_says_nothing_about_the_emotion(scripts):
    people = [dataset.cast(s) for s in scripts]
    rows = [[*np.hstack([v for v in vars(who).values()]), *vars(speaker).values(), t] for who, speaker, t in people]
    traits = np.array(rows)
    traits = (traits - traits.mean(0)) / traits.std(0)
    for channel in ("face", "voice"):
        shown = np.array([s.channels.get(channel, "plain") for s in scripts])
        for emotion in set(shown):
            chosen = traits[shown == emotion]
            assert np.abs(chosen.mean(0) * len(chosen) ** 0.5).max() < 4.5, (channel, emotion)


def test_expressions_move_the_drawn_features():
    who = face.Appearance.random(np.random.default_rng(0))
    rest = {name: np.zeros(1, np.float32) for name in face.EXPRESSION}
    calm = face.render(rest, who)[0].astype(int)
    for name in face.EXPRESSION:
        moved = face.render(rest | {name: np.ones(1, np.float32)}, who)[0]
        assert (np.abs(moved - calm).max(-1) > 12).sum() > 20, name


@pytest.mark.parametrize("semitones", [-5, 0, 5])
def test_the_voice_has_the_pitch_that_was_asked_for(semitones):
    who = voice.Speaker(base_pitch=160.0, tract=1.0, room=0.003)
    tone = voice.REST | {"pitch": semitones, "pitch_range": 0.0, "pitch_slope": 0.0, "roughness": 0.0}
    sound = voice.speak(tone, who, 2.0, np.random.default_rng(0))
    assert sound.shape == (32000,)
    assert 0.5 < np.abs(sound).max() <= 1
    correlation = np.fft.irfft(np.abs(np.fft.rfft(sound, 65536)) ** 2)
    lags = np.arange(50, 160)  # 320 … 100 Hz
    assert 16000 / lags[correlation[lags].argmax()] == pytest.approx(160 * 2 ** (semitones / 12), rel=0.02)


def test_every_word_is_on_the_wheels_beside_its_emotions_first_word():
    wheel = EmotionWheel.default()
    for emotion in EMOTIONS.values():
        first = wheel.clusters(emotion.words[0])
        for word in emotion.words:
            agree = sum(a == b for a, b in zip(first, wheel.clusters(word), strict=True) if a is not None)
            assert agree > sum(a is not None for a in first) / 2, word
    assert len({wheel.clusters(e.words[0]) for e in EMOTIONS.values()}) == len(EMOTIONS)
    assert sum(e.share for e in EMOTIONS.values()) == pytest.approx(1)


def test_cues_are_split_over_channels_and_labels_vary(scripts):
    carriers = Counter(tuple(s.channels) for s in scripts if len(set(s.channels.values())) == 1)
    assert all(carriers[c] > 30 for c in (("face",), ("voice",), ("face", "voice"), ("words",)))
    assert 0.25 < np.mean([len(set(s.channels.values())) == 2 for s in scripts]) < 0.45
    assert {len(s.labels) for s in scripts} == {1, 2, 3, 4, 5}
    ironic = [s for s in scripts if s.ironic]
    assert ironic
    for s in ironic:
        felt = set(s.channels.values())
        assert "words" not in s.channels
        assert len(felt) == 1
        assert felt <= set(IRONIC)
    assert all(sum(s.probabilities.values()) == pytest.approx(1) for s in scripts)


def test_a_constant_answer_scores_low_and_the_best_one_high(tmp_path, scripts):
    lines = (json.dumps(vars(s)) + "\n" for s in scripts)
    (tmp_path / "truth.jsonl").write_text("".join(lines))
    scores = ceilings(tmp_path, panels=16)
    assert scores["constant"] < 42
    assert scores["best"] > 80
    assert scores["constant"] < scores["annotators"] < scores["best"]


def test_shuffled_media_swap_whole_clips_and_keep_labels(root):
    samples = load_mer2025(root)
    shuffled = shuffle_media(samples, seed=0)
    for before, after in zip(samples, shuffled, strict=True):
        assert (after.name, after.labels) == (before.name, before.labels)
        assert after.video != before.video
        donor = next(s for s in samples if s.video == after.video)
        assert (after.audio, after.face, after.subtitle) == (donor.audio, donor.face, donor.subtitle)
    assert {s.video for s in shuffled} == {s.video for s in samples}
    with pytest.raises(ValueError, match="two or more"):
        shuffle_media(samples[:1], seed=0)


def test_taught_encoders_measure_what_random_ones_cannot():
    """A short lesson already explains variance of the parameters (the readout of untrained features stays near 1)."""
    torch.manual_seed(0)
    assert tiny_encoders.teach_clip(tiny_encoders.tiny_clip(), seed=0, images=384, epochs=4) < 0.95
    assert tiny_encoders.teach_hubert(tiny_encoders.tiny_hubert(), seed=0, utterances=128, epochs=5) < 0.92


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_llm.make_tokenizer(0)


def test_tokenizer_writes_any_text_and_knows_chatml_and_the_labels(tokenizer):
    for text in ("happy, ecstatic\n", "naïve 高兴 🙂 <|x|> ###"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    words = [word for emotion in EMOTIONS.values() for word in emotion.words]
    assert np.mean([len(tokenizer(f" {word}")["input_ids"]) == 1 for word in words]) > 0.9


def test_pretraining_teaches_the_llm_next_words(tokenizer):
    torch.manual_seed(0)
    model = tiny_llm.make_llm(tokenizer)
    untaught = tiny_llm.pretrain(model, tokenizer, seed=0, steps=30)
    assert tiny_llm.pretrain(model, tokenizer, seed=1, steps=30) < untaught - 0.1
