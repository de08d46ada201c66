"""The forms of `ema`. In chunks, what tokens of a chunk do to each other is one product with a Toeplitz matrix per
channel, and a loop carries h from chunk to chunk: the states [T,D,N] never exist.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import documents
from hydrax.ops.layout import UNROLL, chunks_first, scan_tokens
from hydrax.ops.spans import join_chunks

# ------------------------------------------------------------------------------------------------------- the definition


def step(x: Array, real: Array, h: Array, *, q: Array, write: Array, read: Array) -> tuple[Array, Array]:
    """One token: x [B,D], real [B] (0: padding, which leaves h alone), h [B,D,N]; returns y [B,D] and the new h."""
    h = tree.where(real > 0, q * h + write * x[..., None], h)
    return (read * h).sum(-1).real, h


def recurrent(
    x: Array, log_q: Array, write: Array, read: Array, seg: Array | None, valid: Array | None, h: Array
) -> tuple[Array, Array]:
    """The definition: `step` over the tokens, in fp32, restarting where the document changes."""
    real = jnp.ones(x.shape[:2]) if valid is None else valid
    one = functools.partial(step, q=jnp.exp(log_q), write=write, read=read)
    return scan_tokens(one, (x, real), seg, h)


# ------------------------------------------------------------------------------------------------------------ in chunks


def chunked(
    x: Array,
    log_q: Array,
    write: Array,
    read: Array,
    seg: Array | None,
    valid: Array | None,
    h: Array,
    *,
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """Products within chunks of C tokens, h carried between them. C² D numbers hold the matrices."""
    T, C = x.shape[1], min(chunk_size, x.shape[1])
    real = jnp.ones(x.shape[:2], bool) if valid is None else valid
    seg = jnp.zeros(x.shape[:2], jnp.int32) if seg is None else seg
    x, seg, real = fp32(_split(x, C)), _split(seg, C), _split(real, C)
    powers = powers_of(log_q, C + 1)
    _, enters, leaves, keep = documents.chunk_masks(seg, documents.ids_before(seg))

    kernel = (read * write * powers[:C]).sum(-1).real
    y = _within(kernel, x, _runs(seg))

    new = _weighted(
        "jdn,bmjd->bmdn",
        write * powers[C - 1 :: -1] if C > 1 else write * powers[:1],
        tree.where(leaves, x, jnp.zeros_like(x)),
    )
    found = _carry(new, powers[C], keep, h)
    old = _real_part("bmdn,idn->bmid", found, read * powers[1:])
    y = y + tree.where(enters, old, jnp.zeros_like(old))

    # The state after the last real token, which may lie inside a chunk: from what that chunk finds, token by token.
    last = jnp.maximum(real.sum((1, 2)) - 1, 0) // C
    chunk, ids, real, h = (jax.vmap(lambda a, m: a[m])(a, last) for a in (x, seg, real, found))
    h = tree.where(
        ids[:, 0] == jnp.take_along_axis(documents.ids_before(seg), last[:, None], 1)[:, 0], h, jnp.zeros_like(h)
    )
    _, h = recurrent(chunk, log_q, write, read, ids, real, h)
    return join_chunks(y, T), h


def powers_of(log_q: Array, n: int) -> Array:
    """q^0 .. q^{n-1} [n,D,N], by doubling: e^{m log q} would be off by what is rounded off m log q, as much as m is."""
    found = jnp.ones((1, *log_q.shape), log_q.dtype)
    while found.shape[0] < n:
        found = jnp.concatenate([found, found * jnp.exp(found.shape[0] * log_q)])
    return found[:n]


def power_of(log_q: Array, m: Array, most: int) -> Array:
    """q^m [...,D,N] for int32 m [...] up to `most`: the product of the powers of two that m is a sum of."""
    found = jnp.ones((*m.shape, *log_q.shape), log_q.dtype)
    for k in range(most.bit_length()):
        found *= jnp.where(((m >> k) & 1)[..., None, None] == 1, jnp.exp(2**k * log_q), 1)
    return found


def _split(x: Array, C: int) -> Array:
    """[B,T,...] -> [B,M,C,...], the tail filled with zeros, ids with their last value."""
    pad = [(0, 0), (0, -x.shape[1] % C)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, mode="edge" if x.dtype == jnp.int32 else "constant")
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


def _runs(seg: Array) -> Array:
    """The number of the document among those of its chunk, for every token [B,M,C]: 0, 1, ..."""
    starts = seg != jnp.concatenate([seg[..., :1], seg[..., :-1]], axis=-1)
    return jnp.cumsum(starts, axis=-1)


def _carry(new: Array, q: Array, keep: Array, h: Array) -> Array:
    """h ← q h + new from chunk to chunk, h only if its document goes on: what each chunk finds [B,M,D,N]."""

    def chunk(h: Array, inputs: tuple) -> tuple[Array, Array]:
        new, keep = inputs
        return tree.where(keep, q * h, jnp.zeros_like(h)) + new, h

    return jnp.moveaxis(jax.lax.scan(chunk, h, chunks_first((new, keep)), unroll=UNROLL)[1], 0, 1)


def _weighted(spec: str, weights: Array, x: Array) -> Array:
    """An einsum of weights that may be complex, and real numbers."""
    if not jnp.iscomplexobj(weights):
        return einsum(spec, weights, x)
    return jax.lax.complex(einsum(spec, weights.real, x), einsum(spec, weights.imag, x))


def _real_part(spec: str, a: Array, b: Array) -> Array:
    """The real part of an einsum of numbers that may be complex."""
    y = einsum(spec, a.real, b.real)
    return y - einsum(spec, a.imag, b.imag) if jnp.iscomplexobj(a) else y


@jax.custom_vjp
def _within(kernel: Array, x: Array, runs: Array) -> Array:
    """y_i = Σ_{j<=i} kernel_{i-j} x_j over the tokens of one document in a chunk: kernel [C,D], x [B,M,C,D].

    One product per document of a chunk, the others' tokens zero: as many as the chunk with most documents has. Masks
    alone would need a matrix for every chunk and channel.
    """
    L = _toeplitz(kernel)
    return _over_runs(runs, lambda own: own(einsum("ijd,bmjd->bmid", L, own(x))))


def _forward(kernel: Array, x: Array, runs: Array) -> tuple[Array, tuple]:
    return _within(kernel, x, runs), (kernel, x, runs)


def _backward(saved: tuple, dy: Array) -> tuple[Array, Array, None]:
    kernel, x, runs = saved
    L, pullback = jax.vjp(_toeplitz, kernel)

    def gradients(own: Callable[[Array], Array]) -> tuple[Array, Array]:
        dy_own = own(dy)
        return einsum("bmid,bmjd->ijd", dy_own, own(x)), own(einsum("ijd,bmid->bmjd", L, dy_own))

    dL, dx = _over_runs(runs, gradients)
    return *pullback(dL), dx, None


_within.defvjp(_forward, _backward)


def _over_runs(runs: Array, f: Callable[[Callable], PyTree]) -> PyTree:
    """Σ_r f(own), where own(x) keeps the tokens of run r of each chunk."""

    def own(r: Array) -> Callable[[Array], Array]:
        return lambda x: jnp.where((runs == r)[..., None], x, 0)

    first = f(own(jnp.zeros((), runs.dtype)))
    return jax.lax.fori_loop(1, runs.max() + 1, lambda r, total: jax.tree.map(jnp.add, total, f(own(r))), first)


def _toeplitz(kernel: Array) -> Array:
    """kernel_{i-j} for j <= i, else 0: [C,C,D]."""
    C = kernel.shape[0]
    distance = jnp.arange(C)[:, None] - jnp.arange(C)
    return jnp.where((distance >= 0)[..., None], kernel[jnp.maximum(distance, 0)], 0)
