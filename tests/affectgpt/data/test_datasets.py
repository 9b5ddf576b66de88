"""Layouts on disk, as published, and what a table may get wrong."""

import json

import pytest

from affectgpt.data.datasets import Sample, load_folder, load_jsonl, load_mer2025, load_mer2026, load_ovmerd_plus


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def mer2025(tmp_path):
    root = tmp_path / "mer2025-dataset"
    for folder in ("video", "audio", "openface_face"):
        (root / folder).mkdir(parents=True)
    write(
        root / "subtitle_chieng.csv",
        "name,chinese,english\n"
        'samplenew3_01,"你好，世界","Hello, ""world"""\n'
        "sample_02,,\n"
        "sample_03,好,nan\n"
        "sample_99,多余,surplus\n",
    )
    write(
        root / "track2_train_ovmerd.csv",
        "name,openset\n"
        'samplenew3_01,"[concern, pessimism]"\n'
        "sample_02,\"['happy', 'proud']\"\n"
        "sample_03,[]\n"
        'sample_04,"happy,sad"\n'
        "sample_05,\n",
    )
    write(root / "track3_train_ovmerd.csv", 'name,reason\nsamplenew3_01,"He frowns,\nthen sighs."\nsample_02,\n')
    write(root / "track_all_candidates.csv", "name\nsample_02\nsample_03\n")
    return root


def test_mer2025_gives_paths_subtitles_and_labels_as_they_stand(mer2025):
    samples = load_mer2025(mer2025, reasons="track3_train_ovmerd.csv")
    assert samples[0] == Sample(
        "samplenew3_01",
        mer2025 / "video/samplenew3_01.mp4",
        mer2025 / "audio/samplenew3_01.wav",
        mer2025 / "openface_face/samplenew3_01/samplenew3_01.npy",
        'Hello, "world"',
        "[concern, pessimism]",
        "He frowns,\nthen sighs.",
    )
    assert [s.name for s in samples] == ["samplenew3_01", "sample_02", "sample_03", "sample_04", "sample_05"]
    assert [s.labels for s in samples[1:]] == ["['happy', 'proud']", "neutral", "happy,sad", "neutral"]
    assert [s.subtitle for s in samples[1:]] == ["", "", "", ""]
    assert [s.reason for s in samples[1:]] == [None] * 4


def test_the_subtitle_language_and_another_table_can_be_chosen(mer2025, tmp_path):
    table = write(tmp_path / "elsewhere" / "mine.csv", "\ufeffopenset, name\nsad,sample_03\n")
    (sample,) = load_mer2025(mer2025, table, subtitle_language="chinese")
    assert (sample.name, sample.labels, sample.subtitle) == ("sample_03", "sad", "好")
    candidates = load_mer2025(mer2025, "track_all_candidates.csv", labelled=False)
    assert [(s.name, s.labels) for s in candidates] == [("sample_02", None), ("sample_03", None)]


def test_a_folder_that_is_not_unpacked_means_that_part_is_absent(mer2025):
    (mer2025 / "audio").rmdir()
    (mer2025 / "openface_face").rmdir()
    sample = load_mer2025(mer2025)[0]
    assert (sample.audio, sample.face) == (None, None)
    assert sample.video == mer2025 / "video/samplenew3_01.mp4"
    (mer2025 / "video").rmdir()
    with pytest.raises(FileNotFoundError, match=r"none of video, audio, openface_face is there\. Unpack"):
        load_mer2025(mer2025)


def test_mer2026_has_the_same_layout(mer2025):
    (mer2025 / "track2_train_ovmerd.csv").rename(mer2025 / "track2_train_human.csv")
    assert load_mer2026(mer2025) == load_mer2025(mer2025, "track2_train_human.csv")


def test_ovmerd_plus_has_flat_faces_and_one_language(tmp_path):
    (tmp_path / "openface_face").mkdir()
    (tmp_path / "video").mkdir()
    write(tmp_path / "ovlabel.csv", "name,openset\nsample_1,\"['calm']\"\n")
    write(tmp_path / "subtitle_eng.csv", "name,sentence\nsample_1,Well then.\n")
    expected = Sample(
        "sample_1",
        tmp_path / "video/sample_1.mp4",
        None,
        tmp_path / "openface_face/sample_1.npy",
        "Well then.",
        "['calm']",
    )
    assert load_ovmerd_plus(tmp_path) == [expected]


