"""A run that is killed, terminated or interrupted ends as if nothing had happened, its records equal byte for byte."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from hydrax.train import folder
from tests.train import tiny

pytestmark = pytest.mark.thorough

STEPS = 40

MAIN = """
import json, pathlib, sys
from hydrax.train import folder, loop
from hydrax.core.build import ConfigError
workdir, cfg = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    loop.train(folder.parse(cfg, workdir), workdir, baselines={"bits": lambda data, batches: 8.0})
except ConfigError as error:
    sys.exit(str(error))
"""


class Attempt:
    """A process that trains in `workdir`."""

    def __init__(self, workdir: pathlib.Path, cfg):
        settings = {
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", MAIN, str(workdir), json.dumps(folder.as_dict(cfg))]
        self.workdir = workdir
        self.process = subprocess.Popen(
            command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, records: int) -> bool:
        """Whether it got so far before it ended."""
        while self.process.poll() is None:
            if len(lines(self.workdir)) >= records:
                return True
            time.sleep(0.002)
        return False

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out + err


def lines(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def records(workdir: pathlib.Path) -> list[str]:
    """The lines without what differs between equal runs; everything else byte for byte."""
    cut = [line.partition(', "timing"') for line in lines(workdir)]
    assert all(timing for _, timing, _ in cut)
    return [values for values, _, _ in cut]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    data = tiny.text(tmp_path_factory.mktemp("data") / "text")
    return tiny.config(data, steps=STEPS, save_every=6, eval_every=10)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, output = Attempt(workdir, cfg).end()
    assert code == 0, output
    assert len(records(workdir)) == STEPS + STEPS // 10
    return workdir


def assert_same_end(workdir, whole):
    assert records(workdir) == records(whole)
    timing = {"wall_seconds", "compile_seconds", "tokens_per_second"}
    ended, expected = (json.loads((w / "summary.json").read_text(encoding="utf-8")) for w in (workdir, whole))
    assert set(ended) == set(expected) > timing
    assert {k: v for k, v in ended.items() if k not in timing} == {k: v for k, v in expected.items() if k not in timing}
    assert (workdir / "figures" / "loss.png").exists()


def test_killed_at_random_moments(cfg, whole, tmp_path):
    workdir, dice, kills = tmp_path / "run", random.Random(0), 0
    for lowest in (0, 8, 20):  # somewhere from the start, and in the midst of two resumed stretches
        attempt = Attempt(workdir, cfg)
        kills += attempt.wait_for(lowest + dice.randrange(10))
        time.sleep(dice.random() * 0.02)
        attempt.process.kill()
        attempt.end()
    assert kills == 3
    code, output = Attempt(workdir, cfg).end()
    assert code == 0, output
    assert "continuing" in output
    assert_same_end(workdir, whole)


def test_asked_to_stop(cfg, whole, tmp_path):
    workdir, done = tmp_path / "run", 0
    for asked, expected, after in ((signal.SIGTERM, 0, 9), (signal.SIGINT, 130, 25)):
        attempt = Attempt(workdir, cfg)
        assert attempt.wait_for(after)
        attempt.process.send_signal(asked)
        code, output = attempt.end()
        assert code == expected, output
        assert done == 0 or f"after step {done}" in output
        done = int(output.partition(f"{asked.name}: saved at step ")[2].partition(";")[0])
        assert (workdir / "checkpoints" / str(done)).is_dir()
        assert not (workdir / "summary.json").exists()
    code, output = Attempt(workdir, cfg).end()
    assert code == 0, output
    assert f"after step {done}" in output
    assert_same_end(workdir, whole)
