"""Runs of several processes, on CPUs, through the command."""

import json

import pytest

from tests.faults import campaign

pytestmark = pytest.mark.thorough


def trained(base, workdir, monkeypatch, **how) -> list[dict]:
    """The records of a short run."""
    short = {"train.steps": 6, "train.save_every": 3, "train.eval_every": 3}
    for key, value in short.items():
        monkeypatch.setitem(campaign.CONFIG, key, value)
    campaign.Trainer(base, workdir, **how).finish()
    return campaign._records(workdir)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(tmp_path, monkeypatch, processes):
    campaign._text(tmp_path / "text")
    one = trained(tmp_path, tmp_path / "one", monkeypatch)
    several = trained(tmp_path, tmp_path / "several", monkeypatch, processes=processes)
    assert [sorted(r) for r in several] == [sorted(r) for r in one]
    for mine, expected in zip(several, one, strict=True):
        for name in {"loss", "val_loss"} & mine.keys():
            assert mine[name] == pytest.approx(expected[name], rel=1e-5)
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("one", "several")]
    assert names[0] == names[1]
    environment = json.loads((tmp_path / "several" / "environment.json").read_text(encoding="utf-8"))
    assert environment["processes"] == processes
