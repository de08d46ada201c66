"""Runs trained side by side are the runs that the launcher trains alone, in folders that say the same."""

import dataclasses
import json

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.sweep import runs, stacked
from hydrax.train import loop
from hydrax.train.stacked import DISPATCH, Stack, dispatched, vectorised
from tests.sweep.conftest import run

BASE = {
    "config": "tasks:mqar,d_model=16",
    "model.pattern": "gated_conv,attn",
    "model.mixers": {"attn": {"heads": 1}},
    "data.seq_len": 16,
    "data.task_options": {"pairs": (2, 3), "vocabulary": 16},
    "train.steps": 10,
    "train.batch_size": 8,
    "train.eval_every": 5,
    "train.eval_rows": 6,
    "train.save_every": 0,
    "train.log_every": 1,
    "optim.warmup": 2,
}
GRID = [{**BASE, "optim.lr": lr, "train.seed": seed} for lr in (3e-3, 3e-2) for seed in (0, 1)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    place = tmp_path_factory.mktemp("stacked")
    (place / "grid.py").write_text(f"def get_sweep(arg=''):\n    return {GRID!r}\n")
    outcome = run(f"--sweep={place / 'grid.py'}", f"--workdir={place / 'runs'}", "--executor=stacked")
    return place, outcome, runs.expand(str(place / "grid.py"), place / "runs")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_member_is_the_run_of_the_ordinary_launcher(swept, tmp_path):
    _, outcome, members = swept
    assert outcome.code == 0, outcome.err
    member = members[3]  # neither the first rate nor the first seed
    alone = loop.train(member.cfg, tmp_path / "alone")
    mine, others = records(member.folder), records(tmp_path / "alone")
    assert [sorted(r) for r in mine] == [sorted(r) for r in others]
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        ours, theirs = ([r[name] for r in which if name in r] for which in (mine, others))
        assert len(ours) == (2 if name == "val_loss" else 10)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
    summary = json.loads((member.folder / "summary.json").read_text())
    assert set(summary) - set(alone) == {"stacked"}
    assert summary["val_slices"] == pytest.approx(alone["val_slices"])
    same = ("steps", "tokens", "parameters", "data_sha256", "skipped", "val_accuracy")
    assert {name: summary[name] for name in same} == {name: alone[name] for name in same}
    config = (member.folder / "config.json").read_text()
    assert config == (tmp_path / "alone" / "config.json").read_text()


def test_members_differ(swept):
    losses = {tuple(r["loss"] for r in records(m.folder) if "loss" in r) for m in swept[2]}
    assert len(losses) == 4


def test_what_is_finished_is_left_alone(swept):
    place, _, members = swept
    before = {m.name: (m.folder / "summary.json").stat().st_mtime_ns for m in members}
    outcome = run(f"--sweep={place / 'grid.py'}", f"--workdir={place / 'runs'}", "--executor=stacked")
    assert outcome.code == 0
    assert before == {m.name: (m.folder / "summary.json").stat().st_mtime_ns for m in members}


def test_groups_differ_in_rate_and_seed_alone(swept):
    _, _, members = swept
    other = dataclasses.replace(members[0], cfg=dataclasses.replace(members[0].cfg, train=_longer(members[0])))
    assert [len(g) for g in stacked.groups([*members, other], 16)] == [4, 1]
    assert [len(g) for g in stacked.groups(members, 3)] == [2, 2]  # not three and one: one shape to compile


def _longer(member):
    return dataclasses.replace(member.cfg.train, steps=11)


def test_dispatches_end_where_validation_is_due():
    assert dispatched(2000, 500) == DISPATCH
    assert dispatched(60, 15) == 15
    assert dispatched(7, 0) == 7
    assert dispatched(101, 100) == 1


def test_kernels_are_left_out_on_gpus():
    assert vectorised(None, "cpu") is None
    assert "pallas" not in vectorised(None, "gpu") and "delta_rule=chunked" in vectorised(None, "gpu")
    assert "attention=xla" in vectorised("attention=xla", "gpu")
    with pytest.raises(ConfigError, match="pallas_gpu"):
        vectorised("delta_rule=pallas_gpu", "gpu")


def test_what_needs_a_run_of_its_own_is_refused(swept):
    cfg = swept[2][0].cfg
    with pytest.raises(ConfigError, match=r"train\.init_from"):
        Stack([dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from="runs/other"))])
