"""Runs of several processes, on CPUs, through the command: the same data, the same losses, one set of files."""

import json
import shutil

import numpy as np
import pytest

from tests.faults import campaign

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        for key, value in {"train.steps": 6, "train.save_every": 3, "train.eval_every": 3}.items():
            patched.setitem(campaign.CONFIG, key, value)
        yield campaign.Campaign(tmp_path_factory.mktemp("runs"), seed=0)


def assert_close(actual, expected):
    """The same losses but for the order of sums; another batch would differ in the second digit."""
    assert [r["step"] for r in actual] == [r["step"] for r in expected] == [1, 2, 3, 3, 4, 5, 6, 6]
    for name in ("loss", "val_loss"):
        values, others = ([r[name] for r in side if name in r] for side in (actual, expected))
        np.testing.assert_allclose(values, others, rtol=1e-5)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(runs, processes):
    one, several = runs.whole(1), runs.whole(processes)
    assert_close(several, one)
    folders = [runs.base / f"whole{n}x1" for n in (1, processes)]
    files = [{p.name for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    environment = json.loads((folders[1] / "environment.json").read_text(encoding="utf-8"))
    assert environment["processes"] == processes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 2)),
        pytest.param((1, 2), (2, 1), marks=pytest.mark.slow),
        pytest.param((4, 1), (2, 2), marks=pytest.mark.slow),
        pytest.param((2, 1), (1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1), (2, 1), marks=pytest.mark.slow),
        pytest.param((4, 1), (2, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_continues_with_other_processes(runs, before, after, tmp_path):
    """(processes, devices of each). As many devices in all make the same mesh: bit for bit the same losses."""
    whole, workdir = runs.whole(*before), tmp_path / "run"
    shutil.copytree(runs.base / "whole{}x{}".format(*before), workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "6")
    output = campaign.Trainer(runs.base, workdir, processes=after[0], devices=after[1]).finish()
    assert f"continuing {workdir} after step 3" in output
    continued = campaign.records(workdir)
    assert_close(continued, whole)
    if np.prod(before) == np.prod(after):
        assert continued == whole
