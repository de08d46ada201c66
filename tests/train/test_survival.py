"""Whatever keeps a run from its folder ends in one line, and the same command continues."""

import errno
import fcntl
import os
import pathlib
import resource
import subprocess
import sys
import threading

import pytest

from hydrax.core.build import ConfigError
from hydrax.train import checkpoint, folder
from hydrax.train.checkpoint import Checkpoints
from hydrax.train.folder import lock
from hydrax.train.metrics import JsonlWriter, write_json
from hydrax.train.processes import failures
from hydrax.train.watchdog import Watchdog
from tests.train import tiny
from tests.train.test_checkpoint import restore, state

HOLD = """
import pathlib, sys, time
from hydrax.train.folder import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


HANG = """
import time
from hydrax.train.watchdog import Watchdog
with Watchdog(0.4) as watchdog:
    watchdog.start()
    for _ in range(4):
        time.sleep(0.2)  # longer than the limit together, but each step is in time
        watchdog.beat()
    with watchdog.pause():
        time.sleep(0.8)
    print("well", flush=True)
    def stuck():
        time.sleep(60)
    stuck()
"""


def refused(workdir):
    with pytest.raises(ConfigError) as error, lock(workdir):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_second_trainer_is_refused_until_the_first_is_dead(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    message = refused(tmp_path)
    assert f"process {first.pid} on " in message
    assert str(tmp_path) in message
    first.kill()
    first.communicate()
    with lock(tmp_path):  # nobody had to remove anything
        assert f"process {os.getpid()} on " in refused(tmp_path)
    assert folder.enter(tmp_path, tiny.config(tmp_path)) == "fresh"  # if it had not got any further


def test_without_locks_the_run_goes_on_with_a_line(tmp_path, monkeypatch, capsys):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


@pytest.fixture
def full():
    """Files of this process stop growing at 1 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stopped(error):
    line = str(error.value.code)
    assert line.startswith("stopped: ")
    assert "\n" not in line
    return line


def fill(writer):
    for step in range(100):
        writer.write(step, {"loss": 1.0}, {})


def test_a_full_disk_while_records_are_written(tmp_path, full):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(SystemExit) as error, failures(tmp_path):
        fill(writer)
    writer.close()
    assert "File too large" in stopped(error) and str(tmp_path) in stopped(error)
    with pytest.raises(SystemExit) as error, failures(tmp_path):
        write_json(tmp_path / "config.json", "x" * 2000)
    assert "File too large" in stopped(error)
    assert not (tmp_path / "config.json").exists()


def save(workdir, *steps):
    with failures(workdir), Checkpoints(workdir, keep=1) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step}, {})


def test_a_full_disk_while_the_state_is_saved_in_the_background(tmp_path, capfd, request):
    save(tmp_path, 1)
    request.getfixturevalue("full")
    with pytest.raises(SystemExit) as error:
        save(tmp_path, 2, 3)
    assert f"checkpoint 2 in {tmp_path / 'checkpoints'} cannot be written" in stopped(error)
    assert capfd.readouterr().err == ""
    assert restore(tmp_path).step == 1  # `keep=1` did not remove it in favour of one that never came to be
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]  # and no remains of the one that failed


def test_a_disk_that_is_full_when_a_checkpoint_is_sealed(tmp_path, monkeypatch):
    def no_space(place):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_contents", no_space)
        with pytest.raises(SystemExit) as error:
            save(tmp_path, 2)
    assert "checkpoint 2 in " in stopped(error) and "No space left on device" in stopped(error)
    assert restore(tmp_path).step == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be made \(Not a directory\); expected a folder"):
        lock(tmp_path / "file" / "run").__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    place = pathlib.Path(tmp_path / "run")
    place.mkdir(mode=0o500)
    with pytest.raises(SystemExit) as error, failures(place), lock(place):
        pass
    assert "Permission denied" in stopped(error)


def test_a_step_that_hangs_ends_the_process_and_shows_its_stacks():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("well\n", 1)
    assert done.stderr.startswith("stopped: no step finished in train.watchdog = 0.4 seconds")
    assert "in stuck" in done.stderr


def test_without_a_limit_nobody_watches():
    before = threading.active_count()
    with Watchdog(0) as watchdog:
        watchdog.start()
        assert threading.active_count() == before
