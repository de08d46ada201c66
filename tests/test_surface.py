"""What notebooks use, and what may be relied on."""

import jax.numpy as jnp
import pytest

import hydrax


def test_the_surface_is_what_the_design_promises():
    assert set(hydrax.__all__) == {"load_config", "build", "cost", "mixers", "generate", "load_run"}
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
