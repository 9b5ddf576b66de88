"""The run report: complete, self-contained, truthful, and written whatever state the run's files are in."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from affectgpt.data.datasets import Sample
from affectgpt.emotion_wheel import EmotionWheel
from affectgpt.emotion_wheel.tables import Tables
from affectgpt.evaluation import score_answers
from affectgpt.report import compare, figures, write_report
from affectgpt.report.__main__ import main
from affectgpt.report.formatting import number, printable, shorten, tone
from affectgpt.report.page import SECTIONS, template_environment
from affectgpt.report.run import Curves, read_run
from grpo_core.storage.jsonl import jsonable

ROOT = Path(__file__).parents[3]
SECTORS = [
    ("mad", "disgusted", "sad", "happy", "surprised", "scared"),
    ("fearful", "angry", "disgusted", "sad", "surprised", "happy", "bad"),
    ("mad", "scared", "joyful", "powerful", "peaceful", "sad"),
    ("joy", "genius", "anger", "sad", "fear", "disgust"),
    ("mad", "scared", "sad", "peaceful", "powerful", "joyful"),
]
WORDS = {  # label → sector on each wheel
    "happy": ("happy", "happy", "joyful", "joy", "powerful"),
    "delighted": ("happy", "happy", "joyful", "joy", "joyful"),
    "sad": ("sad", "sad", "sad", "sad", "sad"),
    "gloomy": ("sad", "bad", "sad", "sad", "sad"),
    "angry": ("mad", "angry", "mad", "anger", "mad"),
    "furious": ("mad", "angry", "mad", "anger", "mad"),
    "worried": ("scared", "fearful", "scared", "fear", "scared"),
    "anxious": ("scared", "fearful", "scared", "fear", "scared"),
    "surprised": ("surprised", "surprised", None, "genius", None),
    "astonished": ("surprised", "surprised", None, "genius", None),
}
EVALUATIONS = {"untrained": 0.10, "cold_start": 0.45, "sft_continued": 0.48, "grpo": 0.72, "shuffled_media": 0.22}
ANSWERS = {"untrained": 2.5, "cold_start": 2.0, "sft_continued": 2.0, "grpo": 1.5, "shuffled_media": 1.5}


@pytest.fixture(scope="module")
def wheel() -> EmotionWheel:
    """Ten words on five wheels, by hand: what is expected below can be counted."""
    places = [[names.index(word[w]) if word[w] else -1 for word in WORDS.values()] for w, names in enumerate(SECTORS)]
    tables = Tables(
        names=tuple(f"wheel{w + 1}" for w in range(5)),
        sectors=(tuple(SECTORS), tuple(SECTORS)),
        words=tuple(WORDS),
        clusters=np.array([places, places], np.int8),
        base=np.ones(len(WORDS), bool),
    )
    return EmotionWheel(tables)


def evaluate(wheel: EmotionWheel, answers: list[tuple[str, list[str], list[str]]]) -> dict:
    """What a run writes of (name, ground truth, predicted labels)."""
    samples = [Sample(name, None, None, None, labels=f"[{', '.join(truth)}]") for name, truth, _ in answers]
    said = [", ".join(labels) for _, _, labels in answers]
    return jsonable(asdict(score_answers(wheel, samples, said, name="made up", split="test")))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_run(folder: Path, wheel: EmotionWheel, steps: int = 120, clips: int = 60) -> Path:
    """A made-up run with every file, shaped like a real one."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    (folder / "evaluations").mkdir()
    words = list(WORDS)
    truths = [
        (f"clip_{i:03d}", list(rng.choice(words, size=rng.integers(1, 4), replace=False, p=[0.2, 0.1] + [0.0875] * 8)))
        for i in range(clips)
    ]
    summary = {"seed": 3, "wall_seconds": 212.4, "clips": clips}
    for name, right in EVALUATIONS.items():
        answers = []
        for clip, truth in truths:
            said = [word for word in truth if rng.random() < right]
            said += list(rng.choice(words, size=rng.poisson(ANSWERS[name] * (1 - right)), replace=False))
            answers.append((clip, list(map(str, truth)), list(map(str, dict.fromkeys(said)))))
        evaluation = evaluate(wheel, answers) | {"name": name}
        summary[f"{name}_f1"] = 100 * evaluation["f1"]
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        "algorithm:\n  beta: 0.04\n  epsilon: 0.2\nrollout:\n  group_size: 8\nseed: 3\n"
    )

    rows = []
    for step in range(1, steps + 1):
        x = 1 - np.exp(-3 * step / steps)
        row = {
            "step": step,
            "reward": 0.55 + 0.42 * x + rng.normal(0, 0.05),
            "reward_std": 0.3 - 0.15 * x,
            "frac_reward_zero_std": 0.05 + 0.3 * x + rng.normal(0, 0.02),
            "rewards/accuracy/mean": 0.4 + 0.3 * x + rng.normal(0, 0.05),
            "rewards/format/mean": min(1.0, 0.8 + 0.25 * x),
            "kl": 0.05 * x * (1 + 0.2 * rng.normal()) ** 2,
            "entropy": 1.6 - 1.0 * x + rng.normal(0, 0.04),
            "grad_norm": float(np.exp(rng.normal(-1, 0.3))),
            "learning_rate": 1e-4 * min(1, step / 10) * (1 - step / steps),
            "loss": rng.normal(0, 0.01),
            "clip_ratio/low_mean": abs(rng.normal(0, 0.004)),
            "clip_ratio/high_mean": abs(rng.normal(0, 0.006)),
            "completions/mean_length": 14 - 4 * x + rng.normal(0, 0.4),
            "completions/clipped_ratio": max(0.0, 0.05 - 0.06 * x),
            "sampling/sampling_logp_difference/mean": abs(rng.normal(2e-7, 5e-8)),
            "time/sample": 0.52 - 0.1 * x + rng.normal(0, 0.02),
            "time/reward": 0.004,
            "time/reference": 0.11,
            "time/forward": 0.18 + rng.normal(0, 0.01),
            "time/backward": 0.30 + rng.normal(0, 0.02),
            "time/optimizer": 0.01,
        }
        if step % 20 == 0:
            row["eval/f1"] = 0.60 + 0.16 * x
        rows.append(row)
    rows[steps // 2]["grad_norm"] = None
    write_lines(folder / "metrics.jsonl", rows)
    sft = [
        {"step": s, "loss": 3.2 * np.exp(-s / 60) + 0.9 + rng.normal(0, 0.08), "learning_rate": 1e-3}
        for s in range(1, 201)
    ]
    for row in sft[19::20]:
        row["eval/f1"] = 0.45 + 0.17 * (1 - np.exp(-row["step"] / 50)) + rng.normal(0, 0.004)
    for stage in ("cold_start", "sft_continued"):
        (folder / stage).mkdir()
        write_lines(folder / stage / "metrics.jsonl", sft)

    rows = []
    for step in range(1, steps + 1, 10):
        for prompt in (f"train_{step % 3:03d}", f"train_{step:03d}x"):
            rewards = np.sort(rng.beta(2 + 4 * step / steps, 2, size=8))
            for member in range(8):
                said = [str(word) for word in rng.choice(words, size=2, replace=False)]
                rows.append(
                    {
                        "step": step,
                        "prompt_id": prompt,
                        "member": member,
                        "text": f"<think>Raised brows & a quick voice.</think><answer>{', '.join(said)}</answer>",
                        "labels": said,
                        "finish_reason": "length" if member == 0 else "stop",
                        "length": int(rng.integers(8, 30)),
                        "rewards": {"accuracy": float(rewards[member]), "format": 1.0},
                        "reward": float(rewards[member] + 1),
                        "advantage": float((rewards[member] - rewards.mean()) / rewards.std()),
                        "ground_truth": "[happy, surprised]",
                    }
                )
    write_lines(folder / "completions.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, wheel: EmotionWheel) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", wheel)


@pytest.fixture(scope="module")
def page(run_dir: Path, wheel: EmotionWheel) -> str:
    return write_report(run_dir, samples={}, wheel=wheel).read_text("utf-8")


def test_held_out_clips_that_could_not_be_used_are_counted(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = write_run(tmp_path / "run", wheel, steps=2, clips=4)
    for path in (folder / "evaluations").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"total": 2610}))
    page = write_report(folder, samples={}, wheel=wheel).read_text("utf-8")
    assert page.count("The scores are of 4 of 2,610 held-out clips: the others could not be used.") == 1


