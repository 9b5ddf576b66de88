"""Layouts on disk, as published, and what a table may get wrong."""

import json
import os
from pathlib import Path

import pytest

from affectgpt.data.datasets import (
    Sample,
    check_emotion_labels,
    load_folder,
    load_jsonl,
    load_mer2025,
    load_mer2026,
    load_ovmerd_plus,
)


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
        ("", "no column name. It has none; wanted are name, openset."),
        ("name,openset,openset\na,happy,sad\n", "two columns openset. It has name, openset, openset;"),
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


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,[happy, sad]\n", "line 2: 3 cells, but the header has 2. Put quotes round a list"),
        ("b,happy\na\n", "line 3: 1 cells, but the header has 2."),
        ("b,[happy],extra\n", "line 2: 3 cells, but the header has 2."),
        ('c,happy\na,"[happy, sad]\nb,[angry]\nc,[calm]\n', "line 3: its quote never closes. Put a cell with commas"),
        ('a,"[happy]\nb,"[sad]"\n', "line 2: ',' expected after '\"'. Put a cell with commas"),
        ("a,[happy\n", "line 2: the labels '[happy' are half of a list"),
        ('a,"happy, sad]"\n', "line 2: the labels 'happy, sad]' are half of a list"),
        ("a,x\nb,y\na,z\n", "line 4: 'a' appears twice, first in line 2."),
        ('a,"x\n\n"\n,y\n', "line 5: a row without a name"),
        ("../../../../etc/hostname,happy\n", "line 2: the name '../../../../etc/hostname' climbs out"),
        ("x/../../y,happy\n", "line 2: the name 'x/../../y' climbs out"),
        ("x\\..\\..\\y,happy\n", "climbs out"),
        ("/etc/hostname,happy\n", "line 2: the name '/etc/hostname' is an absolute path"),
        ('"a\nb",happy\n', "line 2: the name 'a\\nb' holds a line break"),
    ],
)
def test_a_row_that_is_wrong_is_named_by_file_and_line(mer2025, rows, words):
    path = write(mer2025 / "bad.csv", "name,openset\n" + rows)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        load_mer2025(mer2025, "bad.csv")
    assert str(caught.value).startswith(f"{path}, line ")
    assert words in str(caught.value)


def test_a_table_may_hold_what_spreadsheets_write(mer2025):
    write(mer2025 / "odd.csv", 'name,openset,\r\n\r\n a, "[happy, sad]",\r\nb,calm,,,\r\ndir/c,"say ""ah""",\r\n')
    samples = load_mer2025(mer2025, "odd.csv")
    assert [(s.name, s.labels) for s in samples] == [("a", "[happy, sad]"), ("b", "calm"), ("dir/c", 'say "ah"')]
    assert samples[2].video == mer2025 / "video" / "dir" / "c.mp4"


def test_other_formats_and_pipes_are_no_tables(mer2025):
    (mer2025 / "table.csv").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(ValueError, match=r"table\.csv: a parquet file\. Convert it to a csv in UTF-8"):
        load_mer2025(mer2025, "table.csv")
    os.mkfifo(mer2025 / "pipe.csv")
    with pytest.raises(ValueError, match=r"pipe\.csv: a pipe or a device, not a file"):
        load_mer2025(mer2025, "pipe.csv")


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
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: it labels 'c', but .* holds no such clip"):
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


def test_sounds_in_capitals_are_found_and_hidden_files_are_no_clips(tmp_path):
    for name in (
        "a.mp4",
        "a.WAV",
        "b.MP4",
        "b.flac",
        "b.NPY",
        "._a.mp4",
        "._a.wav",
        ".DS_Store",
        ".hidden.mp4",
        "._a.txt",
    ):
        write(tmp_path / name, "")
    write(tmp_path / "b.TXT", "Hm.")
    assert load_folder(tmp_path) == [
        Sample("a", tmp_path / "a.mp4", tmp_path / "a.WAV", None),
        Sample("b", tmp_path / "b.MP4", tmp_path / "b.flac", tmp_path / "b.NPY", "Hm."),
    ]
    write(tmp_path / "a.mp3", "")  # which of the two would be heard?
    with pytest.raises(ValueError, match=r"'a' appears twice, as a\.WAV and a\.mp3"):
        load_folder(tmp_path)


