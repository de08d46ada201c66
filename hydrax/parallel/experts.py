"""Tokens and the experts that serve them, on one device or on a mesh.

On a mesh whose axis `expert` divides the experts, tokens are gathered over it, every device serves those that chose
one of its experts, and what they get is summed and scattered back. Nothing is dropped, and nothing is gathered over
other axes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.parallel.rules import partition

Weights = Mapping[str, Array]
"""By name, [E,...] each."""

FFN = Callable[[Weights, Array, Array | None], Array]
"""(weights, x [B,E,C,D], None) or (weights, x [M,D] with rows of expert 0, 1, ..., sizes [E]) -> outputs like x."""

AXIS = "expert"


def mixture(
    ffn: FFN,
    weights: Weights,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    gates: Float[Array, "B T k"],
    *,
    axes: Mapping[str, Sequence[str]],
    capacity: int | None = None,
) -> Float[Array, "B T D"]:
    """Σ_e gate_e FFN_e(x) over the chosen experts of every token, in fp32, divided over the mesh of `jax.set_mesh`.

    Args:
      ids, gates: the experts that each token chose, and their weights.
      axes: logical axes of the weights.
      capacity: how many of its tokens an expert takes in each row, the first ones; None: all.
    """
    mesh, serve = _mesh(), functools.partial(served, ffn, capacity=capacity)
    if mesh is None:
        return serve(weights, x, ids, gates)
    tokens = partition(("batch", "seq" if capacity is None else "row", "act_embed"), x.shape, mesh)
    # The rows and columns of a matrix that FSDP divides are gathered; inner widths may stay divided.
    kept = {name: [a if a in ("experts", "mlp") else "whole" for a in axes[name]] for name in weights}
    places = {name: partition(kept[name], w.shape, mesh) for name, w in weights.items()}
    inner = {a for place in places.values() for entry in place[1:] for a in _axes(entry)}
    divided = all(AXIS in _axes(place[0]) for place in places.values())
    gathered = divided and AXIS in _axes(tokens[0])

    def on_one(weights: Weights, *rows: Array) -> Array:
        if gathered:
            rows = tuple(jax.lax.all_gather(a, AXIS, tiled=True) for a in rows)
        weights, rows = tree.alike((weights, rows))
        held = next(iter(weights.values())).shape[0]
        y = serve(weights, *rows, first=jax.lax.axis_index(AXIS) * held if divided else 0)
        if gathered:
            y = jax.lax.psum_scatter(y, AXIS, tiled=True)
        sums = inner | ({AXIS} if divided and not gathered else set())
        return jax.lax.psum(y, tuple(sums)) if sums else y

    return jax.shard_map(on_one, in_specs=(places, tokens, tokens, tokens), out_specs=tokens)(weights, x, ids, gates)


def by_tokens(f: Callable[[Array], Array], x: Float[Array, "B T E"]) -> Array:
    """f(x) -> [B,T,...] on each device for its own tokens: XLA would gather all of them for `jax.lax.top_k`."""
    mesh = _mesh()
    if mesh is None:
        return f(x)
    tokens = partition(("batch", "seq", "scores"), x.shape, mesh)
    return jax.shard_map(f, in_specs=tokens, out_specs=tokens)(x)


def _mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has several devices, and no `jax.shard_map` around has taken it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def served(
    ffn: FFN,
    weights: Weights,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    gates: Float[Array, "B T k"],
    *,
    capacity: int | None,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "B T D"]:
    """`mixture` of the experts first, first + 1, ... alone, whose weights are given; others add nothing."""
    (B, T, k), D, E = ids.shape, x.shape[-1], next(iter(weights.values())).shape[0]
    ids = jnp.where((ids >= first) & (ids < first + E), ids - first, E)
    copies = jnp.repeat(x, k, axis=1)  # one per choice
    if capacity is None:
        copies, pairs = copies.reshape(1, -1, D), ids.reshape(1, -1)
        to, source = dispatch(pairs, E, None)
        y = ffn(weights, _moved(copies, source, to)[0], jnp.bincount(pairs[0], length=E))
    else:
        to, source = dispatch(ids.reshape(B, -1), E, capacity)
        y = ffn(weights, _moved(copies, source, to).reshape(B, E, capacity, D), None)
    y = _moved(y.reshape(*source.shape, D), to, source).reshape(B, T, k, D)
    return jnp.sum(gates[..., None] * fp32(y), axis=2)


def dispatch(ids: Int[Array, "R P"], experts: int, capacity: int | None) -> tuple[Array, Array]:
    """Where each of P choices goes in the experts' buffer [R,S], and which choice each slot takes; both may be beyond.

    Without capacity, S = P and the choices are sorted by expert. With it, S = E · capacity, and an expert takes the
    first choices of each row. A choice that finds no slot, or is of no expert (id E), goes to S; an empty slot takes P.
    """
    R, P = ids.shape
    to, S = jnp.argsort(jnp.argsort(ids, axis=1, stable=True), axis=1), P
    found = ids < experts
    if capacity is not None:
        S = experts * capacity
        counts = jax.nn.one_hot(ids, experts + 1, dtype=jnp.int32).sum(1)
        rank = to - jnp.take_along_axis(jnp.cumsum(counts, axis=1) - counts, ids, axis=1)
        found, to = found & (rank < capacity), ids * capacity + rank
    to = jnp.where(found, to, S)
    source = jnp.full((R, S), P).at[jnp.arange(R)[:, None], to].set(jnp.arange(P), mode="drop")
    return to, source


@jax.custom_vjp
def _moved(x: Float[Array, "R P D"], source: Int[Array, "R S"], to: Int[Array, "R P"]) -> Float[Array, "R S D"]:
    """Slot s of each row gets x[source[s]], or 0 beyond the end; `to` is the way back.

    Its derivative reads along that way, so no direction adds up in an order that hardware may choose.
    """
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, source)


_moved.defvjp(
    lambda x, source, to: (_moved(x, source, to), (source, to)),
    lambda ways, dy: (_moved(dy, ways[1], ways[0]), None, None),
)
