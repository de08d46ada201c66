"""Functions mapped over processes that do not outlive the one that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hydrax.core.build import ConfigError

Map = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterator[Any]]
"""(function, arguments, arguments sent at a time) -> the results, in order."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Map]:
    """A map over that many processes; with one, this process does the work.

    Raises:
      ConfigError: a process died.
    """
    if processes == 1:
        yield lambda function, arguments, at_once: map(function, arguments)
        return
    # Spawned: a forked process would hold the pipe by which its siblings notice the death of their parent.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin)
    try:
        yield lambda function, arguments, at_once: pool.map(function, arguments, chunksize=at_once)
    except BrokenProcessPool:
        allowed = "a process died, perhaps for want of memory; expected fewer, the same command continues"
        raise ConfigError("processes", processes, allowed) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Leaves interrupts to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
