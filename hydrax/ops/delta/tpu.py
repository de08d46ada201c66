"""`delta_rule` on TPUs: chunks of a Pallas kernel, see `ops.pallas.tpu` for what is around them.

In a chunk, with the decays of `ops.linear.tpu`: what token i writes is u_i = β_i (v_i - what the state holds for k_i),

    X = (I + diag(β) tril(Σ_d k_id k_jd e^{D_ijd}, -1))^-1,     u = X diag(β) (v - (k e^{D_i0}) S)
    o = tril(Σ_d q_id k_jd e^{D_ijd}) u + (q e^{D_i0}) S,       S ← e^{D_C0} S + (k e^{D_Cj})ᵀ u
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array
from hydrax.ops.linear.tpu import by_head, decayed, heads
from hydrax.ops.pallas import tpu
from hydrax.ops.pallas.tpu import Documents, Kernel, Tuning, column, halves, index, product

TUNING = Tuning(chunk=64)


def chunked(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array,
    seg: Array | None,
    S: Array,
    *,
    scale: float,
    tuning: Tuning = TUNING,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """A form of the op, in the layout of `ops.layout`, whose outputs are multiplied by `scale`."""
    values, g = by_head(v, g)
    x = (q, k, values, beta.reshape(values.shape[:3]), g)
    o, after = tpu.by_chunks(Kernel(_chunk, scale, v.dtype, interpret), x, seg, heads(S), tuning)
    return o.reshape(v.shape), after.reshape(S.shape)


def _chunk(mm: Callable, x: tuple, documents: Documents, S: Array, saved: tuple) -> tuple[Array, Array, tuple]:
    """Outputs of a chunk, the state after it, and X."""
    q, k, v, beta, g = x
    beta, decay = column(beta), decayed(g, documents)
    X = unit_lower_inverse(beta * decay.scores(mm, k, k), *saved)
    u = mm(X, beta * (v - mm(decay.reads * k, S)))
    o = mm(decay.scores(mm, q, k), u) + mm(decay.reads * q, S)
    return o, decay.keep * S + mm(decay.writes * k, u, "tn"), (X,)


@jax.custom_vjp
def unit_lower_inverse(L: Array, known: Array | None = None) -> Array:
    """X = (I + strict_tril L)^-1 [C,C], or what is known of it.

    The inverse of [[A, 0], [M, B]] is [[A^-1, 0], [-B^-1 M A^-1, B^-1]]: one block of two tokens, of four, ..., and all
    blocks of a size in two products. As in `delta.solve`, no powers of L.
    """
    if known is not None:
        return known
    first, *pairs = halves(L.shape[0])
    i, j = index(L.shape[0])
    X = jnp.where(i == j, 1.0, jnp.where(first, -L, 0))
    for pair in pairs:
        X -= _exact(X, _exact(jnp.where(pair, L, 0), X))
    return X


def _forward(L: Array, known: Array | None) -> tuple[Array, Array]:
    X = unit_lower_inverse(L, known)
    return X, X


def _backward(X: Array, dX: Array) -> tuple[Array, None]:
    """dL = -strict_tril(Xᵀ dX Xᵀ)."""
    i, j = index(X.shape[0])
    return jnp.where(i > j, -_exact(_exact(X, dX, "tn"), X, "nt"), 0), None


unit_lower_inverse.defvjp(_forward, _backward)


def _exact(a: Array, b: Array, sides: str = "nn") -> Array:
    return product(jnp.dtype(jnp.float32), a, b, sides)
