"""What the benchmark reports: all its numbers, for every length and pass, also when some of it fails."""

import contextlib
import dataclasses
import json
import os
import types

import jax
import jax.numpy as jnp
import pytest

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.eval import bench, layer, report, timing
from hydrax.mixers.linear.gla import GLA

LENGTHS = (16, 32)


def settings(**options) -> bench.Settings:
    values = {
        "mixers": ["gla"],
        "d_model": 16,
        "batch": 2,
        "seq_lens": list(LENGTHS),
        "dtype": "float32",
        "impl": None,
        "backward": True,
        "repeats": 2,
        "seconds": 0.01,
        "threads": 2,
        "isolate": False,
    }
    return build(bench.Settings, values | options)


class Broken(GLA):
    """A mixer that cannot do more than 16 tokens."""

    def mix(self, x, ctx, state):
        if x.shape[1] > 16:
            raise NotImplementedError("long\nrows")
        return super().mix(x, ctx, state)


def dies(name: str, settings: bench.Settings) -> list[bench.Row]:
    os._exit(1)


@pytest.fixture(scope="module", autouse=True)
def cached():
    """Programs come from the cache of the tests; `uncached` has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "uncached", contextlib.nullcontext)
        yield


@pytest.fixture(scope="module")
def rows(cached) -> list[bench.Row]:
    [rows] = bench.bench(settings())
    return rows


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a call says so: `clock(3.0)` makes a call of 3 seconds, which is noted in `clock.log`."""
    now, log = [0.0], []

    def call(name, *seconds):
        durations = list(seconds)

        def run():
            log.append(name)
            now[0] += durations.pop(0) if len(durations) > 1 else durations[0]

        return run

    call.log = log
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return call


def test_samples_alternate_and_last_equally_long(clock):
    calls = {"short": clock("s", 0.1), "long": clock("l", 0.4)}
    times = timing.side_by_side(calls, repeats=3, seconds=100)
    assert "".join(clock.log) == "sl" + 3 * ("ssss" + "l")
    assert (times["short"].calls, times["long"].calls) == (4, 1)
    assert times["short"].median == pytest.approx(0.1)
    assert times["long"].samples == 3


def test_quick_calls_are_repeated_and_the_time_is_bounded(clock):
    calls = {"quick": clock("q", 1 / 1024), "slow": clock("s", 0.375), "slowest": clock("x", 7.0)}
    times = timing.side_by_side(calls, repeats=100, seconds=1.0)
    assert times["quick"].calls == 256  # a quarter of a second: room for four samples
    assert (times["quick"].samples, times["slow"].samples) == (4, 3)
    assert clock.log.count("x") == 1
    assert times["slowest"] == timing.Times(7.0, 7.0, 7.0, 7.0, 1, 1)


def test_statistics_of_samples(clock):
    times = timing.side_by_side({0: clock("a", 1.0, 5.0, 1.0, 2.0, 3.0, 4.0, 9.0)}, repeats=6, seconds=100)[0]
    assert times == timing.Times(median=3.5, minimum=1.0, p20=2.0, p80=5.0, samples=6, calls=1)


def test_queued_calls_are_begun_before_the_one_before_ends_and_timed_from_end_to_end(monkeypatch):
    log, ends, names = [], iter([10.0, 11.0, 13.0]), iter("abcd")
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(ends)))

    def begin():
        log.append(next(names))
        return log[-1]

    assert timing.queued(begin, lambda name: log.append(name.upper()), 2) == [1.0, 2.0]
    assert "".join(log) == "abAcBdCD"


def test_nothing_to_time():
    assert timing.side_by_side({}, repeats=3, seconds=1.0) == {}


def test_rows_hold_every_length_and_pass(rows):
    assert [(row.mixer, row.seq_len, list(row.results)) for row in rows] == [
        ("gla", length, ["forward", "forward_backward"]) for length in LENGTHS
    ]
    for row in rows:
        assert row.error is None
        assert row.options["key_dim"] == 2
        assert row.state_bytes == 4 * 4 * 2 * 4
        for result in row.results.values():
            numbers = [result.compile_seconds, result.ns_per_token, result.flops_per_second, result.ratio]
            assert min(*numbers, result.ratio_of_minima, *dataclasses.astuple(result.seconds)) > 0
            assert result.seconds.minimum <= result.seconds.p20 <= result.seconds.median <= result.seconds.p80
    assert all(result.ratio == result.ratio_of_minima == 1 for result in rows[0].results.values())
    assert bench.bench(settings(backward=False)).__next__()[0].results.keys() == {"forward"}


