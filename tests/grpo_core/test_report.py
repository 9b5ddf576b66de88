"""The report of a run that knows no task: one file, made of the run's files alone."""

import json
import subprocess
import sys

import pytest

from grpo_core import report
from grpo_core.report import try_report, write_report

EVIL = "<script>alert('&')</script>\u2028"


@pytest.fixture
def run(tmp_path):
    rows = [{"step": step, "reward": 0.1 * step, "kl": None, "constant": 2.0, EVIL: 1} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "rew')
    completions = [
        {
            "step": step,
            "prompt_id": "1",
            "text": f"{EVIL} of {step}",
            "rewards": {"share": 0.5, EVIL: None},
            "reward": 0.5,
        }
        for step in (1, 3)
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    session = {
        "started": "now",
        "position": "step 0",
        "command": ["python", EVIL],
        "changes": [{"key": "run.seed", "before": "0", "now": "1"}],
        "versions": {"torch": "9.9"},
        "git": None,
    }
    (tmp_path / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    (tmp_path / "config.yaml").write_text(f"run: {{name: '{EVIL}'}}\n")
    return tmp_path


def test_a_report_has_curves_the_last_completions_starts_and_options_and_runs_nothing(run):
    page = write_report(run).read_text()
    assert page.count("<polyline") == 3  # a metric that is never a number has no curve
    assert "reward: 0.1 → 0.3" in page
    assert "of 3" in page
    assert "of 1<" not in page
    assert "run.seed: 0 → 1" in page
    assert "torch 9.9" in page
    assert "<script" not in page
    assert "emotion" not in page
    assert write_report(run).read_text() == page


def test_a_report_needs_no_more_than_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is missing"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "0 steps" in write_report(tmp_path).read_text()


def test_a_report_that_fails_is_a_warning_with_its_cause_and_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(report, "_curves", lambda metrics: 1 / 0)
    try_report(run)
    said = capsys.readouterr().err
    assert said.startswith("warning: the report was not written (ZeroDivisionError: division by zero)")
    assert f"`python -m grpo_core.report {run}`" in said


def test_the_report_is_written_again_by_a_command(run):
    command = [sys.executable, "-m", "grpo_core.report", str(run)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{run / 'report.html'}\n"
    refused = subprocess.run([*command[:-1], str(run / "no")], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
