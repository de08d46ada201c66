"""Looking at a run while it runs: traces of some steps, and what was compiled more than once."""

import logging
import pathlib
import re
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import jax

from hydrax.train.config import TraceConfig

COMPILER = "jax._src.interpreters.pxla"
COMPILING = re.compile(r"Compiling jit\((\w+)\) with global shapes and types (.*?)\. Argument mapping")


class Tracer:
    """Traces of `jax.profiler` in `profile/` of the run folder: of the steps that the config names, and after SIGUSR1.

    View them with `xprof` or TensorBoard's profile plugin, or in Perfetto.
    """

    def __init__(self, workdir: pathlib.Path, cfg: TraceConfig, say: Callable[[str], None]):
        self._folder, self._cfg, self._say = workdir / "profile", cfg, say
        self._asked, self._until = False, -1
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._until >= 0:
            jax.profiler.stop_trace()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def before(self, step: int) -> None:
        """To be called before every step."""
        if step == self._until:
            jax.profiler.stop_trace()
            self._until = -1
            self._say(f"traced up to step {step - 1}: {self._folder}")
        if self._until < 0 and (self._asked or step == self._cfg.start):
            self._asked, self._until = False, step + self._cfg.steps
            jax.profiler.start_trace(str(self._folder))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


class Compilations(logging.Handler):
    """Notes what is compiled in a block, and reports a function that is compiled again, with what changed.

    JAX says it in its log only, at a level that is usually not shown; warnings of it are passed on.
    """

    def __init__(self, watched: tuple[str, ...], say: Callable[[str], None]):
        super().__init__(logging.DEBUG)
        self.again = 0
        self._say = say
        self._seen: dict[str, list[str]] = {name: [] for name in watched}
        self._logger = logging.getLogger(COMPILER)

    def __enter__(self) -> Self:
        self._before = self._logger.level, self._logger.propagate
        self._logger.addHandler(self)
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)  # not by the attribute: loggers remember which levels they show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            logging.getLogger().handle(record)
        found = COMPILING.match(record.getMessage())
        if found is None or found[1] not in self._seen:
            return
        shapes = re.findall(r"\w+\[[\d,]*\]", found[2])
        if before := self._seen[found[1]]:
            self.again += 1
            changed = [f"{a} -> {b}" for a, b in zip(before, shapes, strict=False) if a != b] or ["not its shapes"]
            self._say(f"compiled {found[1]} again (for the {self.again}. time): {'; '.join(changed[:3])}")
        self._seen[found[1]] = shapes
