"""Softmax attention inside sets of tokens: each head has its own, chosen from the row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops.documents import changes
from hydrax.ops.softmax import attention


def token_set_attention(
    qs: Float[Array, "B H n K"],
    ks: Float[Array, "B H n K"],
    vs: Float[Array, "B H n V"],
    I: Int[Array, "B H n"],  # noqa: E741
    J: Int[Array, "B H n"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, "B H n V"]:
    """Attention of the tokens of a set to those of the same set and document that are not after them.

    Args:
      qs, ks, vs: of the tokens of the sets.
      I: their places in the row, -1 for none. Nothing sees what is at no place, and its output is zero.
      J: the places of keys, if they are of other tokens than queries.
      segment_ids: the documents of the row.
      options: scale, softcap, impl and chunk_size of `ops.softmax.attention`.
    """

    def facts(I: Array) -> tuple[Array, Array]:  # noqa: E741
        documents = jnp.ones_like(I) if segment_ids is None else take(segment_ids, I)
        return I.reshape(-1, I.shape[2]), jnp.where(I < 0, 0, documents).reshape(-1, I.shape[2])

    (positions, ids), (kv_positions, kv_ids) = facts(I), facts(I if J is None else J)
    options |= {"positions": positions, "segment_ids": ids, "kv_positions": kv_positions, "kv_segment_ids": kv_ids}
    q, k, v = (x.reshape(-1, x.shape[2], 1, x.shape[3]) for x in (qs, ks, vs))
    return attention(q, k, v, **options).reshape(vs.shape)


def take(x: Array, I: Int[Array, "B H n"]) -> Array:  # noqa: E741
    """x [B,T,...] at the places of every set, [B,H,n,...]; of no place what is at 0."""
    return jax.vmap(lambda x, i: x[i])(x, jnp.maximum(I, 0))


def take_heads(x: Float[Array, "B T H K"], I: Int[Array, "B H n"]) -> Float[Array, "B H n K"]:  # noqa: E741
    """x of head h at the places of set h."""
    return jax.vmap(jax.vmap(lambda x, i: x[i], (1, 0)))(x, jnp.maximum(I, 0))


def put_heads(y: Float[Array, "B H n V"], I: Int[Array, "B H n"], T: int) -> Float[Array, "B T H V"]:  # noqa: E741
    """The sums of what the sets have for each place of a row of T; the inverse of `take_heads` where places differ."""

    def head(y: Array, i: Array) -> Array:
        return jnp.zeros((T, y.shape[-1]), y.dtype).at[jnp.where(i < 0, T, i)].add(y, mode="drop")

    return jax.vmap(jax.vmap(head, out_axes=1))(y, I)


def largest(r: Float[Array, "B T H"], ids: Int[Array, "B T"], most: Callable[[Array], Any]) -> Bool[Array, "B T H"]:
    """Which r are among the most(n) largest of their document of n tokens; ties go to the earlier token."""
    lengths = jnp.sum(ids[:, :, None] == ids[:, None], axis=2)

    def head(r: Array, ids: Array) -> Array:
        order = jnp.lexsort((-r, ids))
        place = jnp.arange(ids.size)
        begins = jax.lax.cummax(jnp.where(changes(ids[order][None])[0], place, 0))
        return jnp.zeros_like(place).at[order].set(place - begins)

    rank = jax.vmap(jax.vmap(head, in_axes=(1, None), out_axes=1))(r, ids)
    return (rank < jnp.asarray(most(lengths))[..., None]) & (ids != 0)[..., None]
