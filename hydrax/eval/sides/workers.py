"""Processes of their own: many that share work, and one that may not take longer than it is given."""

import importlib
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, MutableSequence
from multiprocessing.connection import Connection
from typing import Any

NEW = multiprocessing.get_context("spawn")

Mine = Callable[[str], bool]
"""Whether this process shall do the piece of work of that name; asked once, it answers yes only once among all."""

NAMES = 1 << 20
"""Places for names of pieces of work; two that share one would leave the second undone."""


def share(module: str, what: str, *args: Any, workers: int, seconds: float, say: Callable[[str], None]) -> None:
    """`what(*args, mine)` of a module in several processes; each does what is `mine` there, and no other has begun.

    Nothing depends on it: a process that fails leaves its share undone, and after `seconds` all are ended.
    """
    began, told = time.monotonic(), 0.0
    begun = NEW.RawArray("b", NAMES)  # no lock, which a process that dies could keep: at worst two do the same
    processes = [NEW.Process(target=_share, args=(module, what, args, begun), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()

    def state() -> str:
        busy = sum(process.is_alive() for process in processes)
        failed = sum(process.exitcode not in (None, 0) for process in processes)
        brief = f"{sum(begun)} in {time.monotonic() - began:.0f} s, {busy} of {workers} processes at work"
        return brief + (f", {failed} ended early" if failed else "")

    while any(process.is_alive() for process in processes) and time.monotonic() - began < seconds:
        time.sleep(0.5)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            say(state())
    say(state())
    for process in processes:
        process.kill()
        process.join()


def call(module: str, what: str, *args: Any) -> Any:
    """`what(*args)` of a module, which is imported for it."""
    return getattr(importlib.import_module(module), what)(*args)


def _share(module: str, what: str, args: tuple, begun: MutableSequence[int]) -> None:
    def mine(name: str) -> bool:
        place = zlib.crc32(name.encode()) % len(begun)
        free = not begun[place]
        begun[place] = 1
        return free

    call(module, what, *args, mine)


class Worker:
    """A process that answers one question after another, and is replaced if it dies or takes too long."""

    def __init__(self) -> None:
        self._process: Any = None
        self._end: Any = None

    def ask(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, there.

        Raises:
          RuntimeError: what the function raises, or what became of the process, in a line.
        """
        if self._process is None:
            self._end, other = NEW.Pipe()
            self._process = NEW.Process(target=_answer, args=(other,))
            self._process.start()
            other.close()  # it is in the process: when that ends, so does the waiting
        try:
            self._end.send((function, args))
            if not self._end.poll(seconds):
                self.close()
                raise RuntimeError(f"took longer than {seconds:.0f} s")
            value, failure = self._end.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise RuntimeError(f"its process ended with code {code}") from None
        if failure:
            raise RuntimeError(failure)
        return value

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._end.close()
        self._process = None


def _end_with_parent() -> None:
    """Ends this process with the one that asks: nobody waits for its answers, and it may hold a device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(end: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one that asks, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        reply: tuple[Any, str | None]
        try:
            reply = function(*args), None
        except Exception as error:
            reply = None, line(error)
        end.send(reply)


def limited(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` from a new process, with the errors of `Worker.ask`."""
    worker = Worker()
    try:
        return worker.ask(seconds, function, *args)
    finally:
        worker.close()


def line(error: Exception) -> str:
    """What went wrong, briefly."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def many() -> int:
    """How many processes compile at the same time."""
    return max(1, min(16, (os.cpu_count() or 1) - 1))