def test_tables_that_are_missing_or_wrong_are_named(mer2025):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder\. Give the dataset's root"):
        load_mer2025(mer2025 / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such file"):
        load_mer2025(mer2025, "absent.csv")
    for text, words in (
        ("name,labels\na,happy\n", "no column openset. It has name, labels; wanted are name, openset."),
        ("", "no column name, openset. It has none; wanted are name, openset."),
        ("name,openset\na,x\nb,y\na,z\n", "'a' appears twice"),
        ("name,openset\n,x\n", "a row without a name"),
    ):
        path = write(mer2025 / "bad.csv", text)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
            load_mer2025(mer2025, "bad.csv")
        assert str(caught.value).startswith(f"{path}: {words}")
    (mer2025 / "bad.csv").write_bytes("name,openset\na,快乐\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"bad\.csv: not a csv in UTF-8"):
        load_mer2025(mer2025, "bad.csv")
    write(mer2025 / "subtitle_chieng.csv", "name,english\nsample_02,hi\n")
    with pytest.raises(ValueError, match=r"subtitle_chieng\.csv: no column chinese\. It has name, english"):
        load_mer2025(mer2025, subtitle_language="chinese")
    (mer2025 / "subtitle_chieng.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"subtitle_chieng\.csv: no such file"):
        load_mer2025(mer2025)


def test_a_folder_of_clips_with_whatever_lies_beside_them(tmp_path):
    for name in ("b.mp4", "a.MKV", "a.wav", "a.npy", "still.png", "b.jpg", "notes.md"):
        write(tmp_path / name, "")
    write(tmp_path / "b.txt", "Oh no.\n")
    write(tmp_path / "labels.csv", 'name,openset\nb,"sad, tired"\n')
    assert load_folder(tmp_path, "labels.csv") == [
        Sample("a", tmp_path / "a.MKV", tmp_path / "a.wav", tmp_path / "a.npy"),
        Sample("b", tmp_path / "b.mp4", None, None, "Oh no.", "sad, tired"),
        Sample("still", None, None, None, image=tmp_path / "still.png"),
    ]
    write(tmp_path / "labels.csv", "name,openset\nc,sad\n")
    with pytest.raises(ValueError, match=r"labels\.csv: it labels 'c', but .* holds no such clip"):
        load_folder(tmp_path, "labels.csv")
    write(tmp_path / "a.avi", "")
    with pytest.raises(ValueError, match="'a' appears twice"):
        load_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no clip"):
        load_folder(tmp_path / "empty")


def test_a_jsonl_names_each_part_relative_to_itself(tmp_path):
    rows = [
        {"name": "1", "video": "clips/1.mp4", "audio": None, "labels": ["happy", "at ease"], "subtitle": " Hi. "},
        {"name": "2", "audio": str(tmp_path / "far.wav"), "face": "2.npy", "labels": "sad", "reason": "slow voice"},
        {"name": "3", "image": "3.png", "labels": []},
    ]
    path = write(tmp_path / "data" / "clips.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    folder = path.parent
    assert load_jsonl(path) == [
        Sample("1", folder / "clips/1.mp4", None, None, "Hi.", "[happy, at ease]"),
        Sample("2", None, tmp_path / "far.wav", folder / "2.npy", "", "sad", "slow voice"),
        Sample("3", None, None, None, "", "neutral", image=folder / "3.png"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"name": "b"', "line 2: not JSON"),
        ('["b"]', "line 2: an object with a name is needed"),
        ('{"video": "b.mp4"}', "line 2: an object with a name is needed"),
        ('{"name": "b", "vidio": "b.mp4"}', "line 2: unknown key 'vidio'. Known are name, video, audio, face"),
        ('{"name": "b", "subtitle": 3}', "line 2: subtitle is 3; a string is needed"),
        ('{"name": "b", "labels": ["x", 1]}', "line 2: labels is ['x', 1]; a string is needed"),
        ('{"name": "a"}', "'a' appears twice"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "clips.jsonl", f'{{"name": "a"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        load_jsonl(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
