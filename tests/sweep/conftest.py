"""Sweep files of a few runs, and the command in this process."""

import contextlib
import io
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import launch.sweep
from hydrax.sweep import runs
from hydrax.train import folder

BASE = {"config": "quickstart", "train.steps": 4}


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


def run(*args: object) -> Outcome:
    """The exit code, stdout and stderr of launch.sweep, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch.sweep.main(["launch.sweep", *map(str, args)])
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[[Any], str]:
    """Writes a sweep file that returns that grid; its path."""

    def write(grid: Any, name: str = "my") -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(f"def get_sweep(arg=''):\n    return {grid!r}\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are those of tests/sweep/trainer.py, which knows no configs: any folder is theirs."""
    monkeypatch.setattr(runs, "MAIN", "tests.sweep.trainer")
    monkeypatch.setattr(folder, "enter", lambda workdir, cfg: "resume")
