"""A tracker is chosen by name and gets what is written to metrics.jsonl."""

import pytest

from grpo_core.config import RunConfig
from grpo_core.errors import InputError
from grpo_core.storage.metrics_writer import MetricsWriter
from grpo_core.storage.trackers import TRACKERS


def test_a_registered_tracker_gets_every_step_and_is_closed(tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, folder, resume_step):
            calls.append((folder, resume_step))

        def log(self, step, values):
            calls.append((step, dict(values)))

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(TRACKERS, "_entries", {**TRACKERS._entries, "recorder": Recorder})
    writer = MetricsWriter(tmp_path, 3, RunConfig(trackers=("recorder",)).trackers)
    writer.write(4, {"reward": 0.5})
    writer.close()
    assert calls == [(tmp_path, 3), (4, {"reward": 0.5}), "closed"]


def test_an_unknown_tracker_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"run.trackers names 'wandb', which is not a tracker: .* tensorboard"):
        RunConfig(trackers=("wandb",))


def test_tensorboard_is_written_where_installed_and_a_clear_error_elsewhere(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install tensorboard"):
            MetricsWriter(tmp_path, trackers=("tensorboard",))
    else:
        writer = MetricsWriter(tmp_path, trackers=("tensorboard",))
        writer.write(1, {"reward": 0.5})
        writer.close()
        assert list((tmp_path / "tensorboard").glob("events.*"))
