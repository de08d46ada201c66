"""Softmax attention over rows whose tokens are divided over a mesh axis, inside a `jax.shard_map` over it.

Each shard has L of the T = P·L tokens of a row, by one of the `layout`s, and all of its heads. Three ways to the keys
of the others: `allgather_kv` fetches all of them (LASP-2H, arXiv 2502.07563), `ring_attention` passes them around
while partial results merge (arXiv 2310.01889), `tree_attention` merges what shards of a cache give to one token
(arXiv 2408.04093). All compute `ops.softmax.attention` of the undivided row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.ops.softmax import attention, forms, merge
from hydrax.parallel import layout as layouts


def whole(x: Array, axis: str, layout: str) -> Array:
    """The tokens [B,T,...] of all shards in the order of the row, of which this one has [B,L,...]."""
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    return layouts.restore(x, layout, jax.lax.axis_size(axis))


def allgather_kv(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L Hk K"],
    v: Float[Array, "B L Hk V"],
    *,
    axis: str,
    layout: str = "contiguous",
    segment_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    ends: Int[Array, "B L Hk"] | None = None,
    key_bias: Float[Array, "B L Hk"] | None = None,
    **options: Any,
) -> Any:
    """`attention` of this shard's queries over the keys of all shards; the gradients of these are reduce-scattered.

    Args:
      q, k, v, segment_ids, ends, key_bias: this shard's. Ids are unique in the whole row.
      axis: mesh axis over which tokens are divided.
      positions: index of each token in its document, or anything that grows by as much; that in the row if None, which
        suffices without `sink_tokens` and `ends`.
      options: others of `attention`, but for a bias of pairs.

    Raises:
      ValueError: `sink_tokens` or `ends`, and documents without positions, or what `attention` refuses.
    """
    _check({**options, "ends": ends is not None}, segment_ids, positions)
    L, P = q.shape[1], jax.lax.axis_size(axis)

    def gathered(x: Array) -> Array:
        return jax.lax.all_gather(x, axis, axis=1, tiled=True)

    if positions is None:
        own = layouts.positions(layout, axis, L)
        every = jnp.asarray(layouts.order(layout, P, P * L))
        positions, kv_positions = (jnp.broadcast_to(x, (q.shape[0], x.size)) for x in (own, every))
    else:
        kv_positions = gathered(positions)
    facts = (positions, kv_positions, segment_ids, ends, key_bias)
    q, k, v, (positions, kv_positions, segment_ids, ends, key_bias) = tree.alike((q, k, v, facts))
    ends, key_bias = jax.tree.map(gathered, (ends, key_bias))
    return attention(
        q,
        gathered(k),
        gathered(v),
        segment_ids=segment_ids,
        positions=positions,
        kv_segment_ids=None if segment_ids is None else gathered(segment_ids),
        kv_positions=kv_positions,
        ends=ends,
        key_bias=key_bias,
        **options,
    )


def ring_attention(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L Hk K"],
    v: Float[Array, "B L Hk V"],
    *,
    axis: str,
    layout: str = "contiguous",
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    sink_tokens: int = 0,
    dilation: int = 1,
    softcap: float | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    ends: Int[Array, "B L Hk"] | None = None,
    alive: int | None = None,
    key_bias: Float[Array, "B L Hk"] | None = None,
    return_lse: bool = False,
    chunk_size: int = 128,
) -> Any:
    """`attention` of this shard's queries; keys and values visit each shard in turn, and those of two are held at once.

    Slots of the layout that see nothing of a visiting slot cost nothing. With a window (and no `sink_tokens`) only
    scores near the diagonal are formed, and in the contiguous layout keys go only as far as it reaches. The backward
    pass is a second ring, in which the gradients of keys travel with them; what lives in between is q, k, v, the output
    and its log-sum-exp. Arguments and errors are those of `allgather_kv`; `alive` saves nothing here.
    """
    sink_tokens = 0 if window is None else sink_tokens
    _check({"sink_tokens": sink_tokens, "ends": ends is not None}, segment_ids, positions)
    (B, L, H, K), G = q.shape, k.shape[2]
    if positions is None:
        positions = jnp.broadcast_to(layouts.positions(layout, axis, L), (B, L))
    rules = forms.Rules(K**-0.5 if scale is None else scale, softcap, window, sink_tokens, False, dilation)
    q, k, v, positions, segment_ids, of_keys = tree.alike((q, k, v, positions, segment_ids, (key_bias, ends)))
    grouped = q.reshape(B, L, G, H // G, K)
    o, lse = _ring(_Ring(axis, layout, rules, chunk_size), grouped, k, v, *of_keys, positions, segment_ids)
    if sinks is not None:
        o, lse = merge((o, lse), (jnp.zeros_like(o), jnp.broadcast_to(fp32(sinks), lse.shape)))
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Who holds what, and how scores become weights."""

    axis: str
    layout: str
    rules: forms.Rules
    chunk_size: int

    @property
    def shards(self) -> int:
        return jax.lax.axis_size(self.axis)

    def numbers(self, hops: int | Array = 0) -> Int[Array, "N"]:
        """Of the slots that are here after so many hops."""
        rank = (jax.lax.axis_index(self.axis) - hops) % self.shards
        return jnp.stack(layouts.slots(self.layout, rank, self.shards))

    def cut(self, x: PyTree) -> PyTree:
        """Arrays [B,L,...] by slots, [N,B,L/N,...]."""
        N = len(layouts.slots(self.layout, 0, self.shards))
        return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0], N, -1, *a.shape[2:]), 1, 0), x)

    def join(self, x: PyTree) -> PyTree:
        """The inverse of `cut`."""
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), x)

    def hops(self, L: int) -> int:
        """How often keys move on."""
        reach = self.rules.window
        if reach is None or self.rules.sink_tokens or self.layout != "contiguous":
            return self.shards - 1
        return min(self.shards - 1, -(-(reach - 1) // L))

    def passed(self, x: PyTree, by: int = 1) -> PyTree:
        """The arrays that were `by` shards before this one."""
        return jax.lax.ppermute(x, self.axis, [(i, (i + by) % self.shards) for i in range(self.shards)])

    def cases(self, pair: Callable) -> tuple[Callable, ...]:
        """What becomes of (rows, home, keys, carried): rows that see none of the keys, later ones, the keys' own."""
        window, meet = self.rules.window, functools.partial(pair, self.rules)
        if window is None or self.rules.sink_tokens:
            return _unseen, meet
        reach = max(window - 1, 1)

        def later(rows: PyTree, home: PyTree, keys: PyTree, carried: PyTree) -> tuple[PyTree, PyTree]:
            """The first rows see the last keys."""
            n = min(reach, keys.positions.shape[1])
            first, last = (functools.partial(jax.tree.map, f) for f in (lambda a: a[:, :n], lambda a: a[:, -n:]))
            new = meet(first(rows), first(home), last(keys), last(carried))
            home = jax.tree.map(lambda a, b: a.at[:, :n].set(b), home, new[0])
            return home, jax.tree.map(lambda a, b: a.at[:, -n:].set(b), carried, new[1])

        return _unseen, later, functools.partial(pair, dataclasses.replace(self.rules, aligned=True))

    def tour(self, pair: Callable, rows: PyTree, home: PyTree, keys: forms.Keys, carried: PyTree) -> tuple:
        """What stays at `home` and what was `carried` along with the keys, after these visited all who see them.

        `pair` (rules, rows, home, keys, carried) -> (home, carried) of one slot of rows and one of keys.
        """
        mine, cases = self.numbers(), self.cases(pair)
        rows, home, keys, carried = self.cut((rows, home, keys, carried))
        hops = self.hops(keys.k.shape[0] * keys.k.shape[2])

        def visit(hops: int | Array, home: PyTree, keys: forms.Keys, carried: PyTree) -> tuple:
            def one_of_keys(home: PyTree, x: tuple) -> tuple:
                number, keys, carried = x

                def one_of_rows(carried: PyTree, x: tuple) -> tuple:
                    own, rows, home = x
                    case = sees(own, rows[0], number, keys, self.rules).astype(jnp.int32) + (own == number)
                    home, carried = jax.lax.switch(case, cases, rows, home, keys, carried)
                    return carried, home

                carried, home = jax.lax.scan(one_of_rows, carried, (mine, rows, home))
                return home, carried

            return jax.lax.scan(one_of_keys, home, (self.numbers(hops), keys, carried))

        def hop(state: tuple, i: Array) -> tuple:
            home, keys, carried = state
            ahead = self.passed(keys)  # on their way while this shard computes
            home, carried = visit(i, home, keys, carried)
            return (home, ahead, self.passed(carried)), None

        (home, keys, carried), _ = jax.lax.scan(hop, (home, keys, carried), jnp.arange(hops))
        home, carried = visit(hops, home, keys, carried)
        return self.join(home), self.join(self.passed(carried, -hops))


def _unseen(rows: PyTree, home: PyTree, keys: forms.Keys, carried: PyTree) -> tuple[PyTree, PyTree]:
    return home, carried


def sees(own: Array, rows: forms.Queries, number: Array, keys: forms.Keys, rules: forms.Rules) -> Bool[Array, ""]:
    """Whether any query of the slot `own` can see a key of the slot `number`: by the order of slots and their edges.

    Documents are contiguous: two slots share at most the one that ends the earlier and begins the later.
    """
    near = jnp.ones(keys.positions.shape[0], bool)
    if rules.window is not None:
        near = rows.positions[:, 0] - keys.positions[:, -1] < rules.window
        first = keys.positions < rules.sink_tokens
        if keys.segment_ids is not None:
            first &= keys.segment_ids == keys.segment_ids[:, -1:]
        near |= first.any(1)
    if rows.segment_ids is not None and keys.segment_ids is not None:
        near &= (rows.segment_ids[:, 0] == keys.segment_ids[:, -1]) & (rows.segment_ids[:, 0] != 0)
    return (own == number) | ((number < own) & near.any())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _Ring, q: Array, k: Array, v: Array, *facts: Array | None) -> tuple[Array, Array]:
    """o [B,L,H,V] in the dtype of v and lse fp32 [B,L,H] of q [B,L,G,R,K].

    `facts` are a bias of keys and their ends [B,L,G], positions and documents [B,L].
    """
    return _forward(how, q, k, v, *facts)[0]


def _forward(how: _Ring, q: Array, k: Array, v: Array, *facts: Array | None) -> tuple[tuple, tuple]:
    bias, ends, positions, seg = facts
    assert positions is not None
    B, L, G, R, _ = q.shape
    queries, keys = forms.Queries(q, positions, seg), forms.Keys(k, v, positions, seg, ends, bias)

    def pair(rules: forms.Rules, rows: tuple, home: tuple, keys: forms.Keys, carried: tuple) -> tuple:
        (queries,) = rows
        o, lse = forms.chunked(queries, keys, None, rules, chunk_size=how.chunk_size)
        return merge(home, (o.reshape(home[0].shape), lse.reshape(home[1].shape))), carried

    empty = jnp.zeros_like(q, wide(q.dtype), (B, L, G * R))
    home = (jnp.zeros_like(q, wide(q.dtype), (B, L, G * R, v.shape[-1])), empty - jnp.inf)
    (o, lse), _ = how.tour(pair, (queries,), home, keys, ())
    o = o.astype(v.dtype)
    return (o, lse), (queries, keys, o, lse)


def _backward(how: _Ring, kept: tuple, cotangents: tuple) -> tuple:
    """p = e^{z - lse} of each pair again, and from it dz = p ⊙ (do·v - do·o + dlse)."""
    queries, keys, o, lse = kept
    do, dlse = (fp32(x) for x in cotangents)
    grouped = queries.q.shape[:4]
    pull = (do.reshape(*grouped, -1), (dlse - jnp.sum(do * fp32(o), -1)).reshape(grouped))

    def pair(rules: forms.Rules, rows: tuple, dq: Array, keys: forms.Keys, carried: tuple) -> tuple:
        queries, lse, *pull = rows

        def weighed(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
            mine, theirs = queries._replace(q=q), keys._replace(k=k, v=v, bias=bias)
            return forms.chunked_weigh(mine, theirs, lse, rules, chunk_size=how.chunk_size)

        new = jax.vjp(weighed, queries.q, keys.k, keys.v, keys.bias)[1](tuple(pull))
        dq, *carried = jax.tree.map(lambda total, d: total + fp32(d), (dq, *carried), new)
        return dq, tuple(carried)

    inputs = (queries.q, keys.k, keys.v, keys.bias)
    dq, *dkeys = jax.tree.map(lambda x: jnp.zeros_like(x, wide(x.dtype)), inputs)
    dq, dkeys = how.tour(pair, (queries, lse.reshape(grouped), *pull), dq, keys, tuple(dkeys))
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), (dq, *dkeys), inputs), None, None, None


