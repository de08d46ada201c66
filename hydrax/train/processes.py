"""What several processes of one run do together: begin, decide, and leave when one of them is lost."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from hydrax.core.build import ConfigError
from hydrax.train import stderr

HEARTBEAT = 30
"""Seconds without a sign of life after which JAX takes a process for lost, and ends all others."""

LOST = ("gloo", "nccl", "connection", "unavailable", "deadline", "aborted", "heartbeat")
"""What errors of collectives say when another process is gone; other errors are this process's own."""


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of a run: these, or those that JAX detects (Slurm, GKE, ...)."""
    stderr.condense()
    jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT)


def first() -> bool:
    """Whether this process writes the files and talks to the user."""
    return jax.process_index() == 0


def together(decide: Callable[[], Any]) -> Any:
    """What `decide` gives on process 0, which alone calls it; JSON.

    Raises:
      ConfigError, OSError: as raised there, on every process.
    """
    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    if first():
        try:
            answer = {"value": decide()}
        except ConfigError as error:
            answer = {"wrong": [error.key, str(error.value), error.allowed]}
        except OSError as error:
            answer = {"failed": [error.errno, error.strerror, str(error.filename)]}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(text if first() else np.zeros(length, np.uint8))
    answer = json.loads(np.asarray(text).astype(np.uint8).tobytes())
    if "wrong" in answer:
        raise ConfigError(*answer["wrong"])
    if "failed" in answer:
        raise OSError(*answer["failed"])
    return answer["value"]


def leave_if_lost(error: Exception) -> None:
    """Ends this process if the error says that another one is gone."""
    here = jax.process_count() == 1 or isinstance(error, ConfigError)
    if not here and any(word in str(error).lower() for word in LOST):
        leave(stderr.LOST.format(why=f" ({error})"))


def leave(line: str) -> NoReturn:
    """Ends this process in one line on stderr with exit code 1.

    One of several processes ends without JAX's shutdown, which waits minutes for those that wait for this one.
    """
    line = " ".join(line.split())
    if jax.process_count() == 1:
        raise SystemExit(line)
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


@contextlib.contextmanager
def failures(workdir: pathlib.Path) -> Iterator[None]:
    """Turns what a disk or a lost process raises into one line; the checkpoints stand."""
    try:
        yield
    except OSError as error:
        leave(f"{stderr.STOPPED}{workdir} cannot be used ({error}); the same command continues")
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # collectives raise either
        leave_if_lost(error)
        raise