def test_memory_is_that_of_the_program(rows):
    """gla drops the index of the layer, and forward the cotangent; gradients are as large as what they belong to."""
    one, name = settings().layer("gla"), "forward_backward"
    params = tree.nbytes(one.shapes)
    for row in rows:
        x, ids = 2 * row.seq_len * 16 * 4, 2 * row.seq_len * 4
        small, large = (row.results[n].memory for n in ("forward", name))
        assert (small.arguments, large.arguments) == (params + x + ids, params + 2 * x + ids)
        assert small.outputs == x
        assert large.outputs == pytest.approx(2 * x + params, rel=0.1)  # and a table of pointers
        assert large.temporaries > small.temporaries > 0
        assert all(m.total == m.arguments + m.outputs + m.temporaries and m.measured is None for m in (small, large))


def test_times_become_speeds_and_ratios(monkeypatch):
    times = {16: timing.Times(2.0, 1.0, 1.5, 3.0, 5, 1), 32: timing.Times(6.0, 2.0, 5.0, 7.0, 5, 1)}
    monkeypatch.setattr(bench, "side_by_side", lambda programs, **_: {key: times[key[0]] for key in programs})
    short, long = bench.measure("gla", settings())
    assert long.results["forward"].ns_per_token == pytest.approx(6e9 / (2 * 32))
    assert long.results["forward"].ratio == pytest.approx(1.5)
    assert long.results["forward"].ratio_of_minima == pytest.approx(1.0)
    # 2 FLOPs per entry of q, k, v, gate, output, and of the two decay matrices; 4KV per head
    flops = 2 * (16 * 8 + 16 * 8 + 3 * 16 * 16 + 16 * 16 + 16 * 8) + 4 * 4 * 2 * 4
    assert long.flops_per_token == short.flops_per_token == flops
    assert long.results["forward_backward"].flops_per_second == pytest.approx(3 * flops * 2 * 32 / 6)


