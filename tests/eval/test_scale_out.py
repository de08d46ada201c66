"""Scaling over devices: the matrix, a cell compared with one device, what rows say."""

import dataclasses

import pytest

from hydrax.core.build import ConfigError
from hydrax.eval import scale_out, scale_out_report
from hydrax.eval.scale_out import Settings


def settings(**options) -> Settings:
    given = {"size": "tiny", "parts": ("context",), "devices": (2,), "context_lens": (64, 128), "steps": 2}
    return Settings(**{**given, "seconds": 100, "profile": None, **options})


def first(part: str, **options) -> scale_out.Cell:
    return next(iter(scale_out.cells(settings(parts=(part,), **options), 8)))


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_matrix_is_of_valid_configs(size):
    found = list(scale_out.cells(settings(size=size, parts=scale_out.PARTS, devices=(1, 8), context_lens=()), 8))
    assert {cell.devices for cell in found} == {1, 8}
    assert {cell.part for cell in found} == set(scale_out.PARTS)
    assert len({cell.name for cell in found}) == len(found)
    with pytest.raises(ConfigError, match=r"devices = 16: expected at most the 8 that are present"):
        list(scale_out.cells(settings(devices=(16,)), 8))


def test_a_cell_has_the_losses_of_one_device_and_is_timed():
    cell = first("context")
    row = scale_out.measure(cell, settings())
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
    row = scale_out.measure(first("fsdp"), settings())
    assert row.step is None and row.error == "losses differ from those of one device by 2.0e-03: not timed"


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
