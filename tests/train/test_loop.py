"""The loop in one process: what a run leaves behind, and how it refuses."""

import dataclasses
import json
import shutil

import pytest
from flax import nnx

from hydrax.core import tree
from hydrax.core.build import ConfigError
from hydrax.train import loop, metrics
from hydrax.train.checkpoint import load_run
from hydrax.train.recorder import Recorder
from tests.tolerances import assert_trees_close
from tests.train import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, folder, summary, what `finish` was given) of a complete run on 8 devices."""
    base, given = tmp_path_factory.mktemp("loop"), []
    cfg = tiny.config(tiny.text(base / "text"))
    baselines = {
        "rows": lambda data, batches: float(sum(b["weights"].any(1).sum() for b in batches)),
        "inapplicable": lambda data, batches: None,
    }
    summary = loop.train(cfg, base / "run", baselines=baselines, finish=lambda *args: given.extend(args))
    return cfg, base / "run", summary, given


def test_the_folder_tells_the_whole_story(run):
    cfg, workdir, summary, _ = run
    names = {
        "config.json",
        "lock",
        "layers.json",
        "environment.json",
        "program.json",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "summary.json",
    }
    assert {p.name for p in workdir.iterdir()} == names
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["vocab_size"] == 259  # the tokenizer's: nothing is left open
    assert json.loads((workdir / "summary.json").read_text(encoding="utf-8")) == summary
    assert [(r["step"], "val_loss" in r) for r in metrics.read(workdir / "metrics.jsonl")] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)
    ]  # fmt: skip
    timing = [r["timing"] for r in metrics.read(workdir / "metrics.jsonl") if "loss" in r]
    assert all(0 < t["data_seconds"] + t["device_seconds"] < t["seconds"] for t in timing)
    program = json.loads((workdir / "program.json").read_text(encoding="utf-8"))
    assert program["bytes"]["argument"] > program["bytes"]["alias"] > 0 and program["xla"]["flops"] > 0
    assert summary["tokens"] == 4 * cfg.train.batch_size * cfg.data.seq_len
    assert 6 < summary["val_bits_per_byte"] < 9
    assert summary["baselines"].keys() == {"rows"}
    assert summary["baselines"]["rows"] <= cfg.train.eval_rows
    assert summary["data_sha256"]


def test_the_trained_model_is_handed_on_and_can_be_loaded(run):
    _, workdir, summary, (model, data, cfg, given) = run
    assert given == workdir
    assert data.tokenizer.vocab_size == cfg.model.vocab_size
    loaded, loaded_cfg = load_run(workdir)
    assert loaded_cfg == cfg
    assert_trees_close("parameters", nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)), 0.0)
    assert tree.count(nnx.state(loaded)) == summary["parameters"]


def test_rows_of_one_document_train_as_if_the_model_were_told_so(run, tmp_path, monkeypatch):
    cfg, opened = dataclasses.replace(run[0], data=dataclasses.replace(run[0].data, documents=False)), loop.open_source
    bare = loop.train(cfg, tmp_path / "bare")
    monkeypatch.setattr(loop, "open_source", lambda *args: dataclasses.replace(opened(*args), documents=True))
    told = loop.train(cfg, tmp_path / "told")
    assert bare["tokens"] == run[2]["tokens"] == told["tokens"]
    assert bare["val_loss"] == pytest.approx(told["val_loss"], rel=1e-6)


def test_a_complete_run_is_not_trained_again(run, capsys):
    cfg, workdir, summary, _ = run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    assert loop.train(cfg, workdir) == summary
    assert "already complete" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_that_died_after_its_last_checkpoint_is_finished(run, tmp_path):
    cfg, workdir, summary, _ = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    again = loop.train(cfg, copy)
    assert again["val_loss"] == summary["val_loss"]
    assert len(metrics.read(copy / "metrics.jsonl")) == len(metrics.read(workdir / "metrics.jsonl"))


def test_other_data_under_the_same_path_is_refused(run, tmp_path):
    cfg, workdir, _, _ = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    path = next(p for p in (workdir.parent / "text").iterdir())
    content = path.read_text(encoding="utf-8")
    try:
        path.write_text(content + " more", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"data\.path = .*changed since the run began"):
            loop.train(cfg, copy)
    finally:
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("train", {"batch_size": 12}, "train.batch_size"),
        ("model", {"vocab_size": 100}, "model.vocab_size"),
        (
            "model",
            {"pattern": "short_long_conv", "mixers": {"short_long_conv": {"filter": "implicit"}}},
            "model.pattern",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(run, tmp_path, section, values, key):
    cfg = run[0]
    cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})
    with pytest.raises(ConfigError) as error:
        loop.train(cfg, tmp_path / "run")
    assert error.value.key == key
    assert not (tmp_path / "run").exists()


def test_accumulate_divides_the_batch(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.accumulate = 3: expected a divisor"):
        tiny.config(tmp_path, accumulate=3)


def test_a_run_without_finite_losses_stops_in_one_line(run, tmp_path):
    cfg = dataclasses.replace(run[0], train=dataclasses.replace(run[0].train, max_skipped=3, steps=99))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=259))
    good = {"loss": 1.0, "bits_per_byte": 1.0, "grad_norm": 1.0, "taken": 1.0}
    bad = [good | {"loss": float("nan"), "taken": 0.0}, good | {"grad_norm": float("inf"), "taken": 0.0}]
    steps = [good, *bad, good, *bad, bad[0], good]
    with Recorder(cfg, tmp_path, 0) as recorder:
        for step, values in enumerate(steps[:-1], 1):
            recorder.add(step, values)
        with pytest.raises(SystemExit) as error:
            recorder.add(len(steps), steps[-1])  # handles the one before
    assert str(error.value) == "stopped at step 7: no finite loss or gradient in 3 steps in a row"
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    skipped = metrics.read(tmp_path / "skipped.jsonl")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in skipped][:2] == [(2, None, 1.0), (3, 1.0, None)]
    assert [r["step"] for r in skipped] == [2, 3, 5, 6, 7]
    with Recorder(cfg, tmp_path, 5):
        assert [r["step"] for r in metrics.read(tmp_path / "skipped.jsonl")] == [2, 3, 5]
