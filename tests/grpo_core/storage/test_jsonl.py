"""Files of JSON lines can be read wherever they are cut."""

import os
from pathlib import Path

import pytest

from grpo_core.storage.jsonl import JsonLines


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_resume_reads_a_file_cut_anywhere(tmp_path, cut):
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"step": step, "text": "glücklich"} for step in range(3))
    lines.close()
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole[:-cut])
    JsonLines(lines.path, resume_step=9).close()
    assert lines.path.read_bytes() == whole[: whole.rindex(b"\n", 0, len(whole) - cut) + 1]


def test_completions_open_in_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    writer = JsonLines(tmp_path / "completions.jsonl")
    texts = ["happy, \u2028glad\n", '{"angry"}', "😀"]
    writer.append({"step": 4, "prompt_id": "clip", "text": text, "reward": 0.1} for text in texts)
    writer.close()
    frame = pd.read_json(tmp_path / "completions.jsonl", lines=True)
    assert frame.text.tolist() == texts
    assert frame.step.tolist() == [4, 4, 4]


def test_a_full_disk_names_the_file():
    if not Path("/dev/full").exists():
        return  # a device of Linux
    writer = JsonLines.__new__(JsonLines)
    writer.path, writer._file = Path("/dev/full"), os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        writer.append([{"step": 1}])
    writer.close()
