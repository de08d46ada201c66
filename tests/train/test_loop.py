"""The loop in one process: what a run leaves behind, and how it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from hydrax.core.build import ConfigError
from hydrax.train import loop, metrics
from hydrax.train.checkpoint import load_run
from tests.train import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, folder, summary, what `finish` was given) of a complete run on 8 devices."""
    base, given = tmp_path_factory.mktemp("loop"), []
    cfg = tiny.config(tiny.text(base / "text"))
    baselines = {"rows": lambda data, batches: float(sum(b["weights"].any(1).sum() for b in batches))}
    summary = loop.train(cfg, base / "run", baselines=baselines, finish=lambda *args: given.extend(args))
    return cfg, base / "run", summary, given


def test_the_folder_tells_the_whole_story(run):
    cfg, workdir, summary, _ = run
    names = {
        "config.json",
        "layers.json",
        "environment.json",
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
    assert summary["tokens"] == 4 * cfg.train.batch_size * cfg.data.seq_len
    assert 6 < summary["val_bits_per_byte"] < 9
    assert summary["baselines"]["rows"] <= cfg.train.eval_rows
    assert summary["data_sha256"]


def test_the_trained_model_is_handed_on_and_can_be_loaded(run):
    _, workdir, summary, (model, data, cfg, given) = run
    assert given == workdir
    assert data.tokenizer.vocab_size == cfg.model.vocab_size
    loaded, loaded_cfg = load_run(workdir)
    assert loaded_cfg == cfg
    tokens = jnp.arange(16)[None] % 7
    assert float(jnp.abs(loaded(tokens) - model(tokens)).max()) < 1e-5
    assert sum(x.size for x in loop.jax.tree.leaves(loop.lm.nnx.state(loaded))) == summary["parameters"]


def test_a_complete_run_is_not_trained_again(run, capsys):
    cfg, workdir, summary, _ = run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    assert loop.train(cfg, workdir) == summary
    assert "already complete" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_that_died_after_its_last_checkpoint_is_finished(run, tmp_path):
    import shutil

    cfg, workdir, summary, _ = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    again = loop.train(cfg, copy)
    assert again["val_loss"] == summary["val_loss"]
    assert len(metrics.read(copy / "metrics.jsonl")) == len(metrics.read(workdir / "metrics.jsonl"))


def test_other_data_under_the_same_path_is_refused(run, tmp_path):
    import shutil

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
    [("train", {"batch_size": 12}, "train.batch_size"), ("model", {"vocab_size": 100}, "model.vocab_size")],
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
    cfg = run[0]
    optim = dataclasses.replace(cfg.optim, lr=1e30, warmup=0, clip=None)
    train = dataclasses.replace(cfg.train, steps=9, max_skipped=3, eval_every=0, save_every=0)
    with pytest.raises(SystemExit, match="stopped at step [0-9]+: no finite loss or gradient in 3 steps") as error:
        loop.train(dataclasses.replace(cfg, optim=optim, train=train), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 3
