"""What a run tells its user while it runs: speed, utilisation, time left."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from hydrax.train.processes import first

PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bf16 FLOP/s of one device (vendors' figures), by the beginning of `device_kind`; the first match counts."""


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilisation; None for a device without a known peak.

    Raises:
      ValueError: above 1, which only a wrong count, peak or clock can give.
    """
    peak = next((flops for kind, flops in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)
    if peak is None:
        return None
    value = tokens_per_second * flops_per_token / (devices * peak)
    if value > 1:
        raise ValueError(f"MFU of {value:.0%} on {devices} x {device_kind}: FLOP count, peak or clock is wrong")
    return value


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if first():
        print(line, flush=True)


class Clock:
    """Seconds of the whole run, and of training alone since the last lap; `before` counts earlier processes."""

    def __init__(self, before: float = 0.0):
        self._start = time.perf_counter() - before
        self.restart()

    def restart(self) -> None:
        """Begins a lap now."""
        self._lap, self._paused = time.perf_counter(), 0.0
        self.parts = {"data": 0.0, "device": 0.0}

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    @property
    def lap(self) -> float:
        """Seconds since the lap began, without pauses."""
        return time.perf_counter() - self._lap - self._paused

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts as waiting for the data or the device, in this lap."""
        began = time.perf_counter()
        yield
        self.parts[name] += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves validation and saving out of the lap."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began


class Progress:
    """A bar on a terminal, one plain line per record elsewhere."""

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self._bar: Any = None
        if sys.stdout.isatty() and first():
            from rich import progress  # 0.1 s that only a terminal needs

            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.description}"))
            self._bar = progress.Progress(*columns, progress.TimeRemainingColumn())
            self._task = self._bar.add_task("compiling", total=steps, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def update(self, step: int, values: Mapping[str, float], speed: float | None, utilisation: float | None) -> None:
        """Shows a record; `speed` in steps/s, None where it is not known yet."""
        parts = [f"loss {values['loss']:.4f}"]
        if "bits_per_byte" in values:
            parts.append(f"{values['bits_per_byte']:.4f} bits/byte")
        if "tokens_per_second" in values:
            parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if utilisation is not None:
            parts.append(f"MFU {utilisation:.1%}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="  ".join(parts))
            return
        if speed:
            parts.append(f"{datetime.timedelta(seconds=round((self.steps - step) / speed))} left")
        self.say(f"step {step}/{self.steps}  " + "  ".join(parts))
