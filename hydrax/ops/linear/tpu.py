"""`linear_attention` on TPUs: chunks of a Pallas kernel, see `ops.pallas.tpu` for what is around them.

In a chunk of C tokens, D_ij = g_{j+1} + ... + g_i is the log-decay from token j to token i (0: before the chunk),

    o = tril(Σ_d q_id k_jd e^{D_ijd}) v + (q e^{D_i0}) S,      S ← e^{D_C0} S + (k e^{D_Cj})ᵀ v,

with 0 for e^D wherever two tokens, or a token and a state, are of different documents.

Log-decays are summed from j to i themselves: a difference of sums from the start of the chunk would lose the digits of
small decays after large ones. So every exponent is a sum of numbers <= 0, and nothing overflows.

For scalar decays, one product with a mask gives all D. For vector decays, tokens are halved again and again: i and j in
the second and the first half of a block meet at the last token m of the first, e^{D_ij} = e^{D_im} e^{D_mj}. So there
is one product for every size of blocks, log2 C in all, and one exponential per channel and token for each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.numerics import clamp_decay
from hydrax.core.typing import Array
from hydrax.ops.pallas import tpu
from hydrax.ops.pallas.tpu import Documents, Kernel, Tuning, column, halves, index

TUNING = Tuning(chunk=128)


class Decay(NamedTuple):
    """What decays and documents make of a chunk."""

    scores: Callable[[Callable, Array, Array], Array]  # (mm, a, b) -> Σ_d a_id b_jd e^{D_ijd} for j <= i
    reads: Array  # [C,D|1], of the incoming state
    writes: Array  # [C,D|1], to the outgoing one
    keep: Array  # [D|1,1], of the state itself


def chunked(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    seg: Array | None,
    S: Array,
    *,
    scale: float,
    tuning: Tuning = TUNING,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """A form of the op, in the layout of `ops.layout`, whose outputs are multiplied by `scale`."""
    kernel = Kernel(_chunk, scale, v.dtype, interpret)
    o, after = tpu.by_chunks(kernel, (q, k, *by_head(v, g)), seg, heads(S), tuning)
    return o.reshape(v.shape), after.reshape(S.shape)


def by_head(v: Array, g: Array) -> tuple[Array, Array]:
    """Values and clamped decays of the heads H·R: decays [B,T,·] if they are scalars, or [B,T,H,K]."""
    B, T = v.shape[:2]
    g = clamp_decay(g)
    return v.reshape(B, T, -1, v.shape[-1]), g.reshape(B, T, -1) if g.shape[-1] == 1 else g[:, :, :, 0]


def heads(S: Array) -> Array:
    """[B,H,R,K,V] -> [B,H·R,K,V]."""
    return S.reshape(S.shape[0], -1, *S.shape[3:])


def _chunk(mm: Callable, x: tuple, documents: Documents, S: Array, saved: tuple) -> tuple[Array, Array, tuple]:
    """Outputs of a chunk, and the state after it."""
    q, k, v, g = x
    decay = decayed(g, documents)
    o = mm(decay.scores(mm, q, k), v) + mm(decay.reads * q, S)
    return o, decay.keep * S + mm(decay.writes * k, v, "tn"), saved


def decayed(g: Array, documents: Documents) -> Decay:
    """`Decay` of scalars [1,C] or vectors [C,K]."""
    scores, start, end, total = (_scalar_decay if g.shape[0] == 1 else _vector_decay)(g)
    i, j = index(documents.same.shape[0])
    return Decay(
        lambda mm, a, b: jnp.where(documents.same & (i >= j), scores(mm, a, b), 0),
        documents.enters * jnp.exp(start),
        documents.leaves * jnp.exp(end),
        documents.keep * jnp.exp(total),
    )


def _scalar_decay(g: Array) -> tuple[Callable, Array, Array, Array]:
    """Scores, D_i0, D_Cj and D_C0."""
    i, j = index(g.shape[1])
    past, later = jnp.where(i >= j, g, 0), jnp.where(i < j, g, 0)
    E = jnp.exp(_sums(past, i > j))
    return (
        lambda mm, a, b: mm(a, b, "nt") * E,
        past.sum(1, keepdims=True),
        later.sum(1, keepdims=True),
        g.sum(1, keepdims=True),
    )


def _vector_decay(g: Array) -> tuple[Callable, Array, Array, Array]:
    """The same for each of K channels."""
    C = g.shape[0]
    i, j = index(C)
    pairs = halves(C)
    factors = []
    for bit in range(len(pairs)):
        middle = (i | (2 << bit) - 1) - (1 << bit)  # the last token of the first half of the block of i
        between = (j > jnp.minimum(i, middle)) & (j <= jnp.maximum(i, middle))
        factors.append(jnp.exp(_sums(between, g)))

    def scores(mm: Callable, a: Array, b: Array) -> Array:
        A = jnp.where(i == j, (a * b).sum(1, keepdims=True), 0)
        return sum((jnp.where(pair, mm(a * f, b * f, "nt"), 0) for pair, f in zip(pairs, factors, strict=True)), A)

    return scores, _sums(i >= j, g), _sums(i < j, g), column(g.sum(0, keepdims=True))


def _sums(a: Array, b: Array) -> Array:
    """a b in full fp32, one of them a mask."""
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
