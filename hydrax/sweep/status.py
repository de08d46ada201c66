"""The state of a run, read from its folder: there is no other record of a sweep.

A process that runs holds an exclusive lock on log.txt, which is its standard output, so that the lock lives exactly as
long as the process and whatever it started, also when the sweep itself has died.
"""

import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

from hydrax.core.build import ConfigError

State = Literal["waiting", "running", "finished", "broken", "failed"]

LOG = "log.txt"
ATTEMPTS = "attempts.json"
RECORD = "sweep.json"  # beside the folders of the runs: the command of the sweep
TAIL = 1 << 14  # bytes at the end of metrics.jsonl, enough for the newest record


@dataclasses.dataclass(frozen=True)
class Status:
    """What a run folder says.

    waiting: nothing there yet; running: a process writes its log; finished: summary.json is there; failed: given up,
    `why` says after what; broken: begun and left, the next attempt continues it.
    """

    state: State
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    attempts: int = 0
    why: str = ""
    summary: dict[str, Any] | None = None


def status(folder: pathlib.Path) -> Status:
    """The status of a run; reads only."""
    summary, attempts = _json(folder / "summary.json"), _json(folder / ATTEMPTS)
    count, why = attempts.get("count", 0), attempts.get("failed") or ""
    if summary:
        speed, loss = summary.get("tokens_per_second"), summary.get("val_loss")
        return Status("finished", summary.get("steps", 0), loss, speed, count, summary=summary)
    last: dict[str, Any] = next((r for r in reversed(_records(folder / "metrics.jsonl")) if "loss" in r), {})
    speed = last.get("timing", {}).get("tokens_per_second")
    begun = (folder / LOG).exists() or (folder / "config.json").exists()
    state: State = "failed" if why else "broken" if begun else "waiting"
    if count and is_locked(folder / LOG):
        state, why = "running", ""
    return Status(state, last.get("step", 0), last.get("loss"), speed, count, why)


def is_locked(path: pathlib.Path) -> bool:
    """Whether a process holds the lock of the file."""
    try:
        with path.open("rb") as file:
            return not try_lock(file, shared=True)
    except FileNotFoundError:
        return False


def try_lock(file: IO[bytes], *, shared: bool = False) -> bool:
    """Takes the lock of an open file, if it is free, until the last process that inherited the file closes it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def only_one(path: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a file, made if needed with its folder; yields whether it was free.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        allowed = f"cannot be written ({error.strerror}); expected a new folder, or that of this sweep"
        raise ConfigError("workdir", str(path.parent), allowed) from None
    with file:
        yield try_lock(file)


def _json(path: pathlib.Path) -> dict[str, Any]:
    """An object from a file; empty while there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The newest records, whole lines from the end of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[size > TAIL : -1]
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]
