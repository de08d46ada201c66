"""Signals that ask a run to stop: noted when they come, acted upon between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
"""A terminated run did what it was asked to; an interrupted one reports it, as shells expect."""


class Interrupt:
    """Notes the first SIGTERM or SIGINT of a block; a second one acts as usual.

    Several processes must stop at one common step: there JAX's own preemption service is asked.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def received(self, step: int) -> signal.Signals | None:
        """The signal to act upon after `step`, to be asked after every step."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        for s, handler in self._before.items():
            signal.signal(s, handler)
