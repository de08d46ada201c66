"""Which checkpoints stay: the newest, every n-th, the best, also across restarts."""

import math

import jax
import jax.numpy as jnp
import pytest

from hydrax.core.build import ConfigError
from hydrax.train.checkpoint import Checkpoints
from tests.train import tiny

LOSSES = {2: 3.0, 4: 1.0, 6: math.nan, 8: 2.0, 10: 5.0, 12: 4.0, 14: math.nan, 16: 6.0}


def kept(workdir, **policy):
    """The steps left after saves of two processes."""
    for steps in ((2, 4, 6, 8), (10, 12, 14, 16)):
        with Checkpoints(workdir, **policy) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"w": jnp.zeros(2)}, {}, {}, LOSSES[step])
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        pytest.param({"keep": 2}, [14, 16], marks=pytest.mark.slow),
        pytest.param({"keep": 1, "keep_every": 6}, [6, 12, 16], marks=pytest.mark.slow),
        pytest.param({"keep": 1, "keep_best": 2}, [4, 8, 16], marks=pytest.mark.slow),
        ({"keep": 2, "keep_every": 10, "keep_best": 1}, [4, 10, 14, 16]),
    ],
    ids=str,
)
def test_what_stays(tmp_path, policy, steps):
    assert kept(tmp_path, **policy) == steps


def test_a_damaged_validation_loss_is_a_damaged_checkpoint(tmp_path):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=here)}
    kept(tmp_path, keep=2, keep_best=1)
    (loss,) = (p for p in (tmp_path / "checkpoints" / "16" / "metrics").iterdir() if p.name == "metrics")
    loss.write_bytes(loss.read_bytes()[:4])
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        assert checkpoints.restore(abstract).step == 14


@pytest.mark.parametrize(
    ("train", "key"),
    [
        ({"keep_every": 5, "save_every": 2}, "keep_every"),
        ({"keep_every": 4, "save_every": 0}, "keep_every"),
        ({"keep_best": 1, "save_every": 3, "eval_every": 2}, "keep_best"),
        ({"keep_best": 1, "save_every": 2, "eval_every": 0}, "keep_best"),
    ],
    ids=str,
)
def test_policies_that_nothing_would_satisfy(tmp_path, train, key):
    with pytest.raises(ConfigError, match=rf"train.{key} = \d: expected 0"):
        tiny.config(tmp_path, **train)
