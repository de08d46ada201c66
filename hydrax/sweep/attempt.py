"""Attempts at one run: a process at a time, its output in the log of its folder, again if it fails."""

import datetime
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from hydrax.sweep.status import ATTEMPTS, LOG, status, try_lock
from hydrax.train.metrics import write_json

BAD_INPUT = 2
"""Exit code of a command that refused what it was given: a further attempt would end alike."""

POLL = 0.1  # seconds


class Stop:
    """The signal that all processes of a sweep shall get; None so far."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


def complete(
    folder: pathlib.Path, command: Sequence[str], environment: Mapping[str, str], *, retries: int, stop: Stop
) -> str | None:
    """Runs the command until its run is finished; None, or the reason why it is not.

    A process that is there already, left by a sweep that died, is waited for. Every attempt continues what earlier
    ones have saved. There are `retries` after the first, and none after the command refused its input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    why = ""
    for remaining in reversed(range(retries + 1)):
        with (folder / LOG).open("ab") as log:
            while not try_lock(log) and stop.signal is None:
                time.sleep(POLL)
            before = status(folder)
            if before.state == "finished":
                return None
            if stop.signal is not None:
                return why or "stopped"
            count = before.attempts + 1
            write_json(folder / ATTEMPTS, {"count": count})
            code, last = attempt(command, environment, log, f"attempt {count}", stop)
            if (folder / "summary.json").exists():
                return None
            why = f"{_name(code)}: {last}"
            if stop.signal is None and (code == BAD_INPUT or not remaining):
                write_json(folder / ATTEMPTS, {"count": count, "failed": why})
                return why
    return why


def attempt(
    command: Sequence[str], environment: Mapping[str, str], log: IO[bytes], title: str, stop: Stop
) -> tuple[int, str]:
    """Exit code and last line of one process, which writes `log` and gets the signal of `stop`."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"\n== {title}, {now}: {shlex.join(command)}\n".encode())
    log.flush()
    began, sent = log.tell(), None
    # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which passes it on once.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while process.poll() is None:
        if stop.signal is not None and stop.signal is not sent:
            sent = stop.signal
            process.send_signal(sent)
        time.sleep(POLL)
    return process.returncode, _last_line(pathlib.Path(log.name), began)


def _last_line(path: pathlib.Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next(filter(None, reversed(lines)), "no output")


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
