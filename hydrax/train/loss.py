"""Cross-entropy over a large vocabulary, a few tokens at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int, PyTree

MOST_LOGITS = 2**28
"""Beyond which chunks are as short as they get: 1 GiB in fp32."""

LOWEST = -1e30
"""A maximum of logits, finite: -inf - -inf is nan."""


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
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """-log softmax(logits)[target] and the z-loss lse² (arXiv 2204.02311), summed over tokens with their weights.

    Returns the objective, nll + z, and its parts. The gradient of the objective with respect to `hidden` and whatever
    `logits_fn` closes over is formed beside it, chunk by chunk: logits exist once, for `chunk` tokens per row at a
    time; if None, for 256, or up to 1024 while that makes at most `MOST_LOGITS`. A chunk takes every N-th token, not
    neighbours: when tokens are sharded over devices, each chunk then lies on all of them.

    Raises:
      TypeError: something else is differentiated (the parts, or with respect to the weights).
    """
    n = _chunks(hidden, logits_fn, chunk)
    x = _split(hidden, n)
    logits_of, closed_over = jax.closure_convert(logits_fn, x[0])
    # What is added to fill the last chunk has weight 0.
    return _objective(logits_of, z_loss, (x, closed_over), _split(targets, n), _split(fp32(weights), n))


def chunked_argmax(
    hidden: Float[Array, "B T D"], logits_fn: Callable[[Array], Array], *, chunk: int | None = None
) -> Int[Array, "B T"]:
    """The likeliest tokens, from logits that exist a chunk at a time, as above."""
    B, T, _ = hidden.shape
    parts = _split(hidden, _chunks(hidden, logits_fn, chunk))
    said = jax.lax.map(lambda x: jnp.argmax(logits_fn(x), axis=-1), parts)  # [N,B,C]
    return jnp.moveaxis(said, 0, 2).reshape(B, -1)[:, :T]


def _chunks(hidden: Array, logits_fn: Callable[[Array], Array], chunk: int | None) -> int:
    """N, the number of chunks."""
    B, T, _ = hidden.shape
    if chunk is None:
        vocabulary = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]
        chunk = min(max(MOST_LOGITS // (B * vocabulary), 256), 1024)
    return -(-T // chunk)


def _split(x: Array, n: int) -> Array:
    """[B,T,...] -> [N,B,C,...], with zeros to fill the last chunk."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 2, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _objective(logits_of: Callable, z_loss: float, inputs: PyTree, targets: Array, weights: Array) -> tuple:
    x, closed_over = inputs

    def add(sums: Sums, part: tuple) -> tuple[Sums, None]:
        x, targets, weights = part
        new = _sums(fp32(logits_of(x, *closed_over)), targets, weights, z_loss)[0]
        return jax.tree.map(jnp.add, sums, new), None

    sums = jax.lax.scan(add, _nothing(), (x, targets, weights))[0]
    return sums.nll + sums.z, sums


def _forward(logits_of: Callable, z_loss: float, inputs: PyTree, targets: Any, weights: Any) -> tuple:
    if weights.perturbed:
        raise TypeError("chunked_cross_entropy: expected weights that are not differentiated")
    (x, closed_over), targets, weights = custom_vjp_primal_tree_values((inputs, targets, weights))

    def add(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        sums, total = carry
        x, targets, weights = part
        logits, pullback = jax.vjp(logits_of, x, *closed_over)
        new, dlogits = _sums(fp32(logits), targets, weights, z_loss)
        dx, *gradients = pullback(dlogits.astype(logits.dtype))
        return (jax.tree.map(jnp.add, sums, new), [a + fp32(b) for a, b in zip(total, gradients, strict=True)]), dx

    zeros = [fp32(jnp.zeros_like(a)) for a in closed_over]
    (sums, gradients), dx = jax.lax.scan(add, (_nothing(), zeros), (x, targets, weights))
    gradients = [g.astype(a.dtype) for g, a in zip(gradients, closed_over, strict=True)]
    return (sums.nll + sums.z, sums), (dx, gradients)


def _backward(logits_of: Callable, z_loss: float, gradients: PyTree, cotangents: tuple) -> tuple:
    d, parts = cotangents
    if not all(isinstance(x, SymbolicZero) for x in parts):
        raise TypeError("chunked_cross_entropy: expected the objective to be differentiated, not its parts")
    return jax.tree.map(lambda g: (d * g).astype(g.dtype), gradients), None, None


_objective.defvjp(_forward, _backward, symbolic_zeros=True)


def _nothing() -> Sums:
    return Sums(*jnp.zeros(3, jnp.float32))


def _in_passes(logits: Array, others: Array) -> tuple[Array, Array]:
    """log Σ e^logits and Σ others over the last axis."""
    return jax.nn.logsumexp(logits, axis=-1), jnp.sum(others, axis=-1)


def _in_one_pass(logits: Array, others: Array) -> tuple[Array, Array]:
    """The same; a GPU reads the logits once instead of three times (arXiv 1805.02867), a CPU would be slower."""

    def join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (m, s, t), (n, r, u) = a, b
        top = jnp.maximum(jnp.maximum(m, n), LOWEST)
        return top, s * jnp.exp(m - top) + r * jnp.exp(n - top), t + u

    first = tuple(jnp.asarray(x, logits.dtype) for x in (LOWEST, 0, 0))
    top, total, other = jax.lax.reduce((logits, jnp.ones_like(logits), others), first, join, (logits.ndim - 1,))
    return top + jnp.log(total), other


def _sums(logits: Array, targets: Array, weights: Array, z_loss: float) -> tuple[Sums, Array]:
    """Those of a chunk, and the gradient of the objective with respect to its logits [B,C,V]."""
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    # A masked sum fuses with its reduction and needs no communication of logits sharded over the vocabulary.
    parts = logits, jnp.where(is_target, logits, 0)
    lse, target = jax.lax.platform_dependent(*parts, cuda=_in_one_pass, default=_in_passes)
    nll = lse - target
    sums = Sums(jnp.sum(weights * nll), z_loss * jnp.sum(weights * lse**2), jnp.sum(weights))
    probabilities = jnp.exp(logits - lse[..., None])
    at_lse, at_target = weights * (1 + 2 * z_loss * lse), jnp.where(is_target, weights[..., None], 0.0)
    return sums, at_lse[..., None] * probabilities - at_target
