"""What must not happen to a run folder, and a process that hangs."""

import subprocess
import sys

import pytest

from hydrax.core.build import ConfigError
from hydrax.train import folder
from hydrax.train.checkpoint import Checkpoints, newest

HANG = """
import time
from hydrax.train.watchdog import Watchdog
with Watchdog(0.4) as watchdog:
    watchdog.start()
    for _ in range(4):
        time.sleep(0.15)
        watchdog.beat()
    with watchdog.pause():
        time.sleep(0.8)
    print("alive", flush=True)
    time.sleep(60)
"""


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path):
    with folder.lock(tmp_path / "run"):
        refused = pytest.raises(ConfigError, match=r"workdir = .*process \d+ on .* is training in it")
        with refused as error, folder.lock(tmp_path / "run"):
            pass
        assert "\n" not in str(error.value)
    with folder.lock(tmp_path / "run"):
        pass


def test_a_hang_ends_in_stacks_but_validation_does_not():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert done.stderr.startswith("stopped: no step finished in train.watchdog = 0.4 seconds")
    assert 'File "<string>", line 12 in <module>' in done.stderr


def test_checkpoints_that_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: float("nan")}
    with Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"w": step}, {}, {}, loss)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 6]
    assert newest(tmp_path) == (6, [])