def test_a_subtitle_is_decoded_or_costs_its_clip_alone(tmp_path):
    contents = {
        "utf8": "你好".encode(),
        "marked": "你好".encode("utf-8-sig"),
        "utf16": "你好".encode("utf-16"),
        "big": b"\xfe\xff" + "你好".encode("utf-16-be"),
        "gbk": "你好".encode("gbk"),
        "unmarked": "hello".encode("utf-16-le"),
    }
    for name, content in contents.items():
        write(tmp_path / f"{name}.mp4", "")
        (tmp_path / f"{name}.txt").write_bytes(content)
    write(tmp_path / "pipe.mp4", "")
    os.mkfifo(tmp_path / "pipe.txt")
    samples = {sample.name: sample for sample in load_folder(tmp_path)}
    assert {name for name, sample in samples.items() if sample.subtitle == "你好"} == {"utf8", "marked", "utf16", "big"}
    faults = {name: sample.fault for name, sample in samples.items() if sample.fault}
    assert faults.keys() == {"gbk", "unmarked", "pipe"}
    assert faults["gbk"].startswith(f"{tmp_path / 'gbk.txt'}: not utf-8 (")
    assert "set data.layout.subtitle_encoding" in faults["gbk"]
    assert "it holds NULs" in faults["unmarked"]
    assert "a pipe or a device" in faults["pipe"]
    chosen = {sample.name: sample for sample in load_folder(tmp_path, subtitle_encoding="gbk")}
    assert chosen["gbk"].subtitle == chosen["utf16"].subtitle == "你好"


def test_a_clip_whose_name_no_table_can_spell_is_at_fault_alone(tmp_path):
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4", b"a\nb.mp4", "é.mp4".encode()):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    faults = {sample.name: sample.fault for sample in load_folder(tmp_path)}
    assert faults.keys() == {"caf\\xe9", "caf\\xe8", "a\nb", "é"}
    assert faults["é"] is None
    assert "is not UTF-8: rename the file" in faults["caf\\xe9"]
    assert "holds a line break" in faults["a\nb"]
    json.dumps(list(faults), ensure_ascii=False).encode()


def test_numbers_are_no_emotions(mer2025):
    write(mer2025 / "mosi.csv", "name,openset\na,happy\nb,-1.6\n")
    samples = load_mer2025(mer2025, "mosi.csv")
    with pytest.raises(ValueError, match=r"mosi: sample 'b' has the label '-1\.6', a number and not an emotion"):
        check_emotion_labels(samples, "mosi")
    check_emotion_labels(samples[:1], "mosi")


def test_unicode_separators_in_a_jsonl_are_text(tmp_path):
    rows = [{"name": f"{code:x}", "subtitle": f"one{chr(code)}two"} for code in (0x2028, 0x85, 0x0C)]
    path = write(tmp_path / "clips.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:2]))
    assert [sample.subtitle for sample in load_jsonl(path)] == [row["subtitle"] for row in rows[:2]]


def test_a_jsonl_may_name_what_lies_beside_it_and_what_its_user_names(tmp_path):
    outside = write(tmp_path / "elsewhere" / "b.mp4", "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    rows = [{"name": "a", "video": str(outside)}, {"name": "b", "video": "linked/b.mp4"}]
    path = write(tmp_path / "data" / "clips.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.video.read_text() for sample in load_jsonl(path)] == ["", ""]
    for value in ("../elsewhere/b.mp4", "linked/../../elsewhere/b.mp4"):
        write(path, json.dumps({"name": "a", "video": value}) + "\n")
        with pytest.raises(ValueError, match=r"line 1: video '.*' climbs out of the data set's folder"):
            load_jsonl(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"name": "b"', "line 2: not JSON"),
        ('{"name": "../b"}', "line 2: the name '../b' climbs out"),
        ('{"name": "b", "labels": ["x, y"]}', "line 2: the label 'x, y' holds a comma"),
        ('{"name": "b", "labels": "[x"}', "line 2: the labels '[x' are half of a list"),
        ('{"name": "b", "video": "b\\u0000.mp4"}', "line 2: video 'b\\x00.mp4' holds a NUL"),
        ('{"name": "b", "fault": "x"}', "line 2: unknown key 'fault'"),
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