def test_what_a_model_tells_its_layers_is_an_argument():
    """Otherwise the decay of a layer and masks of documents would be computed by the compiler, where it can."""
    one = layer.Layer("lightning", 16, "float32", None)
    params = one.init()
    program = layer.Program(one, "forward", params, 1, 16)
    assert program.memory.arguments == tree.nbytes(params) + 16 * 16 * 4 + 16 * 4 + 4
    inputs = one.inputs(1, 16)
    y = one(params, inputs["x"], inputs["facts"])
    for changed in ({"segment_ids": jnp.arange(16)[None] // 8 + 1}, {"layer_index": 1}):
        assert jnp.abs(one(params, inputs["x"], inputs["facts"] | changed) - y).max() > 1e-3


def test_gradients_of_everything_are_computed():
    one = layer.Layer("gla", 16, "bfloat16", None)
    params, inputs = one.init(), one.inputs(1, 16)
    y, (dparams, dx) = jax.jit(lambda p, i: layer.forward_backward(one, p, **i))(params, inputs)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, dparams) == jax.tree.map(jnp.shape, params)
    assert all(jnp.abs(g).max() > 0 for g in [dx, *jax.tree.leaves(dparams)])
    assert {str(p.dtype) for p in jax.tree.leaves(params)} == {"bfloat16", "float32"}


def test_a_failure_is_a_row_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(mixers.TABLE, "broken", dataclasses.replace(mixers.row("gla"), path=f"{__name__}:Broken"))
    broken, whole = bench.bench(settings(mixers=["broken", "gla"]))
    assert [row.error for row in broken] == [None, "forward: NotImplementedError: long rows"]
    assert [len(row.results) for row in broken] == [2, 0]
    assert all(row.error is None for row in whole)
    text = report.line(broken[1])
    assert text == "broken, 32 tokens:  failed: forward: NotImplementedError: long rows"
    assert report.table(broken, settings()).row_count == 3


def test_what_does_not_fit_is_not_run(monkeypatch):
    needed = layer.Program(settings().layer("gla"), "forward", settings().layer("gla").init(), 2, 16).memory.total
    monkeypatch.setattr(layer, "_capacity", lambda: needed)
    [[short, long]] = bench.bench(settings())
    assert list(short.results) == ["forward"]
    assert short.error.startswith("forward_backward: MemoryError: needs 0.0 GiB of")
    assert (long.results, long.error[:8]) == ({}, "forward:")
    monkeypatch.setattr(layer, "_capacity", lambda: needed - 1)
    [[short, _]] = bench.bench(settings(backward=False))
    assert short.error.startswith("forward: MemoryError")


def test_a_failure_while_timing_is_the_rows_of_that_mixer(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(bench, "side_by_side", fails)
    [rows] = bench.bench(settings(backward=False))
    assert [(row.results, row.error) for row in rows] == [({}, "RuntimeError: RESOURCE_EXHAUSTED")] * 2


def test_the_device_tells_its_peak_only_when_it_rises(monkeypatch):
    program = layer.Program(settings().layer("gla"), "forward", settings().layer("gla").init(), 2, 16)
    fixed, one = program.memory.arguments, settings().layer("gla")

    def measured(before, after):
        stats = iter([{"bytes_in_use": fixed + 7, "peak_bytes_in_use": p} for p in (before, after)])
        monkeypatch.setattr(layer, "_statistics", lambda: next(stats))
        program.start(one.init(), one.inputs(2, 16))
        return program.memory.measured

    assert measured(fixed + 90, fixed + 90) is None
    assert measured(fixed + 90, fixed + 100) == fixed + 93  # 7 bytes belonged to others


@pytest.mark.thorough  # starts processes
def test_isolated_mixers_equal_others_and_may_die(monkeypatch, rows):
    [isolated] = bench.bench(settings(isolate=True))
    assert [dataclasses.replace(row, results={}) for row in isolated] == [
        dataclasses.replace(row, results={}) for row in rows
    ]
    assert [list(row.results) for row in isolated] == [list(row.results) for row in rows]
    monkeypatch.setattr(bench, "measure", dies)
    [dead] = bench.bench(settings(isolate=True))
    assert all(row.error.startswith("BrokenProcessPool:") and not row.results for row in dead)


def test_programs_are_compiled_and_not_read(tmp_path):
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in options}
    try:
        for name, value in zip(options, (str(tmp_path), 0), strict=True):
            jax.config.update(name, value)
        with layer.uncached():
            jax.jit(lambda x: x * 3).lower(1.0).compile()
            assert not any(tmp_path.iterdir())
        jax.jit(lambda x: x * 3).lower(1.0).compile()
        assert any(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        with layer.uncached():  # leaves the cache as if it had not been used yet
            pass


def test_the_file_is_there_from_the_beginning(tmp_path, rows):
    out = tmp_path / "new" / "bench.json"
    results = report.Report(out, "python -m launch.bench", bench.environment(settings()), settings(), report.draw_times)
    first = json.loads(out.read_text())
    assert first["rows"] == [] and first["settings"]["seq_lens"] == list(LENGTHS)
    assert first["environment"]["backend"] == jax.default_backend()
    results.add(rows[:1])
    results.add(rows[1:])
    saved = json.loads(out.read_text())["rows"]
    assert [row["seq_len"] for row in saved] == list(LENGTHS)
    assert saved[1]["results"]["forward"]["seconds"]["median"] == rows[1].results["forward"].seconds.median
    results.draw()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_draws_nothing(tmp_path):
    report.draw_times([], tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_everything_means_all_but_growing_caches():
    assert set(bench.everything(64)) >= {"gla", "gdn", "mamba2", "lightning", "abc", "gated_conv"}
    assert set(bench.everything(64)).isdisjoint({"attn", "swa"})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"mixers": ["gln"]}, "mixers"),
        ({"mixers": []}, "mixers"),
        ({"seq_lens": []}, "seq_lens"),
        ({"seq_lens": [16, 0]}, "seq_lens[1]"),
        ({"d_model": 18}, "mixers.gla.heads"),
        ({"dtype": "float16"}, "dtype"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_settings_that_cannot_be_used(options, key):
    with pytest.raises(ConfigError) as error:
        settings(**options)
    assert error.value.key == key


def test_an_implementation_nobody_has():
    with pytest.raises(ConfigError, match=r"impl = 'fast': linear_attention: .*expected one of recurrent, chunked"):
        bench.check(settings(impl="fast"))
    bench.check(settings(impl="recurrent"))
