"""Processes that share work, and one with a limit: what they say, and what becomes of those that fail."""

import os
import pathlib
import time
from collections.abc import Callable

import pytest

from hydrax.eval import kernels
from hydrax.eval.sides import workers

HERE = __name__


def leave(folder: str, names: tuple[str, ...], mine: workers.Mine) -> None:
    """A file per piece of work; the first piece ends its process, and without a name it waits."""
    for name in names:
        if mine(name):
            if name == "poison":
                os._exit(3)
            pathlib.Path(folder, name).touch(exist_ok=False)
    if not names:
        time.sleep(60)


def double(x: int) -> int:
    if x < 0:
        raise ValueError("no\nnumber")
    if x == 0:
        os._exit(5)
    time.sleep(60 if x > 100 else 0)
    return 2 * x


def announce(path: str) -> None:
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(300)


def ask(path: str) -> None:
    workers.limited(300, announce, path)


def test_a_process_ends_with_the_one_that_asks(tmp_path):
    path = tmp_path / "pid"
    asks = workers.NEW.Process(target=ask, args=(str(path),))
    asks.start()
    wait_for(lambda: path.exists() and path.read_text())
    asks.kill()
    wait_for(lambda: not pathlib.Path("/proc", path.read_text()).exists())


def wait_for(reached: Callable[[], object]) -> None:
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < 100
        time.sleep(0.1)


def test_work_is_shared_once_and_survives_a_failure(tmp_path):
    said, names = [], tuple(f"piece {i}" for i in range(12))
    workers.share(HERE, "leave", str(tmp_path), (*names, "poison"), workers=2, seconds=60, say=said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert said[-1].startswith("13 in") and said[-1].endswith("0 of 2 processes at work, 1 ended early")


def test_shared_work_ends_in_time(tmp_path):
    began = time.monotonic()
    workers.share(HERE, "leave", str(tmp_path), (), workers=1, seconds=0.1, say=lambda text: None)
    assert time.monotonic() - began < 30


def test_limited():
    assert workers.limited(60, double, 4) == 8
    with pytest.raises(RuntimeError, match="took longer than 1 s"):
        workers.limited(1, double, 101)


def test_a_side_that_dies_is_started_again(monkeypatch):
    monkeypatch.setitem(kernels.SIDES, "here", HERE)
    side = kernels.Side("here", 60)
    for x, what in ((-1, "ValueError: no number"), (0, "ended with code 5")):
        with pytest.raises(RuntimeError, match=what):
            side.ask("double", x)
    assert side.ask("double", 4) == 8
    side.close()
