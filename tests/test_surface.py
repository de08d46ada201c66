"""What notebooks use, and what may be relied on."""

import json

import jax.numpy as jnp
import pytest

import hydrax
from hydrax.core.build import ConfigError


def test_the_surface_is_what_the_design_promises():
    assert set(hydrax.__all__) == {"load_config", "build", "cost", "mixers", "generate", "load_run", "train_run"}
    assert set(hydrax.__all__) <= set(dir(hydrax))
    assert all(callable(getattr(hydrax, name)) for name in hydrax.__all__ if name != "mixers")
    assert "gla" in hydrax.mixers.names()


def test_unknown_attributes_say_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has mixers, load_config"):
        hydrax.trian  # noqa: B018


def test_a_loaded_config_builds_a_model():
    cfg = hydrax.load_config("quickstart", **{"model.d_model": 16, "model.pattern": "gla", "model.mixers": {}})
    lm = hydrax.build(cfg.model)
    assert lm(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 259)


def test_a_run_trains_in_this_process_as_the_command_does(tmp_path, capsys):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("the same again. " * 50 * (i + 1))
    values = {
        "data.path": str(tmp_path / "*.txt"),
        "data.val_fraction": 0.3,
        "model.d_model": 16,
        "model.pattern": "gla",
        "model.mixers": {"gla": {"heads": 2}},
        "data.seq_len": 16,
    }
    steps = {"train.steps": 2, "train.batch_size": 8, "train.eval_rows": 8, "optim.warmup": 0}
    cfg = hydrax.load_config("quickstart", **values, **steps)
    summary = hydrax.train_run(cfg, tmp_path / "run", quiet=True)
    assert capsys.readouterr().out == ""
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text()) and summary["steps"] == 2
    lm, loaded = hydrax.load_run(tmp_path / "run")
    assert loaded.train.steps == 2 and lm(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 259)
    assert hydrax.train_run(loaded, tmp_path / "run") == summary
    assert "already complete" in capsys.readouterr().out
    cfg.train.steps = 0
    with pytest.raises(ConfigError, match=r"train.steps = 0: expected an integer >= 1"):
        hydrax.train_run(cfg, tmp_path / "other")