_ring.defvjp(_forward, _backward)


def tree_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    *,
    axis: str,
    sinks: Float[Array, "H"] | None = None,
    **options: Any,
) -> Float[Array, "B T H V"]:
    """`attention` of the same queries on all shards over keys that are divided over them, as in a cache while decoding.

    What shards say to one another is (V + 2)·B·T·H numbers, however many keys there are; a shard may have no visible
    one.

    Args:
      q: the queries, and `positions` and `segment_ids` in the options: the same on all shards.
      k, v: this shard's keys and values, and `kv_positions` and `kv_segment_ids` in the options.
      options: others of `attention`.
    """
    o, lse = attention(q, k, v, return_lse=True, **options)
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    if sinks is not None:
        top = jnp.maximum(top, fp32(sinks))
    top = jnp.where(top == -jnp.inf, 0, top)
    weight = jnp.exp(lse - top)[..., None]
    sums = jax.lax.psum(jnp.concatenate([weight * fp32(o), weight], -1), axis)
    total = sums[..., -1:] + (0 if sinks is None else jnp.exp(fp32(sinks) - top)[..., None])
    return (sums[..., :-1] / jnp.where(total > 0, total, 1)).astype(v.dtype)


def _check(options: Mapping[str, Any], segment_ids: Array | None, positions: Array | None) -> None:
    if options.get("bias") is not None:
        raise ValueError("bias: not served where tokens are divided over devices")
    counted = next((name for name in ("sink_tokens", "ends") if options.get(name)), None)
    if counted and segment_ids is not None and positions is None:
        raise ValueError(f"{counted}: expected the positions of tokens in their documents, beside segment_ids")
