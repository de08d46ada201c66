"""Runs of several processes: the same data, the same losses, one set of files."""

import numpy as np
import pytest

from tests.faults import campaign


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, processes):
    monkeypatch.setitem(campaign.CONFIG, "train.steps", 10)
    monkeypatch.setitem(campaign.CONFIG, "train.eval_every", 5)
    runs = campaign.Campaign(tmp_path, seed=0)
    one, several = runs.whole(1), runs.whole(processes)
    assert [r["step"] for r in several] == [r["step"] for r in one]
    assert len(one) == 12
    for name in ("loss", "val_loss"):
        expected = [r[name] for r in one if name in r]
        np.testing.assert_allclose([r[name] for r in several if name in r], expected, rtol=1e-5)
