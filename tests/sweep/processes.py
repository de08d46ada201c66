"""Waiting for what happens in other processes, and finding them."""

import pathlib
import time
from collections.abc import Callable


def eventually(what: Callable[[], bool], seconds: float = 20) -> None:
    """Returns as soon as it is so; an AssertionError after that many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.01)
    raise AssertionError(f"it did not happen within {seconds} s")


def processes(folder: pathlib.Path) -> list[int]:
    """Those with the run folder on their command line."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"--workdir={folder}" in (place / "cmdline").read_text().split("\0"):
                found.append(int(place.name))
        except OSError:
            continue
    return found
