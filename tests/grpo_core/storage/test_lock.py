"""A lock keeps out other processes while its own lives, and no longer."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from grpo_core.config.fields import ConfigError
from grpo_core.config.options import GRPOConfig, RunConfig
from grpo_core.distributed import Distributed
from grpo_core.storage import lock
from grpo_core.storage.lock import FileLock, LockHeld
from grpo_core.storage.run_folder import open_run

HOLDER = """
import sys, time
from grpo_core.storage.lock import FileLock
lock = FileLock(sys.argv[1])
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock until a line comes in."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_firsts_pid_and_host(holder, tmp_path, capsys):
    started = time.monotonic()
    with pytest.raises(LockHeld, match=f"process {holder.pid} on {socket.gethostname()} since 20"):
        FileLock(tmp_path / "run.lock", wait_seconds=0.3)
    assert time.monotonic() - started >= 0.3
    assert f"in use by process {holder.pid}" in capsys.readouterr().out


def test_the_start_after_a_sigkill_succeeds_at_once(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = FileLock(tmp_path / "run.lock")
    assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    lock.release()


def test_a_start_waits_for_one_that_is_ending(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    os.kill(holder.pid, signal.SIGCONT)
    holder.stdin.write("\n")
    holder.stdin.flush()
    FileLock(tmp_path / "run.lock", wait_seconds=20).release()


def test_a_child_does_not_inherit_it(tmp_path):
    """A worker that outlives a killed run must not keep the next start out."""
    inner = "from grpo_core.storage.lock import FileLock; import os, sys, time; FileLock(sys.argv[1])\n"
    inner += "if os.fork() == 0:\n    time.sleep(60)\nprint('forked', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", inner, str(tmp_path / "run.lock")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "forked\n"
    with pytest.raises(LockHeld):
        FileLock(tmp_path / "run.lock")
    process.kill()  # the parent alone
    process.wait()
    FileLock(tmp_path / "run.lock").release()
    os.killpg(process.pid, signal.SIGKILL)


def test_the_same_process_may_ask_again_and_keeps_it(tmp_path):
    first, second = FileLock(tmp_path / "run.lock"), FileLock(tmp_path / "run.lock")
    code = "from grpo_core.storage.lock import FileLock; import sys; FileLock(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "run.lock")]
    assert b"LockHeld" in subprocess.run(command, capture_output=True, check=False).stderr
    first.release()
    second.release()
    assert subprocess.run(command, check=False).returncode == 0


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    def none(handle, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: nothing keeps a second run out"):
        FileLock(tmp_path / "run.lock").release()


def test_a_run_in_use_is_refused_and_left_as_it_is(holder, tmp_path):
    config = GRPOConfig(run=RunConfig(name=tmp_path.name, output_dir=tmp_path.parent, lock_timeout=0))
    run = open_run(config, Distributed())
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on .*: wait for it, end it, or choose"):
        run.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    (tmp_path / "config.yaml").write_text("run: {max_steps: 100}\n")
    with pytest.raises(ConfigError, match="in use by process"):
        open_run(config, Distributed())
