"""The benchmark of running averages: every way gives what the definition does, and is timed."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.eval import averages, contest
from hydrax.eval.averages import SUBJECTS, Op, Settings, bench


def settings(**options) -> Settings:
    values = {"subjects": ["real_fourier"], "seq_lens": [32, 16], "widths": [8], "modes": 3, "check": 16}
    return build(Settings, {**values, "repeats": 1, "seconds": 0.01, "threads": 2, **options})


@pytest.fixture(autouse=True)
def cached(monkeypatch):
    monkeypatch.setattr(contest, "uncached", contextlib.nullcontext)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.endswith(("r", "n", "_32")) else pytest.mark.slow) for n in SUBJECTS]
)
def test_every_way_gives_what_the_definition_does(name):
    """Outputs and all gradients, over more than one chunk."""
    subject = SUBJECTS[name]
    verdict, errors = contest.compare(Op(subject.kind, subject.way, 8, 3), 40)
    assert verdict == "right", errors


def test_wrong_results_are_named(monkeypatch):
    def circular(x):
        log_q, read = averages._modes(x)
        T = x["x"].shape[1]
        kernel = (read * x["write"] * jnp.exp(jnp.arange(T)[:, None, None] * log_q)).sum(-1)
        return jnp.fft.irfft(jnp.fft.rfft(x["x"], axis=1) * jnp.fft.rfft(kernel, axis=0), T, axis=1)

    monkeypatch.setitem(SUBJECTS, "real_fourier", averages.Subject(averages.Decays(), circular))
    ((row,),) = bench(settings(seq_lens=[16]))
    assert row.verdict == "wrong: o, dlog_decay, dread, dwrite, dx"
    assert set(row.results) == {"forward", "forward_backward"}


def test_ways_are_timed_at_every_length():
    (rows,) = bench(settings(subjects=["slots_associative_scan"]))
    assert [(row.seq_len, row.verdict, row.error) for row in rows] == [(16, "right", None), (32, "right", None)]
    assert all(r.seconds.median > 0 and r.memory.total > 0 for row in rows for r in row.results.values())


def test_inputs_have_the_widths_they_are_given():
    for name, subject in SUBJECTS.items():
        inputs = jax.eval_shape(lambda s=subject: Op(s.kind, s.way, 128, 4).inputs(1, 6))
        assert np.prod(inputs["dy"].shape) == 6 * 128, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["fft"]}, "subjects = 'fft': expected all, or some of real_chunks_16"),
        ({"widths": [100]}, "widths = 100: expected at most 64, or a multiple of it"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        settings(**options)
