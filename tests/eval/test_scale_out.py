"""Scaling over devices: the matrix, a cell compared with one device, what rows say."""

import dataclasses
import json

import pytest

from hydrax.core.build import ConfigError
from hydrax.eval import report, scale_out, scale_out_report
from hydrax.eval.scale_out import Row
from hydrax.eval.scale_out_matrix import PARTS, Cell, Settings, cells
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times
from launch import bench


def settings(**options) -> Settings:
    given = {"size": "tiny", "parts": ("context",), "devices": (2,), "context_lens": (64, 128), "steps": 2}
    return Settings(**{**given, "cells": "", "seconds": 100, "profile": None, **options})


def first(part: str, **options) -> Cell:
    return cells(settings(parts=(part,), **options), 8)[0]


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_matrix_is_of_valid_configs(size):
    found = cells(settings(size=size, parts=PARTS, devices=(1, 8), context_lens=()), 8)
    assert {cell.devices for cell in found} == {1, 8}
    assert {cell.part for cell in found} == set(PARTS)
    assert len({cell.name for cell in found}) == len(found)
    with pytest.raises(ConfigError, match=r"devices = 16: expected at most the 8 that are present"):
        cells(settings(devices=(16,)), 8)
    assert [cell.model for cell in cells(settings(cells="mamba2, ring.* 64 tok"), 8)] == ["mamba2"]
    with pytest.raises(ConfigError, match=r"cells = 'fdsp': expected a regular expression found in names"):
        cells(settings(cells="fdsp"), 8)


def test_a_cell_has_the_losses_of_one_device_and_is_timed():
    cell = first("context")
    row = scale_out.measure(cell, settings(), {})
    assert row.error is None and len(row.losses) == scale_out.STEPS
    assert row.losses[-1] < row.losses[0]  # the steps that are compared do something
    assert 0 < row.loss_difference < 1e-4
    assert 0 < row.mixers_nbytes < row.nbytes
    assert row.tokens_per_second == 64 / row.step.median and row.predicted_seconds is None  # a CPU


def test_a_cell_with_other_losses_is_not_timed(monkeypatch):
    class Wrong:
        def __init__(self, cfg):
            self.cfg = cfg

        def losses(self, steps):
            return (5.0 + 0.01 * (self.cfg.mesh.fsdp == 2),) * steps

    monkeypatch.setattr(scale_out, "_Steps", Wrong)
    row = scale_out.measure(first("fsdp"), settings(), {})
    assert row.step is None and row.error == "losses differ from those of one device by 2.0e-03: not timed"


class Fake:
    """In place of a process of its own: what it measures, by the names of cells; others fail."""

    def __init__(self, **speeds: float):
        self.speeds, self.asked = speeds, []

    def __call__(self, seconds, function, cell, settings, losses) -> Row:
        self.asked.append((cell.part, cell.devices))
        if f"{cell.part}{cell.devices}" not in self.speeds:
            raise RuntimeError("its process ended with code -9")
        speed = self.speeds[f"{cell.part}{cell.devices}"]
        same = dict.fromkeys(("losses", "losses_alone"), losses.get(repr(scale_out._single(cell.small)), (speed,)))
        facts = {"step": Times(1.0, 1.0, 1.0, 1.0, 2, 1), "tokens_per_second": speed, "loss_difference": 0.0, **same}
        return dataclasses.replace(scale_out._blank(cell), **facts)


def test_a_cell_that_fails_is_a_row_and_a_file_is_continued(monkeypatch, tmp_path):
    path, where = tmp_path / "rows.json", {"packages": {}, "backend": "cpu", "devices": {"cpu": 2}, "git": None}

    def command(given: Settings, fake: Fake) -> list[Row]:
        monkeypatch.setattr(workers, "limited", fake)
        _, rows = scale_out.earlier(path, where, given)
        for row in scale_out.bench(given, cells(given, 2), rows):
            rows = scale_out.joined(rows, row)
            report.Report(path, "command", where, given, scale_out_report.draw, rows)
        return rows

    some = settings(parts=("fsdp",), devices=(2,))
    rows = command(some, Fake())
    assert [row.error for row in rows] == ["its process ended with code -9"]
    every = settings(parts=("fsdp", "tensor"), devices=(1, 2))
    rows = command(every, fake := Fake(fsdp1=100.0, fsdp2=150.0))
    assert fake.asked == [("fsdp", 1), ("tensor", 2), ("fsdp", 2)]  # what failed before comes last
    assert {row.cell[:4]: row.efficiency for row in rows} == {"fsdp": 0.75, "tens": None}
    assert "failed: its process ended" in scale_out_report.line(rows[1])
    rows = command(every, fake := Fake(tensor2=180.0))
    assert fake.asked == [("tensor", 2)]
    assert rows == scale_out.earlier(path, where, every)[1]
    assert [row.efficiency for row in rows] == [1.0, 0.75, 0.9]
    assert [row.losses for row in rows] == [(100.0,), (150.0,), (150.0,)]  # of one device with as many rows: known
    with pytest.raises(ConfigError, match=r"measured otherwise \(settings\.steps: 2 -> 3\): expected a new file"):
        scale_out.earlier(path, where, settings(steps=3))
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"rows\.json'?: expected a new file, or one of this command"):
        scale_out.earlier(path, where, every)


@pytest.mark.slow
def test_the_command_leaves_rows_a_picture_and_traces_and_continues(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    for name in ("JAX_COMPILATION_CACHE_DIR", "NCCL_NVLS_ENABLE"):  # set by the command
        monkeypatch.setenv(name, "")
    given = ["bench", "--scaling", "--size=tiny", "--cells=fsdp", "--steps=1", f"--out={tmp_path / 'rows.json'}"]
    bench.main([*given, f"--profile={tmp_path / 'traces'}"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["devices"], row["error"]) for row in rows] == [(1, None), (2, None)]
    assert rows[1]["efficiency"] == rows[1]["tokens_per_second"] / 2 / rows[0]["tokens_per_second"]
    assert (tmp_path / "rows.png").exists()
    assert len(list((tmp_path / "traces").rglob("*.xplane.pb"))) == 2
    capsys.readouterr()
    monkeypatch.setattr(workers, "limited", None)  # nothing is left to do
    bench.main(given)
    assert "fsdp hybrid" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows


def test_what_is_known_of_losses_is_not_computed_again(monkeypatch):
    """The small model of a longer row is the same."""
    cell = first("context", size="full", context_lens=(131_072,))
    known = {repr(cell.small): (5.0, 4.0), repr(scale_out._single(cell.small)): (5.0, 4.1)}
    monkeypatch.setattr(scale_out, "_Steps", None)
    row = scale_out.measure(cell, settings(size="full"), known)
    assert row.error == "losses differ from those of one device by 2.4e-02: not timed"


def test_what_linear_layers_send_is_compared_over_lengths(tmp_path):
    cell = first("context")
    rows = [
        dataclasses.replace(
            scale_out._blank(cell), seq_len=n, mixers_nbytes=7, tokens_per_second=1.0, predicted_seconds=0.1
        )
        for n in (64, 128)
    ]
    assert "the same at all lengths" in next(scale_out_report.sent(rows))
    other = dataclasses.replace(rows[1], mixers_nbytes=14)
    assert "NOT the same" in next(scale_out_report.sent([rows[0], other]))
    scale_out_report.draw(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
