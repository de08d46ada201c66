"""Traces of steps, and reports of what is compiled again."""

import logging
import os
import signal

import jax
import jax.numpy as jnp

from hydrax.train.config import TraceConfig
from hydrax.train.profile import COMPILER, Compilations, Tracer


def run(tracer, steps):
    """(step, whether it is traced) of steps, with a SIGUSR1 before those that are listed."""
    traced = []
    for step in range(1, 8):
        if step in steps:
            os.kill(os.getpid(), signal.SIGUSR1)
        tracer.before(step)
        traced.append((step, tracer._until >= 0))
    return [step for step, on in traced if on]


def test_steps_are_traced_that_are_named_or_asked_for(tmp_path, monkeypatch):
    calls, lines, before = [], [], signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Tracer(tmp_path, TraceConfig(start=2, steps=2), lines.append) as tracer:
        assert run(tracer, [6]) == [2, 3, 6, 7]
    folder = str(tmp_path / "profile")
    assert calls == [folder, "stop", folder, "stop"]  # the second at the end of the run
    assert lines == [f"traced up to step 3: {folder}"]
    assert signal.getsignal(signal.SIGUSR1) == before
    with Tracer(tmp_path, TraceConfig(), lines.append) as tracer:
        assert run(tracer, []) == []


def test_a_trace_is_written(tmp_path):
    with Tracer(tmp_path, TraceConfig(start=1, steps=1), str) as tracer:
        tracer.before(1)
        jax.block_until_ready(jnp.ones(3) + 1)
        tracer.before(2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_second_compilation_names_what_changed(caplog):
    def evaluate(x, y):
        return x.sum() + y

    def other(x):
        return x + 1

    f, g, lines = jax.jit(evaluate), jax.jit(other), []
    level = logging.getLogger(COMPILER).level
    with Compilations(("evaluate",), lines.append) as found:
        for n in (3, 3, 4):
            f(jnp.ones((2, n)), jnp.ones(()))
            g(jnp.ones(n))
        assert found.again == 1
        logging.getLogger(COMPILER).warning("passed on")
    assert lines == ["compiled evaluate again (for the 1. time): float32[2,3] -> float32[2,4]"]
    assert logging.getLogger(COMPILER).level == level
    assert not logging.getLogger(COMPILER).isEnabledFor(logging.DEBUG)
    assert "passed on" in caplog.text
