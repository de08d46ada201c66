"""The comparison of kernels: what is compared, who is believed, and what is written down."""

import dataclasses
import json

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.eval import kernels, kernels_report, report
from hydrax.eval.sides import ours
from hydrax.eval.timing import times_of

SHAPE = (1, 24, 2, 8)


class Here:
    """A side in this process. The `wrong` one has an error in one gradient, the `broken` one cannot do it."""

    def __init__(self, name: str, seconds: float):
        self.name = name

    def ask(self, what, *args):
        if self.name == "broken" and what in ("evaluate", "sample"):
            raise RuntimeError("ValueError: no kernel")
        found = getattr(ours, what)(*args)
        if self.name == "wrong" and what == "evaluate":
            found["dk"] = 1.1 * found["dk"]
        return found

    def close(self):
        pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels, "CHECKED", SHAPE)
    monkeypatch.setattr(kernels, "Side", Here)
    monkeypatch.setitem(kernels.SIDES, "wrong", "")
    monkeypatch.setitem(kernels.SIDES, "broken", "")


def settings(**options) -> kernels.Settings:
    values = {"problems": ("scalar",), "shapes": (SHAPE,), "peer": None, "rounds": 2, "calls": 1}
    return kernels.Settings(**values | options)


@pytest.mark.parametrize("name", kernels.PROBLEMS)
def test_every_problem_is_right_and_timed(name):
    (rows,) = kernels.compare(settings(problems=(name,)))
    assert tuple(row.pass_ for row in rows) == kernels.PROBLEMS[name].passes
    problem = kernels.PROBLEMS[name]
    for row in rows:
        assert row.verdict == "right", row
        gradients = {f"d{x}" for x in problem.learned(problem.inputs(SHAPE))}
        assert row.errors.keys() == {"o"} | ({"state"} if problem.shape else gradients)
        assert row.seconds.samples == 2 and row.seconds.median > 0


def test_least_traffic_is_counted_from_the_arrays():
    tensor, token = 2 * np.prod(SHAPE), 4 * np.prod(SHAPE[:3])
    forward = {"constant": 4 * tensor + 8, "scalar": 4 * tensor + token, "vector": 6 * tensor}
    forward |= {"delta": 4 * tensor + token, "gated_delta": 4 * tensor + 2 * token, "scan": 4 * tensor}
    both = {"constant": 11 * tensor + 16, "scalar": 11 * tensor + 3 * token, "scan": 10 * tensor}
    for name, bytes_ in forward.items():
        assert kernels.PROBLEMS[name].bytes(SHAPE, "forward") == bytes_, name
    for name, bytes_ in both.items():
        assert kernels.PROBLEMS[name].bytes(SHAPE, "forward_backward") == bytes_, name


def test_a_peer_with_wrong_results_keeps_only_its_time():
    (rows,) = kernels.compare(settings(peer="wrong"))
    verdicts = {row.side: row.verdict for row in rows}
    assert verdicts == {"hydrax": "right", "wrong": "wrong: dk"}
    assert "time only: wrong: dk" in kernels_report.line(rows[-1])


def test_a_peer_that_fails_is_named_with_the_reason():
    (rows,) = kernels.compare(settings(peer="broken"))
    assert rows[-1].seconds is None and rows[-1].verdict == "fails: ValueError: no kernel"
    assert rows[0].verdict == "right"


def test_report(tmp_path):
    (rows,) = kernels.compare(settings(peer="wrong"))
    seconds = times_of([1e-3, 2e-3, 3e-3], 1)
    rows = [dataclasses.replace(row, seconds=seconds, bytes=2_000_000, floor_seconds=1e-3) for row in rows]
    out = tmp_path / "kernels.json"
    results = report.Report(out, "python -m launch.bench_kernels", {}, settings(), kernels_report.draw)
    results.add(rows)
    results.draw()
    assert json.loads(out.read_text())["rows"][0]["seconds"]["median"] == 2e-3
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    cells = [list(column.cells) for column in kernels_report.table(rows).columns]
    assert [column[0] for column in cells[4:8]] == ["2.000", "1.400-2.600", "1", "50%"]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"problems = 'lstm': expected all, or some of constant, scalar"):
        settings(problems=("lstm",))
    with pytest.raises(ConfigError, match=r"peer = 'apex': expected auto, none or one of fla"):
        kernels.peer("apex")


def test_a_peer_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.peer("auto") is kernels.peer("none") is None
    with pytest.raises(ConfigError, match=r"peer = 'fla': expected fla, torch to be installed"):
        kernels.peer("fla")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "apex" else name)
    monkeypatch.setattr(kernels, "isolated", lambda function: "gpu")
    assert kernels.peer("auto") == kernels.peer("fla") == "fla"
    with pytest.raises(ConfigError, match=r"peer = 'fla': expected fla, torch, apex to be installed"):
        kernels.peer("fla", "apex")
    monkeypatch.setattr(kernels, "isolated", lambda function: "cpu")
    assert kernels.peer("auto") is None
    with pytest.raises(ConfigError, match=r"peer = 'fla': its kernels need a GPU"):
        kernels.peer("fla")


def test_a_peer_is_prepared_for_all_that_is_timed(monkeypatch):
    given, said = [], []
    monkeypatch.setattr(kernels.workers, "share", lambda *args, say, **options: (given.append(args), say("3 in 1 s")))
    kernels.prepare(settings(prepare=9), said.append)
    kernels.prepare(settings(peer="fla"), said.append)
    assert not given
    kernels.prepare(settings(peer="fla", problems=("scalar", "scan"), prepare=9), said.append)
    assert given == [("hydrax.eval.sides.fla", "compile_share", [kernels.PROBLEMS["scalar"]], (SHAPE, SHAPE))]
    assert said == ["compiling kernels of fla: 3 in 1 s"]
