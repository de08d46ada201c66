"""The forms of `attention`, in one layout: q [B,T,G,R,K]; k [B,S,G,K], v [B,S,G,V]; scores [B,G,T,R,S].

Each of the G key/value heads serves R query heads. Every form without kernels is `attend` on blocks of queries: one
query at a time (the definition), all at once, or C at a time with the scores of a block recomputed for its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.ops import documents

MASKED = -1e30
"""Score of an invisible key. Finite, so that a row which sees nothing has no inf - inf."""

PREFIXES = 8
"""Prefixes of the keys of a row that are read, at most; each is compiled by itself."""

FUTURE = 2**30
"""Position of a key that no query sees."""


class Queries(NamedTuple):
    q: Float[Array, "B T G R K"]
    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None
    bias: Float[Array, "#B T #G #R S"] | None = None
    kept: Bool[Array, "#B T #G #R S"] | None = None


class Keys(NamedTuple):
    """Facts of keys may differ between heads, and then have a last dimension G: in caches that evict by head."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    positions: Int[Array, "#B S *#G"]
    segment_ids: Int[Array, "B S *#G"] | None = None
    ends: Int[Array, "#B S #G"] | None = None
    bias: Float[Array, "#B S #G"] | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """How scores become weights.

    Attributes:
      aligned: key i is the key of query i (self-attention without a cache).
      alive: most keys of a document and head that live at once, by their ends.
    """

    scale: float
    softcap: float | None
    window: int | None
    sink_tokens: int
    aligned: bool
    dilation: int = 1
    alive: int | None = None


def visible(queries: Queries, keys: Keys, rules: Rules) -> Bool[Array, "#B #G T S"]:
    """Which keys each query sees."""
    t, s = queries.positions[:, None, :, None], _by_head(keys.positions)
    mask = t >= s
    if rules.window is not None:
        mask &= (t - s < rules.window) | (s < rules.sink_tokens)
    if rules.dilation > 1:
        mask &= (t - s) % rules.dilation == 0
    if keys.ends is not None:
        mask &= t <= _by_head(keys.ends)
    if queries.segment_ids is not None and keys.segment_ids is not None:
        documents = _by_head(keys.segment_ids)
        mask &= (queries.segment_ids[:, None, :, None] == documents) & (documents != 0)
    return mask


