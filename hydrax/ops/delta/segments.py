"""Long rows on Hopper in segments that run at once: what the delta rule does to the states between them."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array
from hydrax.ops.pallas import chunks
from hydrax.ops.pallas.tuning import Tuning


def segments(v: Array, tuning: Tuning) -> int:
    """See `chunks.segments`: two do not make up for the passes that give the states between them."""
    n = chunks.segments(v, tuning)
    return n if n > 2 else 1


def before_segments(
    run: Callable, rows: Mapping[str, Array], v: Array, facts: Array, S: Array | None, n: int
) -> tuple[Array | None, Array | None]:
    """The maps of the n segments of every row [B·n,Hv,K,K], and S before each; for one segment, None and `S`.

    Args:
      run: the recurrence of rows that write; without values, from the identity, it gives the maps.
    """
    if n == 1:
        return None, S
    B, K, k = v.shape[0], rows["k"].shape[3], rows["k"]
    identity = jnp.broadcast_to(jnp.eye(K), (B * n, facts.shape[2], K, K))
    maps = run(rows, Z=identity)["Z"].astype(k.dtype)
    return maps, between_segments(maps, run({**rows, "v": v})["Z"], S, n)


def between_segments(maps: Array, updates: Array, Z: Array | None, n: int, *, reverse: bool = False) -> Array:
    """Z before each of the n segments of every row [B·n,Hv,K,V], where Z ← map Z + update; zeros if None."""
    maps, updates = (x.reshape(-1, n, *x.shape[1:]) for x in (maps, updates))
    states = [jnp.zeros_like(updates[:, 0]) if Z is None else Z]
    for i in list(reversed(range(1, n)) if reverse else range(n - 1)):
        states.append(einsum("bhij,bhjv->bhiv", maps[:, i], states[-1].astype(maps.dtype)) + updates[:, i])
    return jnp.stack(states[::-1] if reverse else states, 1).reshape(-1, *updates.shape[2:])
