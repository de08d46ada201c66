"""Processes of their own: many that share work, and one that may not take longer than it is given."""

import importlib
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, MutableSequence
from multiprocessing.connection import Connection
from typing import Any

NEW = multiprocessing.get_context("spawn")

Mine = Callable[[str], bool]
"""Whether this process does the piece of work of that name; a yes is counted."""


def share(module: str, what: str, *args: Any, workers: int, seconds: float, say: Callable[[str], None]) -> None:
    """`what(*args, mine)` of a module in several processes, each of which does what is `mine` there.

    Nothing depends on it: a process that fails leaves its share undone, and after `seconds` all are ended.
    """
    began, told = time.monotonic(), 0.0
    counts = NEW.RawArray("i", workers)  # no lock, which a process that dies could keep
    processes = [NEW.Process(target=_share, args=(module, what, args, i, counts), daemon=True) for i in range(workers)]
    for process in processes:
        process.start()

    def state() -> str:
        busy = sum(process.is_alive() for process in processes)
        failed = sum(process.exitcode not in (None, 0) for process in processes)
        brief = f"{sum(counts)} in {time.monotonic() - began:.0f} s, {busy} of {workers} processes at work"
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


def _share(module: str, what: str, args: tuple, index: int, counts: MutableSequence[int]) -> None:
    def mine(name: str) -> bool:
        chosen = zlib.crc32(name.encode()) % len(counts) == index
        counts[index] += chosen
        return chosen

    call(module, what, *args, mine)


def limited(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` from a new process.

    Raises:
      RuntimeError: what the function raises, or what became of its process, in a line.
    """
    receiver, sender = NEW.Pipe(duplex=False)
    process = NEW.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()  # the other end is in the process: when that ends, so does the waiting
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"not done in {seconds:.0f} s")
        value, failure = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if failure:
        raise RuntimeError(failure)
    return value


def _answer(sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    try:
        sender.send((function(*args), None))
    except Exception as error:
        sender.send((None, line(error)))
    sender.close()


def line(error: Exception) -> str:
    """What went wrong, briefly."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def many() -> int:
    """How many processes compile at the same time."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))