def _by_head(x: Array) -> Array:
    """Facts of keys [B,S] or [B,S,G] as [B,1|G,1,S]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)[:, :, None]


def scores(queries: Queries, keys: Keys, rules: Rules) -> Float[Array, "B G T R S"]:
    """z, `MASKED` where the key is invisible."""
    z = einsum("btgrk,bsgk->bgtrs", queries.q, keys.k) * rules.scale
    if queries.bias is not None:
        z = z + fp32(jnp.moveaxis(queries.bias, 1, 2))
    if keys.bias is not None:
        z = z + fp32(_by_head(keys.bias))[:, :, :, None]
    if rules.softcap is not None:
        z = rules.softcap * jnp.tanh(z / rules.softcap)
    if queries.kept is not None:
        z = jnp.where(jnp.moveaxis(queries.kept, 1, 2), z, MASKED)
    return jnp.where(visible(queries, keys, rules)[:, :, :, None], z, MASKED)


def attend(queries: Queries, keys: Keys, sinks: Array | None, rules: Rules) -> tuple[Array, Array]:
    """o [B,T,G,R,V] = Σ_s e^{z_s} v_s / (Σ_s e^{z_s} + e^{sink}) and the logarithm [B,T,G,R] of that denominator."""
    z = scores(queries, keys, rules)
    # Half of MASKED is below every real score and far above MASKED: a row that sees nothing gets e^-huge = 0.
    floor = jnp.asarray(MASKED / 2, z.dtype) if sinks is None else fp32(sinks)[:, None]
    top = jax.lax.stop_gradient(jnp.maximum(z.max(-1), floor))
    p = jnp.exp(z - top[..., None])
    total = p.sum(-1) if sinks is None else p.sum(-1) + jnp.exp(floor - top)
    o = einsum("bgtrs,bsgv->btgrv", p.astype(keys.v.dtype), keys.v)
    top, total = jnp.moveaxis(top, 1, 2), jnp.moveaxis(total, 1, 2)
    some = total > 0
    total = jnp.where(some, total, 1)
    return o / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def weigh(queries: Queries, keys: Keys, lse: Array, rules: Rules) -> tuple[Array, Array]:
    """Σ_s e^{z_s - lse} v_s [B,T,G,R,V] and Σ_s e^{z_s - lse} [B,T,G,R]: what these keys add to an attention over more.

    lse [B,T,G,R] is the logarithm of the denominator over all keys, -inf where there are none. As it is given, the
    derivative is that of attention over all keys with respect to these.
    """
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    p = jnp.exp(scores(queries, keys, rules) - jnp.moveaxis(lse, 2, 1)[..., None])
    return einsum("bgtrs,bsgv->btgrv", p.astype(keys.v.dtype), keys.v), jnp.moveaxis(p.sum(-1), 1, 2)


def recurrent(queries: Queries, keys: Keys, sinks: Array | None, rules: Rules) -> tuple[Array, Array]:
    """The definition: one query at a time, in fp32."""
    queries, keys = queries._replace(q=fp32(queries.q)), keys._replace(k=fp32(keys.k), v=fp32(keys.v))
    return _by_blocks(lambda start, rows: attend(rows, keys, sinks, rules), queries, 1)


def chunked(
    queries: Queries, keys: Keys, sinks: Array | None, rules: Rules, *, chunk_size: int = 128
) -> tuple[Array, Array]:
    """C queries at a time (arXiv 2112.05682): memory O(C·S), and with a window only the C + window - 1 nearest keys.

    If at most `alive` keys live at once, only those that do and the C new ones. Tokens that a dilation keeps apart are
    rows of their own.
    """
    if rules.dilation > 1 and separable(queries, rules):
        return _dilated(functools.partial(chunked, chunk_size=chunk_size), queries, keys, sinks, rules)
    return in_chunks(lambda rows, keys: attend(rows[0], keys, sinks, rules), (queries,), keys, rules, chunk_size)


def chunked_weigh(
    queries: Queries, keys: Keys, lse: Array, rules: Rules, *, chunk_size: int = 128
) -> tuple[Array, Array]:
    """`weigh`, C queries at a time."""
    return in_chunks(lambda rows, keys: weigh(rows[0], keys, rows[1], rules), (queries, lse), keys, rules, chunk_size)


def in_prefixes(f: Callable, rows: tuple, keys: Keys, rules: Rules, chunk_size: int) -> tuple:
    """`in_chunks` where key j of S is invisible to the queries before j / S of all: half the work, for long rows."""
    T, S = rows[0].q.shape[1], keys.positions.shape[1]
    pieces = max(1, min(PREFIXES, T // (2 * chunk_size)))
    size = -(-T // (pieces * chunk_size)) * chunk_size

    def part(tree: PyTree, begin: int, end: int) -> PyTree:
        return jax.tree.map(lambda x: x[:, begin:end], tree)

    ends = [(begin, min(begin + size, T)) for begin in range(0, T, size)]
    found = [in_chunks(f, part(rows, a, b), part(keys, 0, -(-b * S // T)), rules, chunk_size) for a, b in ends]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)


def in_chunks(f: Callable[[tuple, Keys], tuple], rows: tuple, keys: Keys, rules: Rules, chunk_size: int) -> tuple:
    """f(rows, keys) for every block of rows, which begin with `Queries`, and the keys it may see."""
    T, S, w = rows[0].q.shape[1], keys.k.shape[1], rules.window
    C = min(chunk_size, T)
    near = S if w is None or rules.sink_tokens or rows[0].bias is not None or not rules.aligned else C + w - 1
    few = near == S and rules.aligned and rows[0].bias is None and keys.ends is not None
    few = few and rules.alive is not None and rules.alive + C < S
    if near < S:
        keys = _with_margins(keys, near - C, -T % C)
    k_dtype, v_dtype = keys.k.dtype, keys.v.dtype
    keys = keys._replace(k=fp32(keys.k), v=fp32(keys.v))  # the gradients of all blocks add up in fp32

    @jax.checkpoint  # the slice is inside, or the backward pass would keep every block's keys
    def block(start: Array, rows: tuple) -> tuple:
        own = keys
        if near < S:
            own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, near, axis=1), keys)
        elif few:
            own = _living(keys, rows[0], start, rules)
        return f(rows, own._replace(k=own.k.astype(k_dtype), v=own.v.astype(v_dtype)))

    return _by_blocks(block, rows, C)


def cudnn(queries: Queries, keys: Keys, sinks: Array | None, rules: Rules) -> tuple[Array, None]:
    """cuDNN's fused kernels. Always causal: with a left window alone they would see the future.

    Documents become a dense mask [B,1,T,T]. Padding may see padding in it, since a row without any key would have no
    defined gradient; its output is cleared instead.
    """
    q, seg = queries.q, queries.segment_ids
    o = jax.nn.dot_product_attention(
        q.reshape(*q.shape[:2], -1, q.shape[-1]),
        keys.k,
        keys.v,
        mask=None if seg is None else seg[:, None, :, None] == seg[:, None, None, :],
        scale=rules.scale,
        is_causal=True,
        local_window_size=None if rules.window is None else (rules.window - 1, 0),
        implementation="cudnn",
    )
    o = o.reshape(*q.shape[:-1], -1)
    return o if seg is None else jnp.where((seg != 0)[:, :, None, None, None], o, 0), None


def pallas_gpu(queries: Queries, keys: Keys, sinks: Array | None, rules: Rules) -> tuple[Array, Array]:
    """Kernels for Hopper GPUs, on which documents and windows cost what their visible keys cost."""
    from hydrax.ops.softmax import gpu

    if rules.dilation > 1:
        return _dilated(pallas_gpu, queries, keys, sinks, rules)
    q, seg = queries.q, queries.segment_ids
    B, T, G, R, K = q.shape
    index = jnp.arange(T, dtype=jnp.int32)[None]
    first = jnp.zeros((B, T), jnp.int32) if seg is None else index - documents.document_positions(seg)
    end = None if keys.ends is None else jnp.minimum(keys.ends, FUTURE - T) + (index - keys.positions)[..., None]
    if rules.window is not None and rules.sink_tokens:
        near = jnp.where(keys.positions < rules.sink_tokens, FUTURE, index + rules.window - 1)[..., None]
        end = near if end is None else jnp.minimum(end, near)
    elif rules.window is not None:
        first = jnp.maximum(first, index - rules.window + 1)
    bias = None if keys.bias is None else jnp.broadcast_to(keys.bias, (B, T, G))
    q = q.reshape(B, T, G * R, K)
    by_life = keys.ends is not None and rules.window is None  # else only sinks live long
    o, lse = gpu.attend(q, keys.k, keys.v, first, rules.scale, end=end, by_life=by_life, bias=bias)
    o, lse = o.reshape(B, T, G, R, -1), lse.reshape(B, T, G, R)
    if seg is not None:  # padding is a document like others to the kernels
        real = (seg != 0)[:, :, None, None]
        o, lse = jnp.where(real[..., None], o, 0), jnp.where(real, lse, -jnp.inf)
    if sinks is None:
        return o, lse
    total = jnp.logaddexp(lse, fp32(sinks))
    return o * jnp.exp(lse - total)[..., None], total


def _by_blocks(f: Callable[[Array, PyTree], tuple], rows: PyTree, C: int) -> tuple:
    """f(index of the first row, rows) for every block of C rows, one after the other."""
    T = jax.tree.leaves(rows)[0].shape[1]
    N = -(-T // C)

    def split(x: Array) -> Array:
        x = _pad(x, 0, N * C - T)
        return jnp.moveaxis(x.reshape(x.shape[0], N, C, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], N * C, *x.shape[3:])[:, :T]

    blocks = jax.lax.map(lambda x: f(*x), (jnp.arange(N) * C, jax.tree.map(split, rows)))
    return jax.tree.map(join, blocks)


def separable(queries: Queries, rules: Rules) -> bool:
    """Whether the tokens that a dilation keeps apart can be rows of their own."""
    apart = rules.aligned and not rules.sink_tokens and queries.bias is None
    return apart and queries.q.shape[1] % rules.dilation == 0


def _dilated(
    form: Callable[[Queries, Keys, Array | None, Rules], tuple[Array, Array]],
    queries: Queries,
    keys: Keys,
    sinks: Array | None,
    rules: Rules,
) -> tuple[Array, Array]:
    """A form of δ rows for each: the tokens of one remainder mod δ, with positions ⌊p/δ⌋."""
    (B, T), n = queries.q.shape[:2], rules.dilation

    def fold(x: Array) -> Array:
        x = jnp.broadcast_to(x, (B, *x.shape[1:])).reshape(B, T // n, n, *x.shape[2:])
        return jnp.moveaxis(x, 2, 1).reshape(B * n, T // n, *x.shape[3:])

    def unfold(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(B, n, T // n, *x.shape[2:]), 1, 2).reshape(B, T, *x.shape[2:])

    places = queries.positions // n
    ends = None if keys.ends is None else (keys.ends - (queries.positions % n)[..., None]) // n
    queries, keys = queries._replace(positions=places), keys._replace(positions=places, ends=ends)
    window = None if rules.window is None else -(-rules.window // n)
    rules = dataclasses.replace(rules, window=window, dilation=1, alive=None)
    queries, keys = jax.tree.map(fold, (queries, keys))
    return jax.tree.map(unfold, form(queries, keys, sinks, rules))


def _living(keys: Keys, queries: Queries, start: Array, rules: Rules) -> Keys:
    """The keys of the queries from index `start` on, and those before that live when the first of them comes."""
    assert keys.ends is not None and rules.alive is not None
    (B, S, G), C = keys.k.shape[:3], queries.q.shape[1]
    index = jnp.arange(S)[None, :, None]
    old = (index < start) & (keys.ends >= queries.positions[:, :1, None])
    if keys.segment_ids is not None and queries.segment_ids is not None:
        old &= keys.segment_ids[..., None] == queries.segment_ids[:, :1, None]
    wanted = jnp.broadcast_to(old | ((index >= start) & (index < start + C)), (B, S, G))
    n = rules.alive + C
    chosen = jax.vmap(jax.vmap(lambda x: jnp.nonzero(x, size=n, fill_value=S)[0], 1, 1))(wanted)  # [B,n,G]

    def take(x: Array) -> Array:
        x = x[..., None] if x.ndim == 2 else x
        x = jnp.broadcast_to(x, (B, S, G, *x.shape[3:]))
        return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 3)), axis=1, mode="clip")

    keys = jax.tree.map(take, keys)
    return keys._replace(positions=jnp.where(chosen < S, keys.positions, FUTURE))


def _with_margins(keys: Keys, before: int, after: int) -> Keys:
    """The keys between margins that no query sees."""
    index = jnp.arange(before + keys.k.shape[1] + after)
    real = (index >= before) & (index < before + keys.k.shape[1])
    keys = jax.tree.map(lambda x: _pad(x, before, after), keys)
    return keys._replace(positions=jnp.where(real, keys.positions, FUTURE))


def _pad(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
