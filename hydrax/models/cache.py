"""The decode state of a model, and how documents continue across calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Int, PyTree
from hydrax.mixers import Context
from hydrax.ops.documents import document_positions


class Cache(NamedTuple):
    """What prefill returns and step consumes.

    Attributes:
      position: int32 [B], index inside its document of the token to come.
      segment: int32 [B], id of the document in progress; 0 before the first token.
      layers: per group, per layer of its period, the layer's state by part, stacked over passes of a loop and repeats.
      final: the state of a last norm that has one.
    """

    position: Int[Array, "B"]
    segment: Int[Array, "B"]
    layers: list[list[PyTree]]
    final: PyTree = None


def context(cache: Cache, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Context:
    """The context of tokens that follow a cache; without segment ids they continue its document."""
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(jnp.maximum(cache.segment, 1)[:, None], tokens.shape)
    first = segment_ids[:, :1]
    starts = (first[:, 0] != cache.segment) & (first[:, 0] != 0)
    continued = (segment_ids == first) & ~starts[:, None]
    positions = document_positions(segment_ids) + jnp.where(continued, cache.position[:, None], 0)
    return Context(positions=positions.astype(jnp.int32), segment_ids=segment_ids, starts=starts)


def advance(cache: Cache, ctx: Context, layers: list[list[PyTree]], final: PyTree = None) -> Cache:
    """The cache after the last real token of each row, in its own dtypes; rows of padding alone stay where they are."""
    assert ctx.segment_ids is not None
    last = jnp.sum(ctx.segment_ids != 0, axis=1, keepdims=True) - 1

    def at_last(x: Array, old: Array) -> Array:
        return jnp.where(last[:, 0] < 0, old, jnp.take_along_axis(x, jnp.maximum(last, 0), axis=1)[:, 0])

    return Cache(
        position=at_last(ctx.positions + 1, cache.position),
        segment=at_last(ctx.segment_ids, cache.segment),
        layers=jax.tree.map(lambda new, old: new.astype(old.dtype), layers, cache.layers),
        final=final,
    )
