"""The train state: a plain dict {params, opt_state, step, skipped, norm_mean} that starts the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hydrax.core.typing import Array, PyTree
from hydrax.models.lm import Blueprint
from hydrax.parallel import rules

State = dict[str, Any]


def init_state(plan: Blueprint, tx: optax.GradientTransformation, key: Array) -> State:
    """The state before the first step; pure, to be jitted."""
    params = plan.init(key)
    counters = {"step": jnp.zeros((), jnp.int32), "skipped": jnp.zeros((), jnp.int32)}
    return {"params": params, "opt_state": tx.init(params), **counters, "norm_mean": jnp.zeros((), jnp.float32)}


def abstract_state(plan: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state. Moments are sharded like the parameter they belong to."""
    params = rules.shardings({name: m.axes for name, m in plan.meta.items()}, plan.shapes, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = next((k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        sharding = replicated if owner is None else params[owner]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda key: init_state(plan, tx, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(place, shapes)


def shardings(abstract: PyTree) -> PyTree:
    """The shardings of an abstract state, for `jax.jit`."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def new_state(plan: Blueprint, tx: optax.GradientTransformation, seed: int, mesh: Mesh) -> State:
    """The initial state, made where it belongs."""
    place = shardings(abstract_state(plan, tx, mesh))
    return jax.jit(lambda key: init_state(plan, tx, key), out_shardings=place)(jax.random.key(seed))
