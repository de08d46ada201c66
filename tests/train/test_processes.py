"""Runs of several processes, on CPUs, through the command: the same data, the same losses, one set of files."""

import json

import numpy as np
import pytest

from tests.faults import campaign

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(tmp_path, monkeypatch, processes):
    for key, value in {"train.steps": 6, "train.save_every": 3, "train.eval_every": 3}.items():
        monkeypatch.setitem(campaign.CONFIG, key, value)
    runs = campaign.Campaign(tmp_path, seed=0)
    one, several = runs.whole(1), runs.whole(processes)
    assert [r["step"] for r in several] == [r["step"] for r in one] == [1, 2, 3, 3, 4, 5, 6, 6]
    for name in ("loss", "val_loss"):
        expected = [r[name] for r in one if name in r]
        np.testing.assert_allclose([r[name] for r in several if name in r], expected, rtol=1e-5)
    files = [{p.name for p in (tmp_path / run).iterdir()} for run in ("whole1", f"whole{processes}")]
    assert files[0] == files[1]
    environment = json.loads((tmp_path / f"whole{processes}" / "environment.json").read_text(encoding="utf-8"))
    assert environment["processes"] == processes
