"""The runs of a sweep on this machine, several at a time."""

import contextlib
import functools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import FrameType
from typing import Any

from hydrax.sweep.attempt import Stop, complete
from hydrax.sweep.runs import Run
from hydrax.sweep.slots import Slot
from hydrax.sweep.status import status

REFRESH = 0.5  # seconds between two calls of `watch`


def run_all(
    runs: Sequence[Run], slots: Sequence[Slot], *, retries: int, watch: Callable[[], None]
) -> tuple[dict[str, str], signal.Signals | None]:
    """Completes the runs, one per slot at a time; a run that fails does not stop the others.

    SIGINT, SIGTERM or SIGHUP is passed on to all processes as SIGTERM: they save, and the same call continues them
    later. A second SIGINT kills them.

    Returns:
      Why runs are not finished, by name, and the signal that stopped them, if one did.
    """
    reasons: dict[str, str] = {}
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    # What still runs, left by a sweep that died, is waited for in a slot: it uses the machine, too.
    for run in sorted(runs, key=lambda run: status(run.folder).state != "running"):
        waiting.put(run)
    with passing_on_signals() as (stop, received):
        work = functools.partial(_work, waiting=waiting, retries=retries, stop=stop, reasons=reasons)
        threads = [threading.Thread(target=work, args=(slot,)) for slot in slots[: len(runs)]]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                watch()
                alive[0].join(REFRESH)
        except BaseException:  # of `watch`, e.g. the terminal is gone
            stop.signal = signal.SIGTERM
            raise
        finally:
            for thread in threads:
                thread.join()
        watch()
    return reasons, received[0] if received else None


def _work(
    slot: Slot, waiting: "queue.SimpleQueue[Run]", retries: int, stop: Stop, reasons: MutableMapping[str, str]
) -> None:
    """Completes runs until none is waiting, on the slot's device and cores."""
    if slot.cores:
        os.sched_setaffinity(0, slot.cores)  # of this thread, and so of the processes that it starts
    with contextlib.suppress(queue.Empty):
        while stop.signal is None:
            run, environment = waiting.get_nowait(), {**os.environ, **slot.environment}
            try:
                why = complete(run.folder, run.command, environment, retries=retries, stop=stop)
            except OSError as error:  # its folder cannot be written
                why = str(error)
            if why is not None:
                reasons[run.name] = why


@contextlib.contextmanager
def passing_on_signals() -> Iterator[tuple[Stop, list[signal.Signals]]]:
    """What runs are to be stopped by, and the signals so far; the second Ctrl-C kills them."""
    stop, received = Stop(), []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        # Other signals often come in twos: a terminal that closes, a service manager.
        stop.signal = signal.SIGKILL if received.count(signal.SIGINT) > 1 else signal.SIGTERM

    # A signal that is ignored, as SIGHUP under nohup, stays so.
    numbers = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before: dict[signal.Signals, Any] = {s: signal.signal(s, note) for s in numbers}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
