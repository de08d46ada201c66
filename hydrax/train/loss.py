"""Cross-entropy over a large vocabulary, a few tokens at a time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int


class Sums(NamedTuple):
    """Unnormalised fp32 sums over counted tokens, so that batches and microbatches add up exactly."""

    nll: Float[Array, ""]  # Σ w (lse - z_target), nats
    z: Float[Array, ""]  # z_loss · Σ w lse²
    tokens: Float[Array, ""]  # Σ w


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    logits_fn: Callable[[Array], Array],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> Sums:
    """-log softmax(logits)[target] and the z-loss lse² (arXiv 2204.02311), summed over tokens with their weights.

    Logits exist for `chunk` tokens per row at a time and are computed again in the backward pass. A chunk takes
    every N-th token, not neighbours: when tokens are sharded over devices, each chunk then lies on all of them.
    """
    n = -(-targets.shape[1] // chunk)

    def split(x: Array) -> Array:
        """[B,T,...] -> [N,B,C,...]; what is added to fill the last chunk has weight 0."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        x, target, weight = part
        logits = fp32(logits_fn(x))
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum fuses with its reduction and needs no communication of logits sharded over the vocabulary.
        is_target = target[..., None] == jnp.arange(logits.shape[-1])
        nll = lse - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        new = Sums(jnp.sum(weight * nll), z_loss * jnp.sum(weight * lse**2), jnp.sum(weight))
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, Sums(zero, zero, zero), (split(hidden), split(targets), split(fp32(weights))))[0]
