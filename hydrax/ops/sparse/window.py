"""What a sliding window lets go of, token by token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.typing import Array, Bool, Int


def leaving(
    new: Mapping[str, Array],
    ring: Mapping[str, Array] | None,
    *,
    window: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[dict[str, Array], Bool[Array, "B T"]]:
    """What was said `window` tokens before each token of its document, zeros where there is nothing, and where it is.

    Every token of a document leaves once, when the token `window` places after it comes: it is in the window or has
    left it, and never both.

    Args:
      new: facts [B,T,...] of the new tokens.
      ring: the same facts [B,S,...] of the last tokens of the document of token 0, with `positions` and `segment_ids`
        as `nn.kv_cache` keeps them: position p in slot p mod window, id 0 in empty ones.
    """
    T = positions.shape[1]
    ids = jnp.ones_like(positions) if segment_ids is None else segment_ids

    def before(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (window, 0)] + [(0, 0)] * (x.ndim - 2))[:, :T]

    there = (before(ids) == ids) & (ids != 0)
    old = {name: tree.where(there, before(x), jnp.zeros_like(x)) for name, x in new.items()}
    if ring is None:
        return old, there
    n = min(window, T)  # tokens whose predecessor came in an earlier call
    slots = jnp.minimum(positions[:, :n] % window, ring["positions"].shape[1] - 1)
    took = {name: jax.vmap(lambda held, at: held[at])(x, slots) for name, x in ring.items()}
    known = (took["segment_ids"] != 0) & (took["positions"] == positions[:, :n] - window)
    known &= (ids[:, :n] == ids[:, :1]) & (ids[:, :n] != 0)
    for name, x in old.items():
        old[name] = x.at[:, :n].set(tree.where(known, took[name].astype(x.dtype), x[:, :n]))
    return old, there.at[:, :n].set(there[:, :n] | known)
