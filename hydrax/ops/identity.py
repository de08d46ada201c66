"""What an op that is linear in its values does with them as a T x T matrix: its outputs when they are the identity.

    o = A v  for every v of the same shape,      so  A = o  where v_j is one in column j and zero elsewhere

The op that runs is the one that trains, so there is no second copy of its mathematics: documents, saturated gates and
long rows are as exact as there, and time and memory are those of one head with T value columns.
"""

import jax.numpy as jnp

from hydrax.core.numerics import wide
from hydrax.core.typing import Array

LONGEST = 4096
"""Tokens of a row up to which its matrix is formed: 64 MiB per head."""


def identity_values(tokens: Array, *channels: int) -> Array:
    """Values [B,T,*channels,T] that are one where token and column agree, for `tokens` [B,T,...].

    Raises:
      ValueError: the row is longer than `LONGEST`.
    """
    B, T = tokens.shape[:2]
    if T > LONGEST:
        raise ValueError(f"attention_matrix: T = {T}: expected at most {LONGEST}, for T x T numbers per head")
    columns = jnp.eye(T, dtype=wide(tokens.dtype)).reshape(T, *(1 for _ in channels), T)
    return jnp.broadcast_to(columns, (B, T, *channels, T))


def as_matrix(o: Array) -> Array:
    """Outputs [B,T,*channels,T] for identity values, as matrices [B,*channels,T,T]: row i makes output i."""
    return jnp.moveaxis(o, 1, -2)
