"""Parameters that are means over tokens: a step moves them alike however its rows are cut and spread."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from hydrax.core.build import build
from hydrax.parallel.mesh import AXES
from hydrax.parallel.rules import batch_sharding
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import abstract_state, new_state, shardings
from hydrax.train.step import make_train_step
from tests.tolerances import TOLERANCE, assert_close
from tests.train import tiny

LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mosa": ("theta", {"heads": 2, "key_dim": 8, "sparsity": 3, "rate": 0.5}),
    "routing": ("centroids", {"heads": 2, "key_dim": 8, "clusters": 3, "window": 3, "rate": 0.5, "commitment": 0.0}),
}
"""The statistic of every mixer that has one, and options with which a step moves it far."""


@functools.cache
def moved(name: str, devices: int, accumulate: int) -> tuple[np.ndarray, np.ndarray]:
    """The statistic of two layers at first and after two steps over rows of unequal lengths."""
    statistic, options = LEARNERS[name]
    plan, cfg = tiny.plan(pattern=f"2*{name}", mixers={name: options}), build(OptimConfig, {"warmup": 0})
    tx, shape = make_optimizer(cfg, 10, plan.meta), [devices if axis == "replica" else 1 for axis in AXES]
    mesh = jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:devices])
    state = new_state(plan, tx, 0, mesh)
    step = make_train_step(plan, tx, make_schedule(cfg, 10), accumulate=accumulate)
    place = shardings(abstract_state(plan, tx, mesh))
    step = jax.jit(step, in_shardings=(place, batch_sharding(mesh)), out_shardings=(place, None))
    path = next(n for n in plan.shapes if n.endswith(statistic))
    before = np.asarray(state["params"][path])
    with jax.set_mesh(mesh):
        for seed in range(2):
            state, _ = step(state, tiny.batch(8, 12, seed=seed))
    return before, np.asarray(state["params"][path])


@pytest.mark.parametrize(
    ("name", "devices", "accumulate"),
    [
        pytest.param(name, *how, marks=[pytest.mark.slow] * ((name, how) != ("routing", (2, 2))))
        for name in LEARNERS
        for how in [(2, 1), (1, 4), (2, 2)]
    ],
)
def test_statistics_do_not_depend_on_devices_and_microbatches(name: str, devices: int, accumulate: int) -> None:
    (before, after), (_, want) = moved(name, devices, accumulate), moved(name, 1, 1)
    assert np.all(np.max(np.abs(want - before), axis=tuple(range(1, want.ndim))) > 1e-3)  # in both layers
    assert_close("statistic", after, want, TOLERANCE["fp32_op"])
