"""A clock that ends a process in which no step is finished any more."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self


class Watchdog:
    """Between `start` and the end of its block: `seconds` without a `beat` print the stacks of all threads to stderr
    and end the process with exit code 1. 0 seconds: never.

    The process ends at once, without clean-up: what hangs would hang the clean-up too. The last checkpoint stands.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._deadline = float("inf")
        self._over = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._over.set()

    def start(self) -> None:
        """Begins to watch; the first step may take `seconds` from now."""
        if self.seconds:
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A step is finished."""
        self._deadline = time.monotonic() + self.seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not watch what is no step, such as validation; `seconds` begin anew after it."""
        self._deadline = float("inf")
        try:
            yield
        finally:
            self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._deadline:
                print(
                    f"stopped: no step finished in train.watchdog = {self.seconds:g} seconds; where the threads are:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(1)
