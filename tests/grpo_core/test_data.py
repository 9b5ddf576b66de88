"""JSON lines end at line feeds alone, what is wrong is named by file and line, and what is left out is counted."""

import json
import logging
import os
from types import SimpleNamespace

import pytest

from grpo_core.config.options import OptimConfig, RunConfig, SFTConfig
from grpo_core.data import check_coverage, longest_sequence, read_jsonl, refuse_too_long, report_skipped
from grpo_core.training.sft import Example, SFTTrainer
from tests.grpo_core.toy import PROMPTS, make_trainer


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_one_line_feed_is_one_record_whatever_a_string_holds(tmp_path):
    texts = [f"one{separator}two" for separator in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    lines = [json.dumps({"text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    # a byte-order mark, blank lines, ends of lines as Windows writes them, and none at the end
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + "\r\n\n \n".join(lines).encode())
    records = list(read_jsonl(path))
    assert [record.value["text"] for record in records] == texts
    assert [record.line for record in records] == [1 + 3 * index for index in range(len(texts))]
    assert records[1].where == f"{path}, line 4"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "line 3: not JSON"),
        (b'{"a": 1} {"a": 2}', "line 3: not JSON"),
        (b'{"a": "\xc4\xe3\xba\xc3"}', "line 3: not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "line 3: the key 'a' appears twice. Keep one of the two."),
        (b'{"a": "\\ud83d"}', r"line 3: it holds half of a character ('\ud83d'). Remove it."),
        (b"[" * 100_000, "line 3: nested too deeply"),
        (b'[{"a": 1},', "It may be one list over several lines; write one object per line"),
    ],
)
def test_a_line_that_is_wrong_is_named_and_left_out_of_a_log(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n\n' + line + b'\n{"a": 9}\n')
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert words in str(caught.value)
    broken: list[int] = []
    rows = [record.value for record in read_jsonl(path, broken)]
    if broken:
        assert broken == [3]
        assert rows == [{"a": 0}, {"a": 9}]
    else:  # a log takes these
        assert rows in ([{"a": 0}, {"a": 3, "b": 2}, {"a": 9}], [{"a": 0}, {"a": "?"}, {"a": 9}])


def test_the_last_line_of_a_log_that_a_kill_cut_is_left_out_without_a_note(tmp_path):
    broken: list[int] = []
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n{"a"')
    assert [record.value for record in read_jsonl(path, broken)] == [{"a": 0}]
    assert broken == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1\x15\x04", "a parquet file. Convert it to a text file in UTF-8 with one JSON object per line."),
        (b"PK\x03\x04....", "a zip or Excel file. Convert it"),
        (b"\x1f\x8b\x08", "a gzip file. Convert it"),
        ('{"a": 1}'.encode("utf-16"), "text in UTF-16. Convert it"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, content, words):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}: {words}")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file\. Check its name and folder"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"a folder, not a file\. Give a text file"):
        list(read_jsonl(tmp_path))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="a pipe or a device, not a file"):
        list(read_jsonl(tmp_path / "pipe.jsonl"))


def test_the_longest_sequence_is_the_least_of_what_a_config_names():
    assert longest_sequence(SimpleNamespace()) is None
    assert longest_sequence(SimpleNamespace(max_position_embeddings=90, sliding_window=None)) == (
        "max_position_embeddings",
        90,
    )
    assert longest_sequence(SimpleNamespace(n_positions=80, sliding_window=20)) == ("sliding_window", 20)
    unused = SimpleNamespace(n_positions=80, sliding_window=20, layer_types=["full_attention"])
    assert longest_sequence(unused) == ("n_positions", 80)


def test_prompts_that_are_too_long_are_named_and_counted():
    config = SimpleNamespace(max_position_embeddings=20)
    refuse_too_long([("a", 12, 8)], config, "rollout.max_new_tokens")
    with pytest.raises(
        ValueError, match=r"prompt 'b': its prompt has 13 tokens, which with 8 of rollout.max_new_tokens"
    ) as caught:
        refuse_too_long([("a", 12, 8), ("b", 13, 8), ("c", 99, 8)], config, "rollout.max_new_tokens")
    assert "config.max_position_embeddings 20; shorten it, or leave it out (1 more are too long as well)" in str(
        caught.value
    )


def test_training_refuses_what_is_longer_than_the_models_positions_and_names_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"prompt 'p2': its prompt has 5 tokens, which with 252 .* config\.max_position_embeddings 256"
    ):
        make_trainer(tmp_path, max_new_tokens=252)
    policy = make_trainer(tmp_path, max_new_tokens=251).policy
    run = RunConfig(output_dir=tmp_path, prompts_per_step=1)
    examples = [Example(prompt, (7,) * 252) for prompt in PROMPTS[:3]]
    with pytest.raises(ValueError, match=r"prompt 'p2': its prompt has 5 tokens, which with 252 of its answer"):
        SFTTrainer(policy, examples, SFTConfig(OptimConfig(), run))


def test_what_is_left_out_is_reported_and_too_much_of_it_refused(caplog):
    with caplog.at_level(logging.WARNING):
        report_skipped({}, 10, "lines")
        report_skipped({"line 3": "empty"}, 10, "lines")
    assert [record.getMessage() for record in caplog.records] == ["skipped line 3: empty", "skipped 1 of 10 lines"]
    options = {"what": "lines", "key": "min_coverage"}
    check_coverage({}, 0, 1.0, **options)
    check_coverage({"line 3": "empty"}, 10, 0.9, **options)
    with pytest.raises(
        ValueError, match=r"only 8 of 10 lines can be used, and min_coverage is 0\.9: mend them"
    ) as caught:
        check_coverage({"line 3": "empty", "line 4": "empty"}, 10, 0.9, **options)
    assert str(caught.value).endswith("The first, line 3: empty.")
    with pytest.raises(ValueError, match=r"none of the 1 lines can be used\. The first, line 3: empty\."):
        check_coverage({"line 3": "empty"}, 1, 0.0, **options)
