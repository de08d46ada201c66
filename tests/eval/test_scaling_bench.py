"""The matrix of meshes: which cells there are, what is predicted of them, and what a row says."""

import json
import math

import pytest

from hydrax.core.build import ConfigError
from hydrax.eval import report, scaling_bench, scaling_matrix, training
from hydrax.eval.scaling_bench import Row, Settings
from hydrax.eval.timing import Times
from hydrax.models.divided import check_divided
from hydrax.parallel.mesh import AXES


def row(devices: int, seconds: float, moved: int = 0, tokens: int = 1000, cell: str = "fsdp/x", **values) -> Row:
    step = Times(seconds, seconds, seconds, seconds, 1, 1)
    moves = {"collective-permute": (1, moved)}
    facts = {"step": step, "tokens_per_second": tokens / seconds, "moved": moves, "device": "a device", **values}
    return Row(cell, devices, {}, tokens, 6e6 * tokens, "right", **facts)


@pytest.mark.parametrize("cell", scaling_matrix.CELLS, ids=lambda cell: cell.label)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_every_cell_is_a_run_that_can_be_divided(cell, size):
    for devices in (n for n in (1, 2, 4, 8) if n >= cell.least):
        cfg = cell.config(devices, size)
        sizes = dict(zip(AXES, cfg.mesh.sizes(devices), strict=True))
        assert math.prod(sizes.values()) == devices
        check_divided(cfg.model, cfg.mesh, sizes, cfg.data.seq_len)
        if cell.rows is None:
            assert cfg.train.batch_size == 1
        else:
            assert cfg.train.batch_size % devices == 0


def test_cells_and_devices_are_chosen_by_name():
    assert scaling_matrix.chosen("") == scaling_matrix.CELLS
    assert [cell.label for cell in scaling_matrix.chosen("fsdp, expert")] == ["fsdp/hybrid_1b3", "expert/hybrid_moe"]
    assert all(len(scaling_matrix.chosen(cell.label)) == 1 for cell in scaling_matrix.CELLS)
    with pytest.raises(ConfigError, match=r"cells = 'ddp': expected beginnings of cells.*groups: fsdp, context"):
        scaling_matrix.chosen("fsdp,ddp")
    assert scaling_bench.counts("", 6) == (1, 2, 4)
    assert scaling_bench.counts("2, 1", 2) == (1, 2)
    for wrong in ("4", "0", "two", ","):
        with pytest.raises(ConfigError, match=r"devices = .*: expected numbers from 1 to 2"):
            scaling_bench.counts(wrong, 2)


def test_the_prediction_adds_links_to_what_the_fewest_devices_took(monkeypatch):
    assert scaling_bench.judged(row(2, 0.5), []).predicted_seconds is None  # of an unknown device
    monkeypatch.setitem(training.PEAK, "a device", 1e12)
    monkeypatch.setitem(scaling_bench.LINKS, "a device", 1e9)
    first = scaling_bench.judged(row(1, 2.0), [])
    assert (first.against, first.efficiency, first.predicted_seconds) == (1, 1.0, 2.0)
    weak = scaling_bench.judged(row(4, 2.5, moved=300_000_000, tokens=4000), [first])
    assert weak.efficiency == pytest.approx(2.0 / 2.5)
    assert weak.predicted_seconds == pytest.approx(2.0 + 0.3)
    strong = scaling_bench.judged(row(4, 1.0, moved=300_000_000), [first])
    assert strong.efficiency == pytest.approx(0.5) and strong.predicted_seconds == pytest.approx(0.5 + 0.3)


def test_a_device_receives_what_its_collectives_bring():
    moved = {"all-reduce": (1, 400), "all-gather": (2, 400), "reduce-scatter": (1, 100), "collective-permute": (3, 7)}
    found = Row("fsdp/x", 4, {}, 1, 1.0, "right", moved=moved)
    assert found.nbytes == 2 * 300 + 300 + 300 + 7
    rows = [row(2, 1.0, 100, 10, "context/gdn/ring/10"), row(2, 1.0, 150, 1000, "context/gdn/ring/1000")]
    assert scaling_bench.moved_by_length(rows) == {"context/gdn/ring on 2": 1.5}


def test_what_differs_is_not_timed_and_what_fails_is_said(monkeypatch, tmp_path):
    def limited(seconds, function, *args):
        if function is not scaling_bench._sample:
            raise AssertionError("memory is predicted at full size alone")
        devices = args[1]
        if devices == 4:
            raise RuntimeError("out of memory")
        return scaling_bench.Sample(0.5 * (devices == 2), [0.1] * (devices == 1), 1.0, 8, {}, "a device")

    monkeypatch.setattr(scaling_bench.workers, "limited", limited)
    settings = Settings(("fsdp/hybrid_1b3",), (1, 2, 4), "tiny", 1, 60, None)
    rows = list(scaling_bench.bench(scaling_matrix.chosen("fsdp"), settings, "cpu"))
    assert [found.verdict for found in rows] == ["one device", "losses differ by 5.0e-01", "failed"]
    assert [found.step is None for found in rows] == [False, True, True]
    assert scaling_bench.line(rows[2]).endswith("failed (out of memory)")
    written = report.Report(tmp_path / "x.json", "a command", {}, settings, scaling_bench.draw)
    written.add(rows)
    written.draw()
    assert [found["devices"] for found in json.loads((tmp_path / "x.json").read_text())["rows"]] == [1, 2, 4]
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert scaling_bench.table(rows).row_count == 3


@pytest.mark.slow
@pytest.mark.parametrize("label", ["fsdp/hybrid_1b3", "context/hybrid/ring_state+ring/131072", "expert/hybrid_moe"])
def test_a_cell_on_two_devices_has_the_losses_of_one(label):
    settings = Settings((label,), (2,), "tiny", 2, 900, None)
    (found,) = scaling_bench.bench(scaling_matrix.chosen(label), settings, "cpu")
    assert found.verdict == "right" and found.tokens_per_second and found.nbytes and found.memory
