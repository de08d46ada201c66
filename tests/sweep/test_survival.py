"""Real runs, some of them killed: the sweep ends complete, every record equal byte for byte to an undisturbed one."""

import json
import os
import pathlib
import random
import signal
import threading
import time

import jax
import pytest

from hydrax.sweep import runs
from hydrax.sweep.status import status
from tests.sweep.conftest import run
from tests.sweep.processes import eventually, processes
from tests.train import tiny

pytestmark = pytest.mark.thorough

TIMING = {"wall_seconds", "compile_seconds", "tokens_per_second"}
SMALL = {
    "config": "quickstart",
    "model.d_model": 16,
    "model.pattern": "attn",
    "model.ffn": "none",
    "data.seq_len": 16,
    "data.val_fraction": 0.4,
    "train.steps": 30,
    "train.batch_size": 4,
    "train.eval_every": 0,
    "train.eval_rows": 4,
    "train.save_every": 5,
    "train.log_every": 1,
    "optim.name": "adamw",
    "sample.tokens": 0,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    return tiny.text(tmp_path_factory.mktemp("data") / "text")


def outcome_of(folder: pathlib.Path) -> tuple[list[str], dict]:
    """Its records and its summary, without what differs between equal runs."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [line.partition(', "timing"')[0] for line in lines], {k: v for k, v in summary.items() if k not in TIMING}


def test_four_runs_one_killed(write, text, tmp_path):
    """`train.keep` changes no number, so that two and two runs are twins; one of them is killed."""
    base = {**SMALL, "data.path": str(text)}
    grid = [{**base, "train.seed": seed, "train.keep": keep} for seed in (0, 1) for keep in (3, 4)]
    sweep, workdir = write(grid), tmp_path / "runs"
    found = runs.expand(sweep, workdir)
    victim = found[2].folder

    def kill():
        eventually(lambda: any((victim / "checkpoints").glob("[0-9]")), seconds=120)
        os.kill(*processes(victim), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(f"--sweep={sweep}", f"--workdir={workdir}", "--parallel=2")
    killer.join()
    assert outcome.code == 0, outcome.err
    assert [status(r.folder).attempts for r in found] == [1, 1, 2, 1]
    assert "continuing" in (victim / "log.txt").read_text()
    ended = [outcome_of(r.folder) for r in found]
    assert ended[0] == ended[1] != ended[2] == ended[3]
    assert len(ended[0][0]) == 31


@pytest.mark.slow
def test_24_runs_two_killed(text, tmp_path):
    """`sweeps/tiny` twice, with two runs killed at random moments the second time."""
    flags = ["--sweep=sweeps/tiny", "--parallel=4", f"--config.data.path={text}", "--config.data.val_fraction=0.4"]
    undisturbed = run(*flags, f"--workdir={tmp_path / 'undisturbed'}")
    assert undisturbed.code == 0, undisturbed.err
    overrides = {"data.path": str(text), "data.val_fraction": "0.4"}
    expected, found = (runs.expand("sweeps/tiny", tmp_path / kind, overrides) for kind in ("undisturbed", "disturbed"))
    assert len(found) == 24

    dice = random.Random(time.time_ns())
    victims, waits = dice.sample(found, 2), [dice.uniform(0, 8) for _ in range(2)]
    print(f"killed after {waits} s: {[v.name for v in victims]}")

    def kill(folder: pathlib.Path, wait: float):
        eventually(lambda: bool(processes(folder)), seconds=600)
        time.sleep(wait)
        os.kill(*processes(folder), signal.SIGKILL)

    killers = [threading.Thread(target=kill, args=(v.folder, w)) for v, w in zip(victims, waits, strict=True)]
    for killer in killers:
        killer.start()
    disturbed = run(*flags, f"--workdir={tmp_path / 'disturbed'}")
    for killer in killers:
        killer.join()
    assert disturbed.code == 0, disturbed.err
    assert {r.name for r in found if status(r.folder).attempts == 2} == {v.name for v in victims}
    assert [r.id for r in found] == [r.id for r in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert outcome_of(mine.folder) == outcome_of(theirs.folder), mine.name
