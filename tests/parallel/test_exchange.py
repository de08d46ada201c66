"""Tokens exchanged for heads: whatever works on each head by itself gives what it gives on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hydrax.core.typing import Array
from hydrax.ops.conv import short_conv
from hydrax.ops.delta import delta_rule
from hydrax.ops.softmax import attention
from hydrax.parallel.exchange import KINDS, exchange
from tests.parallel.devices import ROWS, count, mesh_of
from tests.tolerances import TOLERANCE, assert_close

B, T, H, K = 2, 32, 8, 4
SPECS = {"heads": ROWS, "rows": ROWS, "state": PartitionSpec(), "weights": PartitionSpec()}
IDS = np.ones((B, T), np.int32)
IDS[0, 4:], IDS[0, 5:], IDS[0, 18:], IDS[1, 29:] = 2, 3, 7, 0


def normal(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def softmax(q: Array, k: Array, v: Array, sinks: Array, ids: Array) -> tuple[Array]:
    return (attention(q, k, v, sinks=sinks, segment_ids=ids, window=9),)


def delta(x: dict[str, Array], decay: Array, state: Array, ids: Array) -> tuple[Array, Array]:
    return delta_rule(
        x["q"], unit(x["k"]), x["v"], x["beta"], decay, initial_state=state, segment_ids=ids, impl="recurrent"
    )


def nonlinear(x: Array, weight: Array, none: None) -> tuple[Array, Array]:
    """h_t = tanh(W h_{t-1} + x_t), which no summary of a shard could stand for."""

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(jnp.einsum("bhk,hkl->bhl", h, weight) + x)
        return h, h

    last, o = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(o, 0, 1), last


def channels(x: Array, w: Array, ids: Array) -> tuple[Array, Array]:
    """Heads of one number each; what comes back by rows is of no head."""
    return short_conv(x, w.T, segment_ids=ids)[0], ids.astype(jnp.float32)


QKV = {
    "q": normal(B, T, H, K),
    "k": normal(B, T, H, K),
    "v": normal(B, T, 2 * H, K),
    "beta": jnp.full((B, T, 2 * H), 0.7),
}
CASES: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...], tuple[Any, ...]]] = {
    "softmax": (
        softmax,
        ("heads", "heads", "heads", "weights", "rows"),
        ("heads",),
        (normal(B, T, 2 * H, K), normal(B, T, H, K), normal(B, T, H, 3), normal(2 * H), jnp.asarray(IDS)),
    ),
    "delta": (
        delta,
        ("heads", "weights", "state", "rows"),
        ("heads", "state"),
        (QKV, -jnp.abs(normal(2 * H)), normal(B, 2 * H, K, K), jnp.asarray(IDS)),
    ),
    "nonlinear": (
        nonlinear,
        ("heads", "weights", "rows"),
        ("heads", "state"),
        (normal(B, T, H, K), normal(H, K, K), None),
    ),
    "channels": (
        channels,
        ("heads", "weights", "rows"),
        ("heads", "rows"),
        (normal(B, T, 16), normal(16, 4), jnp.asarray(IDS)),
    ),
}


def evaluate(f: Callable, args: tuple, cotangents: tuple) -> tuple:
    """Outputs and the gradients of all inputs of floats."""
    floats, rest = (
        jax.tree.map(lambda x, want=want: x if (x.dtype == jnp.float32) is want else None, args)
        for want in (True, False)
    )

    def of_floats(floats: tuple) -> tuple:
        return f(*jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None))

    outputs, pullback = jax.vjp(of_floats, floats)
    return outputs, pullback(cotangents)[0]


def divided(name: str, shards: int) -> Callable:
    f, inputs, outputs, _ = CASES[name]
    f = exchange(f, axis="context", inputs=inputs, outputs=outputs)
    into, out = (tuple(SPECS[kind] for kind in kinds) for kinds in (inputs, outputs))
    return jax.jit(
        jax.shard_map(functools.partial(evaluate, f), mesh=mesh_of(shards), in_specs=(into, out), out_specs=(out, into))
    )


def check(name: str, shards: int) -> None:
    f, _, _, args = CASES[name]
    cotangents = jax.tree.map(lambda x: normal(*x.shape), jax.eval_shape(f, *args))
    want = jax.jit(functools.partial(evaluate, f))(args, cotangents)
    actual = divided(name, shards)(args, cotangents)
    leaves = jax.tree_util.tree_flatten_with_path(want)[0]
    assert len(leaves) > 3
    for (path, x), y in zip(leaves, jax.tree.leaves(actual), strict=True):
        assert_close(f"{name}{jax.tree_util.keystr(path)}", y, x, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(("name", "shards"), [("softmax", 8), ("delta", 4), ("nonlinear", 2), ("channels", 8)])
def test_equals_one_device(name: str, shards: int) -> None:
    check(name, shards)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_equals_one_device_everywhere(name: str, shards: int) -> None:
    check(name, shards)


def test_every_kind_is_tested() -> None:
    assert (
        {kind for _, inputs, outputs, _ in CASES.values() for kind in (*inputs, *outputs)} == set(KINDS) == set(SPECS)
    )


def test_what_is_sent() -> None:
    """One exchange for each of q, k, v and o, and the ids gathered."""
    f, inputs, outputs, args = CASES["softmax"]
    f = exchange(f, axis="context", inputs=inputs, outputs=outputs)
    into = tuple(SPECS[kind] for kind in inputs)
    run = jax.shard_map(f, mesh=mesh_of(4), in_specs=into, out_specs=(ROWS,))
    program = jax.jit(run).lower(*args).compile().as_text()
    assert (count("all-to-all", program), count("all-gather", program)) == (4, 1)


def test_heads_that_the_axis_does_not_divide() -> None:
    x = jnp.zeros((B, T, 6, K))
    f = exchange(lambda x: (x,), axis="context", inputs=("heads",), outputs=("heads",))
    run = jax.shard_map(f, mesh=mesh_of(4), in_specs=ROWS, out_specs=ROWS)
    with pytest.raises(ValueError, match=r"6 heads: expected a multiple of the 4 devices along 'context'"):
        jax.eval_shape(run, x)