class Reader(HTMLParser):
    """Checks that elements close in order; collects ids, links, sources and text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += attributes
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def bare_run(folder: Path, rows: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "metrics.jsonl", rows if rows is not None else [{"step": 1, "reward": 0.5}])
    return folder


def sections_of(page: str) -> set[str]:
    return set(re.findall(r'<section id="([\w-]+)"', page))


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(reader.ids) == len(set(reader.ids))
    targets = {link[1:] for link in reader.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(reader.ids)
    assert all(link.startswith(("#", "data:image/")) for link in reader.links)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page.encode()) < 1_000_000


def test_every_colour_of_a_picture_follows_the_theme(page: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", pictures)
    assert "var(--after)" in pictures


def test_all_sections_of_a_whole_run_are_there(page: str) -> None:
    assert sections_of(page) == {
        "result", "wheels", "held-out", "training", "completions", "supervised", "time", "settings",
    }  # fmt: skip
    assert page.count('class="wheel"') == 5
    assert set(re.findall(r'<a href="#([\w-]+)"', page)) == sections_of(page)


def test_the_same_files_give_the_same_bytes(run_dir: Path, wheel: EmotionWheel, page: str) -> None:
    assert write_report(run_dir, samples={}, wheel=wheel).read_text("utf-8") == page


def test_headline_says_the_numbers_of_the_summary(run_dir: Path, page: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    text = Reader(page).text
    for name in EVALUATIONS:
        assert f"{summary[f'{name}_f1']:.2f}" in text
    gain = summary["grpo_f1"] - summary["cold_start_f1"]
    assert gain > 0
    assert f"{gain:.2f} points above the cold start" in text
    assert f"{summary['grpo_f1'] - summary['sft_continued_f1']:.2f} above supervised training" in text
    assert f"falls by {summary['grpo_f1'] - summary['shuffled_media_f1']:.2f} points" in text


def test_a_loss_is_called_a_loss(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = bare_run(tmp_path / "run")
    (folder / "summary.json").write_text(
        json.dumps({"cold_start_f1": 50.0, "grpo_f1": 45.5, "sft_continued_f1": 52.0, "shuffled_media_f1": 46.0})
    )
    text = Reader(write_report(folder, samples={}, wheel=wheel).read_text()).text
    assert "4.50 points below the cold start" in text
    assert "6.50 below supervised training" in text
    assert "rises by 0.50 points" in text
    assert not re.search(r"\bgain\b", text)


@pytest.mark.parametrize(
    "summary", [{"grpo_f1": float("nan")}, {"grpo_f1": None}, {"grpo_f1": 0.0, "cold_start_f1": 0.0}]
)
def test_scores_that_are_no_scores_do_not_stop_the_report(tmp_path: Path, wheel: EmotionWheel, summary: dict) -> None:
    folder = bare_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "NaN" not in Reader(write_report(folder, samples={}, wheel=wheel).read_text()).text


def test_absent_files_leave_their_sections_out(tmp_path: Path, wheel: EmotionWheel) -> None:
    page = write_report(bare_run(tmp_path / "run"), samples={}, wheel=wheel).read_text()
    assert sections_of(page) == {"training", "settings"}
    assert page.count("<figure") == 1
    page = write_report(bare_run(tmp_path / "empty", []), samples={}, wheel=wheel).read_text()
    assert "No step has been logged" in page


def test_a_folder_without_metrics_is_refused_by_name(tmp_path: Path, wheel: EmotionWheel) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing"):
        write_report(tmp_path, samples={}, wheel=wheel)


def test_half_a_last_line_is_dropped_and_broken_lines_are_named(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = bare_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward": 0.7}\n{"step": 3, "rew')
    run = read_run(folder)
    assert run.metrics.steps.tolist() == [1, 2]
    assert run.notes == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.8}\n{"step": 4, "reward": 0.9}\n')
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "grpo.json").write_text('{"f1": 0.5, "sam')
    (folder / "summary.json").write_text("[1, 2]")
    page = write_report(folder, samples={}, wheel=wheel).read_text()
    assert read_run(folder).metrics.steps.tolist() == [1, 2, 4]
    assert "run/metrics.jsonl: 1 unreadable line skipped." in page
    assert "grpo.json is not valid JSON" in page
    assert "summary.json is not a JSON object" in page


def test_curves_keep_gaps_and_the_last_row_of_a_step() -> None:
    curves = Curves(
        [
            {"step": 2, "kl": 9.0},
            {"step": 1, "kl": 0.1, "loss": float("nan")},
            {"step": 2, "kl": None},
            {"step": 3, "kl": 0.3, "loss": float("inf"), "flag": True},
            {"kl": 5.0},
        ]
    )
    np.testing.assert_array_equal(curves.steps, [1, 2, 3])
    np.testing.assert_array_equal(curves["kl"], [0.1, np.nan, 0.3])
    assert "kl" in curves
    assert "loss" not in curves
    assert "flag" not in curves
    assert curves.missing("loss") == 2
    assert curves.missing("kl") == 1


def test_values_that_are_missing_are_counted_on_the_page(page: str) -> None:
    assert page.count("1 value missing or not finite.") == 1


def test_running_mean_is_the_mean_of_the_finite_values_in_reach() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0, 8.0])
    np.testing.assert_allclose(figures.running_mean(values, 3), [1.0, 1.5, np.nan, 3.0, 5.0, 6.0])
    np.testing.assert_array_equal(figures.running_mean(values, 1), values)


def test_a_long_run_stays_light_and_keeps_its_spike(tmp_path: Path, wheel: EmotionWheel) -> None:
    rng = np.random.default_rng(0)
    names = ("reward", "kl", "entropy", "grad_norm", "loss", "time/sample", "time/update")
    rows = [{"step": s} | dict(zip(names, rng.random(len(names)), strict=True)) for s in range(20_000)]
    rows[12_345]["grad_norm"] = 50.0
    path = write_report(bare_run(tmp_path / "run", rows), samples={}, wheel=wheel)
    assert path.stat().st_size < 500_000
    x, y = figures._thin(np.arange(20_000.0), np.array([row["grad_norm"] for row in rows]))
    assert len(x) <= 400
    assert y[x == 12_345] == [50.0]


def test_sector_counts_are_those_counted_by_hand(wheel: EmotionWheel) -> None:
    clips = [
        ("a", ["happy", "sad"], ["happy", "delighted", "worried"]),
        ("b", ["surprised"], ["astonished", "angry"]),
        ("c", ["gloomy"], []),
        ("d", ["nothing known"], ["happy"]),
    ]
    counts = compare.sector_counts({"grpo": evaluate(wheel, clips)}, wheel)
    first = counts[0]  # mad, disgusted, sad, happy, surprised, scared
    assert first.scored == 3
    np.testing.assert_array_equal(first.truth, [0, 0, 2, 1, 1, 0])
    np.testing.assert_array_equal(first.named["grpo"], [1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(first.hits["grpo"], [0, 0, 0, 1, 1, 0])
    last = counts[4]  # mad, scared, sad, peaceful, powerful, joyful; surprise is not on it
    assert last.scored == 2
    np.testing.assert_array_equal(last.truth, [0, 0, 2, 0, 1, 0])
    np.testing.assert_array_equal(last.named["grpo"], [0, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(last.hits["grpo"], [0, 0, 0, 0, 1, 0])


def test_scores_of_a_run_are_read_as_percent(run_dir: Path) -> None:
    run = read_run(run_dir)
    written = json.loads((run_dir / "evaluations" / "grpo.json").read_text())
    evaluation = run.evaluations["grpo"]
    assert evaluation["f1"] == 100 * written["f1"] == pytest.approx(run.summary["grpo_f1"])
    assert evaluation["per_wheel"]["recall"] == [100 * value for value in written["per_wheel"]["recall"]]
    assert [s["f1"] for s in evaluation["samples"]] == [100 * s["f1"] for s in written["samples"]]


def test_intervals_hold_the_corpus_score_and_pair_the_differences(run_dir: Path, wheel: EmotionWheel) -> None:
    evaluations = read_run(run_dir).evaluations
    bounds, changes = compare.intervals(evaluations, wheel, draws=200)
    for name, bound in bounds.items():
        assert bound.f1 == pytest.approx(evaluations[name]["f1"], abs=1e-9)
        assert bound.low < bound.f1 < bound.high
    assert changes["grpo"].f1 == pytest.approx(bounds["grpo"].f1 - bounds["cold_start"].f1, abs=1e-9)
    _, same = compare.intervals({"cold_start": evaluations["grpo"], "grpo": evaluations["grpo"]}, wheel, draws=20)
    assert (same["grpo"].low, same["grpo"].high) == (0.0, 0.0)
    other = {**evaluations["grpo"], "samples": evaluations["grpo"]["samples"][:10]}
    assert "few" not in compare.intervals({"cold_start": evaluations["grpo"], "few": other}, wheel, draws=2)[0]


def test_a_reported_score_that_the_answers_do_not_give_is_named(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = write_run(tmp_path / "run", wheel, steps=2, clips=12)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"grpo_f1": 99.0}))
    page = write_report(folder, samples={}, wheel=wheel).read_text()
    assert "the run reported 99.00; no interval is drawn." in page
    assert page.count('<u style="left') == len(EVALUATIONS) - 1


def test_chosen_clips_are_the_extremes_of_distinct_truths() -> None:
    def pair(name: str, before: float, after: float, truth: str) -> compare.Pair:
        return compare.Pair({"name": name, "f1": before}, {"name": name, "f1": after, "ground_truth": truth})

    candidates = [
        pair("a", 0, 100, "[happy]"),
        pair("b", 0, 100, "[happy]"),
        pair("c", 20, 90, "[sad]"),
        pair("d", 90, 10, "[angry]"),
        pair("e", 0, 0, "[worried]"),
        pair("f", 80, 80, "[sad]"),
    ]
    best, failed = compare.choose(candidates, count=2)
    assert [p.name for p in best] == ["a", "c"]
    assert [p.name for p in failed] == ["d", "e"]
    assert compare.choose(candidates[::-1], count=2) == (best, failed)
    best, failed = compare.choose(candidates, count=3)
    assert [p.name for p in best] == ["a", "b", "c"]


def test_clips_without_a_score_are_not_compared(wheel: EmotionWheel) -> None:
    evaluation = evaluate(wheel, [("a", ["happy"], ["sad"]), ("b", ["unknown word"], ["sad"])])
    assert [pair.name for pair in compare.pairs(evaluation, evaluation)] == ["a"]


def test_completions_follow_one_prompt_or_else_the_median_group() -> None:
    def group(step: int, prompt: str, *rewards: float | None) -> list[dict]:
        return [{"step": step, "prompt_id": prompt, "reward": reward} for reward in rewards]

    seen = [row for step in (9, 2, 5) for row in group(step, "p", 1.0, 0.0)] + group(1, "q", 0.5)
    assert [(rows[0]["step"], rows[0]["prompt_id"], len(rows)) for rows in compare.follow(seen)] == [
        (2, "p", 2), (5, "p", 2), (9, "p", 2),
    ]  # fmt: skip
    once = group(1, "a", 0.1) + group(1, "b", 0.9) + group(1, "c", 0.5) + group(7, "d", None, 0.3) + group(8, "e", None)
    assert [rows[0]["prompt_id"] for rows in compare.follow(once)] == ["c", "d", "e"]
    assert [rows[0]["prompt_id"] for rows in compare.follow(once, count=2)] == ["c", "e"]
    assert compare.follow([]) == []


def test_hostile_text_stays_text(tmp_path: Path, wheel: EmotionWheel) -> None:
    evil = '<script>alert("x")</script>\x00\ud800 & \'"'
    folder = bare_run(tmp_path / "run", [{"step": 1, "reward": 0.5, f"rewards/{evil}/mean": 1.0, f"time/{evil}": 1.0}])
    (folder / "evaluations").mkdir()
    for name, f1 in (("cold_start", 0.1), ("grpo", 0.9), ("odd<b>", 0.5)):
        evaluation = evaluate(wheel, [(evil, ["happy"], ["sad"])])
        evaluation["samples"][0] |= {"answer": evil, "labels": [evil, "sad"], "f1": f1}
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation))
    completion = {"step": 1, "prompt_id": evil, "text": evil, "labels": [evil], "reward": 1.0, "rewards": {evil: 1.0}}
    write_lines(folder / "completions.jsonl", [completion])
    (folder / "config.yaml").write_text("a: </pre><script>\n")
    (folder / "summary.json").write_text(json.dumps({"seed": evil, "note": evil}))
    samples = {name: Sample(name, None, None, None, subtitle=evil) for name in (evil, evil.replace("\ud800", "?"))}
    page = write_report(folder, samples=samples, wheel=wheel).read_text("utf-8")
    reader = Reader(page)
    assert not {"script", "odd<b>"} & set(reader.tags)
    assert "\x00" not in page
    assert reader.text.count('<script>alert("x")</script>') >= 8


def test_hostile_names_stay_inside_their_attributes(tmp_path: Path) -> None:
    evil = 'x" onload="alert(1)\'><script>\x01$\\1$'
    clean = evil.replace("\x01", "\ufffd")
    tables = Tables(
        names=(evil,),
        sectors=(((evil, "sad"),), ((evil, "sad"),)),
        words=("happy", "sad"),
        clusters=np.array([[[0, 1]], [[0, 1]]], np.int8),
        base=np.ones(2, bool),
    )
    wheel = EmotionWheel(tables)
    folder = bare_run(tmp_path / evil.replace("\x01", ""))
    (folder / "evaluations").mkdir()
    for model, said in (("cold_start", "sad"), ("grpo", "happy")):
        evaluation = evaluate(wheel, [("clip", ["happy"], [said])])
        (folder / "evaluations" / f"{model}.json").write_text(json.dumps(evaluation))
    samples = {"clip": Sample("clip", tmp_path / f"{evil}.mp4".replace("\x01", "\x7f"), None, None)}
    page = write_report(folder, samples=samples, wheel=wheel).read_text("utf-8")
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    values = [value or "" for name, value in reader.attributes if name in ("title", "aria-label")]
    assert sum(clean in value for value in values) == 2  # the error of the decoder, the alternative text of the wheel
    # The wheel's title twice, with its first letter capital, and the sector in the drawing.
    assert reader.text.count(clean[1:]) == 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_every_expression_of_a_template_is_escaped_and_filtered() -> None:
    environment = template_environment()
    template = environment.from_string('<a title="{{ text }}">{{ text }}</a>{{ text | shorten(3) }}{{ svg }}')
    page = template.render(text="<\x1b&\"'\udc00\t\n", svg=Markup("<svg>\x02</svg>"))
    escaped = "&lt;\ufffd&amp;&#34;&#39;\ufffd\t\n"
    assert page == f'<a title="{escaped}">{escaped}</a>&lt;\ufffd…<svg>\ufffd</svg>'
    with pytest.raises(UndefinedError):
        environment.from_string("{{ misspelt }}").render()


def test_nothing_but_a_figure_skips_the_escape() -> None:
    folder = ROOT / "model/affectgpt/report"
    templates = sorted((folder / "templates").iterdir())
    assert {path.name for path in templates} >= {f"{anchor}.html.j2" for anchor in SECTIONS} | {"page.html.j2"}
    for path in templates:
        code = "".join(re.findall(r"{[{%].*?[}%]}", path.read_text("utf-8"), flags=re.DOTALL))
        assert not re.search(r"\b(safe|autoescape|Markup)\b", code), path.name
    unescaped = {path.name for path in folder.glob("*.py") if re.search(r"\bMarkup\(", path.read_text("utf-8"))}
    assert unescaped == {"figures.py", "formatting.py"}


def test_texts_of_numbers() -> None:
    assert [number(value) for value in (1.005, -0.001, -2, None, float("nan"), float("-inf"), "3")] == [
        "1.00", "0.00", "−2.00", "–", "–", "–", "–",
    ]  # fmt: skip
    assert [number(value, 1, sign=True) for value in (0.25, -0.25, -0.01)] == ["+0.2", "−0.2", "0.0"]
    assert [tone(value) for value in (0.006, -0.006, 0.004, float("nan"))] == ["good", "bad", "", ""]
    assert shorten("abc def", 5) == "abc…"
    assert printable("a\tb\n\r\x00\x7f\ud83d") == "a\tb\n\ufffd\ufffd\ufffd\ufffd"


def test_an_installed_package_brings_its_templates(tmp_path: Path, run_dir: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "site")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    code = (
        "import sys, affectgpt.report as report; from affectgpt.emotion_wheel import EmotionWheel; "
        "print(report.__file__); report.write_report(sys.argv[1], samples={}, wheel=EmotionWheel.default())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    bare_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "site/affectgpt/report/__init__.py")
    page = (tmp_path / "run/report.html").read_bytes()
    assert page == write_report(tmp_path / "run", samples={}, wheel=EmotionWheel.default()).read_bytes()
    assert sections_of(page.decode()) == {"training", "settings"}


def test_clips_that_cannot_be_shown_get_a_placeholder(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = bare_run(tmp_path / "run")
    (folder / "evaluations").mkdir()
    names = ["corrupt", "missing", "silent", "stranger", "whole"]
    for model, said, other in (("cold_start", ["sad"], ["happy"]), ("grpo", ["happy"], ["sad"])):
        clips = [(name, ["happy"], other if name == "silent" else said) for name in names]
        (folder / "evaluations" / f"{model}.json").write_text(json.dumps(evaluate(wheel, clips)))
    (tmp_path / "corrupt.mp4").write_bytes(b"not a video" * 50)
    write_video(tmp_path / "whole.mp4", colour=(200, 40, 40))
    samples = {name: Sample(name, tmp_path / f"{name}.mp4", None, None) for name in ("corrupt", "missing", "whole")}
    samples["silent"] = Sample("silent", None, None, None, subtitle="Only words.")
    page = write_report(folder, samples=samples, wheel=wheel).read_text()
    shown = set(re.findall(r'<div class="id">(\w+)</div>', page))
    assert shown == set(names)
    assert page.count(">the video cannot be read<") == 2
    assert page.count(">no video<") == 1
    assert page.count(">this clip was not given to the report<") == 1
    assert "<q>Only words.</q>" in page
    images = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(images) == 3
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0]))))
    np.testing.assert_allclose(picture.mean(axis=(0, 1)), (200, 40, 40), atol=12)


def write_video(path: Path, colour: tuple[int, int, int]) -> None:
    """A clip of one colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_the_command_writes_the_report_again(
    tmp_path: Path,
    wheel: EmotionWheel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(EmotionWheel, "default", classmethod(lambda cls: wheel))
    data = tmp_path / "data"
    (data / "video").mkdir(parents=True)
    write_video(data / "video" / "clip_000.mp4", colour=(0, 0, 0))
    (data / "track2_test.csv").write_text("name,openset\nclip_000,[happy]\n")
    (data / "subtitle_chieng.csv").write_text("name,chinese,english\nclip_000,,Hello.\n")
    folder = bare_run(tmp_path / "run")
    (folder / "evaluations").mkdir()
    for model, said in (("cold_start", ["sad"]), ("grpo", ["happy"])):
        evaluation = evaluate(wheel, [("clip_000", ["happy"], said)])
        (folder / "evaluations" / f"{model}.json").write_text(json.dumps(evaluation))
    assert main([str(folder), "--data", str(data)]) == folder / "report.html"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/jpeg") == 3
    assert "<q>Hello.</q>" in page
    assert str(folder / "report.html") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    assert "metrics.jsonl is missing" in capsys.readouterr().err


def test_the_report_of_a_text_run_does_not_speak_of_emotions(tmp_path: Path, wheel: EmotionWheel) -> None:
    folder = bare_run(tmp_path / "text")
    row = {"step": 1, "prompt_id": "1", "member": 0, "text": "once", "rewards": {"brevity": 1.0}, "reward": 1.0}
    write_lines(folder / "completions.jsonl", [row, row | {"member": 1, "reward": 0.5}])
    page = write_report(folder, samples={}, wheel=wheel).read_text()
    assert "brevity" in page
    for word in ("emotion", "affectgpt", "ground truth", "labels"):
        assert word not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower()


def test_the_software_is_what_the_run_recorded(tmp_path, wheel):
    folder = write_run(tmp_path / "run", wheel)
    (folder / "sessions.jsonl").write_text(
        json.dumps({"versions": {"torch": "1.1"}}) + "\n" + json.dumps({"versions": {"torch": "9.9.9"}}) + "\n"
    )
    page = write_report(folder, samples={}, wheel=wheel).read_text()
    assert "Software of the run: torch 9.9.9." in page
    (folder / "sessions.jsonl").unlink()
    page = write_report(folder, samples={}, wheel=wheel).read_text()
    assert "Software when this report was written: python" in page


def test_a_text_runs_report_does_not_speak_of_emotions(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (tmp_path / "config.yaml").write_text("model: tiny\nrun: {name: text}\n")
    assert main([str(tmp_path)]) == tmp_path / "report.html"
    assert "motion" not in (tmp_path / "report.html").read_text()
