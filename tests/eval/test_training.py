"""The comparison of training steps: variants, turns, and what a row says."""

import json
import math

import pytest

from hydrax.core.build import build
from hydrax.core.config import load_config
from hydrax.eval import training
from hydrax.train.config import RunConfig
from launch import bench_train


def config(**overrides) -> RunConfig:
    small = {"model.pattern": "gla", "model.d_model": 16, "data.seq_len": 16, "train.batch_size": 2}
    return build(RunConfig, load_config("quickstart", **small, **overrides).to_dict())


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(training, "isolated", lambda function, *args: function(*args))


def test_variants_take_turns(here):
    cfgs, turns = {"none": config(), "full": config(**{"train.remat": "full"})}, []
    rows = training.compare(cfgs, 2, 3, lambda variant, found: turns.append((variant, len(found.step_seconds))))
    assert turns == [("none", 3), ("full", 3)] * 2
    assert [row.variant for row in rows] == list(cfgs)
    for row in rows:
        assert row.step.samples == 6
        assert row.tokens_per_second == 32 / row.step.median
        assert row.utilisation is None  # a CPU
        assert math.isfinite(row.loss)
    assert rows[0].loss == pytest.approx(rows[1].loss, rel=1e-5)
    assert rows[0].parameters == rows[1].parameters


def test_utilisation_counts_six_flops_per_parameter_and_token(monkeypatch):
    monkeypatch.setitem(training.PEAK, "a device", 1e6)
    found = training.Sample("a device", 1000, 1.0, [0.5, 0.5], 2.0, 7)
    row = training._row("", config(), [found])
    assert row.tokens_per_second == 64 and row.utilisation == 6 * 1000 * 64 / 1e6 and row.peak_bytes == 7


def test_overrides_of_a_variant():
    found = bench_train._overrides("train.remat=dots, model.pattern=every(1, gdn, attn), config.optim.lr=1")
    assert found == {"train.remat": "dots", "model.pattern": "every(1, gdn, attn)", "optim.lr": "1"}
    assert bench_train._overrides("") == {}


def test_the_command_writes_its_file(here, tmp_path, monkeypatch):
    found = training.Sample("cpu", 10, 1.0, [0.5], 2.0, None)
    monkeypatch.setattr(training, "sample", lambda cfg, steps: found)
    out, variants = tmp_path / "train.json", "train.remat=none; train.remat=full"
    bench_train.main(["bench_train", "--config=quickstart", f"--variants={variants}", f"--out={out}"])
    saved = json.loads(out.read_text())
    assert [row["variant"] for row in saved["rows"]] == ["train.remat=none", "train.remat=full"]
    assert "--variants" in saved["command"] and "out" not in saved["command"]
