"""Seconds per call of several programs, measured side by side."""

import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Call = Callable[[], Any]

SHORTEST = 0.02
"""Seconds of a sample, at least: beside them the launch of a program and the resolution of the clock are nothing."""
ROUNDS = 4
"""Samples that fit into the time given to a program, unless its single calls are longer than that."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call: statistics of `samples` samples of `calls` calls each; 60 % of them lie from p20 to p80."""

    median: float
    minimum: float
    p20: float
    p80: float
    samples: int
    calls: int


def isolated(function: Callable[..., Value], *args: Any) -> Value:
    """Its value, from a new process, so that this one leaves the device alone."""
    new = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=new) as pool:
        return pool.submit(function, *args).result()


def seconds_of(call: Call, times: int = 1) -> float:
    """Seconds per call of `times` calls in a row, whose results are waited for."""
    began = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)  # a device runs its programs in order
    return (time.perf_counter() - began) / times


def queued(begin: Callable[[], Value], wait: Callable[[Value], Any], times: int) -> list[float]:
    """Seconds from end to end of `times` calls, each begun before the one before has ended, as a training loop does.

    Args:
      begin: starts a call on the device and returns what `wait` waits for.
    """
    before, ends = begin(), []
    for _ in range(times + 1):
        this = begin()
        wait(before)
        ends.append(time.perf_counter())
        before = this
    wait(before)
    return np.diff(ends).tolist()


def side_by_side(calls: Mapping[Key, Call], *, repeats: int, seconds: float) -> dict[Key, Times]:
    """The times of programs that are to be compared with each other.

    Samples alternate, so that drifting clocks and other processes meet all programs alike. They last equally long, by
    the number of calls: in a noisy second a short sample would have the better chance to be left undisturbed.

    Args:
      calls: the programs, compiled and called before; they return arrays, or wait by themselves.
      repeats: samples of each program, at most.
      seconds: of measuring after which a program gets no further sample.
    """
    once = {key: seconds_of(call) for key, call in calls.items()}
    length = max(SHORTEST, min(max(once.values(), default=0.0), seconds / ROUNDS))
    counts = {key: max(1, round(length / t)) for key, t in once.items()}
    samples = {key: [t] if t >= seconds else [] for key, t in once.items()}  # a slow one is not called again
    for _ in range(repeats):
        for key, call in calls.items():
            if counts[key] * sum(samples[key]) < seconds:
                samples[key].append(seconds_of(call, counts[key]))
    return {key: times_of(values, counts[key]) for key, values in samples.items()}


def times_of(samples: list[float], calls: int) -> Times:
    """Statistics of seconds per call."""
    p20, median, p80 = np.percentile(samples, (20, 50, 80)).tolist()
    return Times(median, min(samples), p20, p80, len(samples), calls)
