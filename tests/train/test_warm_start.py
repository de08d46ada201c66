"""Starting from the weights of another run: what is reused, what is new, what is dropped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.train.checkpoint import load_run, read_params
from hydrax.train.loop import train
from hydrax.train.warm_start import pieces, warm_start
from tests.tolerances import assert_equal
from tests.train import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of four attention layers, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("source")
    cfg = tiny.config(tiny.text(folder / "text"))
    cfg = dataclasses.replace(cfg, model=build(ModelConfig, {**tiny.MODEL, "pattern": "4*attn"}))
    train(cfg, folder / "run")
    return folder / "run"


def model(source, **changes):
    """The source's model with changes, and fresh parameters."""
    cfg = read_params(source)[1].model
    cfg = dataclasses.replace(cfg, **changes)
    return cfg, jax.jit(lm.blueprint(cfg).init)(jax.random.key(7))


def by_layer(cfg, params):
    return {
        name: np.asarray(params[path] if i is None else params[path][i])
        for path, names in pieces(cfg, params, params).items()
        for name, i in names
    }


def test_the_same_model_takes_everything(source):
    cfg, fresh = model(source)
    started, report = warm_start(str(source), cfg, fresh)
    saved, _, steps = read_params(source)
    assert steps == list(report.steps) == [4] and not report.new and not report.dropped
    for name, value in saved.items():
        assert_equal(name, started[name], value)


def test_other_patterns_are_matched_layer_by_layer(source):
    """Scanned in fours there, alone and in pairs here: attention of layers 0 and 2 stays, gla begins anew."""
    cfg, fresh = model(source, pattern="2*(attn,gla)", mixers={**tiny.MODEL["mixers"], "gla": {"heads": 2}})
    started, report = warm_start(str(source), cfg, fresh)
    theirs, ours = (by_layer(c, p) for c, p in ((read_params(source)[1].model, read_params(source)[0]), (cfg, started)))
    untouched = by_layer(cfg, fresh)
    attention, changed = (tuple(f"layers/{n}/mixer/" for n in layers) for layers in ((0, 2), (1, 3)))
    assert {n for n in report.reused if "/mixer/" in n} == {n for n in theirs if n.startswith(attention)}
    assert set(report.new) == {n for n in ours if n.startswith(changed)}
    assert set(report.dropped) == {n for n in theirs if n.startswith(changed)}
    for name, value in ours.items():
        assert_equal(name, value, theirs[name] if name in report.reused else untouched[name])


def test_another_width_of_one_part_begins_anew(source):
    cfg, fresh = model(source, ffn="swiglu", ffn_dim=8)
    _, report = warm_start(str(source), cfg, fresh)
    assert report.new and all("/ffn" in name or "norm" in name for name in report.new) and not report.dropped
    line = report.line()
    assert f"{len(report.reused)} reused, {len(report.new)} (" in line and "..." in line and "0 dropped" in line


def test_several_steps_are_averaged(source):
    each = [read_params(source, [step])[0] for step in (2, 4)]
    mean, _ = load_run(source, steps=[2, 4])
    cfg, fresh = model(source)
    started, report = warm_start(f"{source}@2,4", cfg, fresh)
    assert report.steps == (2, 4)
    for name in started:
        assert np.any(each[0][name] != each[1][name])
        expected = np.mean([each[0][name], each[1][name]], axis=0, dtype=np.float64).astype(np.float32)
        assert_equal(name, started[name], expected)
    tokens = jnp.ones((1, 4), jnp.int32)
    assert_equal("logits", jax.jit(lm.blueprint(cfg).merge(started))(tokens), jax.jit(mean)(tokens))


def test_a_run_says_what_it_started_from_and_resumes_without_it(source, tmp_path):
    cfg = read_params(source)[1]
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from=f"{source}@2", steps=1))
    summary = train(cfg, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "init_from.json").read_text())
    assert report["source"] == str(source) and report["steps"] == [2] and report["reused"] and not report["new"]
    assert summary["steps"] == 1


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("{}/missing", "expected the folder of a run"),
        ("{}@3", "checkpoint 3: there is none; expected one of 2, 4"),
        ("{}@last", "expected <folder>, <folder>@<step>, or several steps with commas"),
    ],
)
def test_a_wrong_source_is_named(source, text, allowed):
    cfg, fresh = model(source)
    with pytest.raises(ConfigError, match=f"train.init_from = .*: {allowed}"):
        warm_start(text.format(source), cfg, fresh)


def test_a_source_without_anything_in_common_is_refused(source):
    cfg, fresh = model(source, d_model=24)
    with pytest.raises(ConfigError, match=r"train\.init_from = .*: no parameter of that run has a name and shape"):
        warm_start(str(source), cfg, fresh)
