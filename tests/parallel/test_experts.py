"""Mixtures of experts, and the tokens they serve, divided over devices: the same results as on one."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from hydrax.core.build import build
from hydrax.core.typing import Array
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.parallel import rules
from hydrax.parallel.experts import by_tokens, mixture, served
from hydrax.parallel.mesh import AXES, MeshConfig, make_mesh
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import abstract_state, new_state, shardings
from hydrax.train.step import make_train_step
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close
from tests.train import tiny

T, K, D, E, F = 6, 2, 8, 4, 10
WEIGHTS = {"up": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}


def mesh_of(**sizes: int) -> Mesh:
    """A mesh of these sizes over all devices, or over the first one."""
    if sizes:
        return make_mesh(build(MeshConfig, sizes))
    return jax.make_mesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])


def ffn(weights: dict[str, Array], x: Array, sizes: Array | None) -> Array:
    def product(x: Array, W: Array) -> Array:
        if sizes is None:
            return jnp.einsum("becd,edf->becf", x, W, precision="highest")
        return jax.lax.ragged_dot(x, W, sizes, precision=jax.lax.Precision.HIGHEST)

    return product(jnp.tanh(product(x, weights["up"])), weights["down"])


def problem(B: int) -> tuple:
    """Weights, tokens, choices and gates; most tokens like expert 0, and none expert 3."""
    rng = np.random.default_rng(0)
    weights = {"up": rng.normal(size=(E, D, F)), "down": rng.normal(size=(E, F, D))}
    ids = np.stack([rng.choice(3, K, replace=False, p=[0.7, 0.2, 0.1]) for _ in range(B * T)]).reshape(B, T, K)
    x, gates = rng.normal(size=(B, T, D)), rng.uniform(size=(B, T, K))
    floats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (weights, x, gates))
    return floats[0], floats[1], jnp.asarray(ids, jnp.int32), floats[2]


def gradients(f: Callable, weights: dict, x: Array, ids: Array, gates: Array) -> tuple:
    def objective(weights: dict, x: Array, gates: Array) -> tuple[Array, Array]:
        y = f(weights, x, ids, gates)
        return jnp.sin(3 * y).sum(), y

    return jax.grad(objective, (0, 1, 2), has_aux=True)(weights, x, gates)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize(
    ("sizes", "B"),
    [
        ({"expert": 4, "fsdp": 2}, 8),
        ({"expert": 2, "tensor": 2, "context": 2}, 4),
        ({"expert": 4, "fsdp": 2}, 3),  # rows that no axis divides
        ({"expert": 8}, 8),  # more devices than experts
    ],
)
def test_a_mesh_changes_no_result(sizes: dict[str, int], B: int, capacity: int | None) -> None:
    want = jax.jit(functools.partial(gradients, functools.partial(served, ffn, capacity=capacity)))(*problem(B))
    run = functools.partial(gradients, functools.partial(mixture, ffn, axes=WEIGHTS, capacity=capacity))
    with jax.set_mesh(mesh_of(**sizes)):
        assert_trees_close("gradients and y", jax.jit(run)(*problem(B)), want, TOLERANCE["fp32_op"])
    assert np.any(want[1]) and not np.any(want[0][0]["up"][3])


def test_tokens_are_gathered_over_experts_alone() -> None:
    """Of 8 rows the 4 that share a device's experts, and of 4 experts a device's own, whose columns FSDP divides."""
    mesh = mesh_of(expert=4, fsdp=2)
    weights, x, ids, gates = problem(8)
    spec = functools.partial(rules.partition, mesh=mesh)
    place = functools.partial(jax.tree.map, lambda s: jax.sharding.NamedSharding(mesh, s))
    into = {name: spec(axes, weights[name].shape) for name, axes in WEIGHTS.items()}
    rows = rules.batch_sharding(mesh)

    def run(weights: dict, x: Array, ids: Array, gates: Array) -> Array:
        return mixture(ffn, weights, x, by_tokens(lambda s: jax.lax.top_k(s, K)[1], ids + gates), gates, axes=WEIGHTS)

    with jax.set_mesh(mesh):
        program = jax.jit(run, in_shardings=(place(into), rows, rows, rows), out_shardings=rows)
        text = program.lower(weights, x, ids, gates).compile().as_text()
    gathered = set(re.findall(r"(\w+\[[\d,]*\])\S* all-gather\(", text))
    assert gathered == {"f32[4,6,8]", "s32[4,6,2]", "f32[4,6,2]", "f32[1,8,10]", "f32[1,10,8]"}
    assert len(re.findall(r" reduce-scatter\(", text)) == 1 and " all-reduce(" not in text


# ------------------------------------------------------------------------------------------------------ whole training

STEPS, ROWS, TOKENS = 20, 8, 24
MODEL = {
    "d_model": 16,
    "pattern": "attn",
    "ffn": "moe",
    "vocab_size": tiny.VOCABULARY,
    "mixers": {"attn": {"heads": 2, "key_dim": 8}},
}
OPTIM = build(OptimConfig, {"lr": 1e-4, "warmup": 2, "eps": 1e-6})  # see test_mesh.py
MOES = {
    "dropless": {"experts": 8, "width": 8, "bias": True, "shared": 1},
    "capacity": {"experts": 4, "width": 8, "capacity": 1.0, "top_k": 1, "renorm": False},
}


def trained(name: str, mesh: Mesh) -> tuple[dict, np.ndarray]:
    """The initial parameters, and the losses of all steps."""
    plan = lm.blueprint(build(ModelConfig, {**MODEL, "moe": MOES[name]}))
    tx = make_optimizer(OPTIM, STEPS, plan.meta)
    place, rows = shardings(abstract_state(plan, tx, mesh)), rules.batch_sharding(mesh)
    step = make_train_step(plan, tx, make_schedule(OPTIM, STEPS))
    state = new_state(plan, tx, 0, mesh)
    first, losses = jax.device_get(state["params"]), []
    with jax.set_mesh(mesh):
        step = jax.jit(step, in_shardings=(place, rows), out_shardings=(place, None))
        for i in range(STEPS):
            state, metrics = step(state, tiny.batch(ROWS, TOKENS, seed=i % 4))
            losses.append([float(metrics[n]) for n in ("loss", "balance", "router_z")])
    return first, np.asarray(losses)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_training_runs_the_same_on_every_mesh(name: str) -> None:
    """The same initial parameters, bit by bit, and 20 times the same losses."""
    (one, want), (many, losses) = (trained(name, mesh) for mesh in (mesh_of(), mesh_of(expert=4, fsdp=2)))
    assert_trees_close("initial", many, one, 0.0)
    assert want[-4:, 0].mean() < want[:4, 0].mean() * (1 - 20 * TOLERANCE["fp32_op"])  # the same four batches
    for i, (row, expected) in enumerate(zip(losses, want, strict=True)):
        for actual, loss in zip(row, expected, strict=True):
            assert_close(f"losses of step {i}", actual, loss, TOLERANCE["fp32_op"])
