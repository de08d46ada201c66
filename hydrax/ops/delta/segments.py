"""Long rows on Hopper in segments that run at once: what the delta rule does to the states between them."""

import jax.numpy as jnp

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array
from hydrax.ops.pallas import chunks
from hydrax.ops.pallas.tuning import Tuning


def segments(v: Array, tuning: Tuning) -> int:
    """See `chunks.segments`: two do not make up for the passes that give the states between them."""
    n = chunks.segments(v, tuning)
    return n if n > 2 else 1


def identity(k: Array, facts: Array, n: int) -> Array:
    """From which the recurrence without values gives the maps of the segments [B·n,Hv,K,K]."""
    K = k.shape[3]
    return jnp.broadcast_to(jnp.eye(K), (k.shape[0] * n, facts.shape[2], K, K))


def between_segments(maps: Array, updates: Array, Z: Array | None, n: int, *, reverse: bool = False) -> Array:
    """Z before each of the n segments of every row [B·n,Hv,K,V], where Z ← map Z + update; zeros if None."""
    maps, updates = (x.reshape(-1, n, *x.shape[1:]) for x in (maps, updates))
    states = [jnp.zeros_like(updates[:, 0]) if Z is None else Z]
    for i in list(reversed(range(1, n)) if reverse else range(n - 1)):
        states.append(einsum("bhij,bhjv->bhiv", maps[:, i], states[-1].astype(maps.dtype)) + updates[:, i])
    return jnp.stack(states[::-1] if reverse else states, 1).reshape(-1, *updates.shape[2:])
