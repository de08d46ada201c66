"""The command that shows what negative eigenvalues are for."""

import contextlib
import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

import launch.state_tracking
from hydrax.eval import extrapolation


def run(*args):
    """The exit code, stdout and stderr of the command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch.state_tracking.main(["launch.state_tracking", *args])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.thorough
def test_it_writes_what_its_help_says(tmp_path, monkeypatch):
    few = functools.partial(extrapolation.Protocol, rows=8, exam_rows=32)  # what takes long is the examination
    monkeypatch.setattr(extrapolation, "Protocol", few)
    code, out, err = run("--mixers=deltanet", "--seeds=2", "--steps=1", f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"state_tracking.json", "state_tracking.png"}
    results = json.loads((tmp_path / "out" / "state_tracking.json").read_text())
    assert (results["task"], results["protocol"]["steps"]) == ("parity", 1)
    scores = results["scaled_accuracy"]["deltanet"]
    assert list(scores) == ["with", "without"] and "without" in out
    beyond = [x for by_range in scores.values() for x in by_range["41-256"]]
    assert len(beyond) == 4 and max(map(abs, beyond)) < 0.2


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--task=s6"], "error: task = 's6': expected one of parity, "),
        (["--mixers=gla"], "error: model.mixers.gla.allow_neg_eigval = True: unknown key"),
        (["--mixers="], "error: mixers = '': expected names of mixers"),
        (["--seeds=0"], "error: --seeds = '0': expected a positive integer"),
        (["--out=README.md"], "error: out = 'README.md': expected a folder"),
        (
            ["--out=README.md/x"],
            "error: out = 'README.md/x/state_tracking.json': cannot be written (Not a directory); ",
        ),
        (["--taks=parity"], "error: --taks = 'parity': unknown flag; did you mean --task?"),
    ],
)
def test_it_refuses(args, line, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    code, out, err = run(*args)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith(line)


@pytest.mark.slow  # the whole demonstration: minutes
def test_parity_needs_negative_eigenvalues(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # tests compile without optimisation
    line = [sys.executable, "-m", "launch.state_tracking", f"--out={tmp_path}"]
    subprocess.run(line, cwd=pathlib.Path(__file__).parents[2], env=environment, check=True)
    results = json.loads((tmp_path / "state_tracking.json").read_text())
    assert results["wall_seconds"] < 600
    for mixer, scores in results["scaled_accuracy"].items():
        assert max(scores["with"]["41-256"]) >= 0.9, mixer
        assert max(scores["without"]["41-256"]) <= 0.1, mixer
