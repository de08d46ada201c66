"""Routing Transformer (arXiv 2003.05997): queries see the keys of their cluster, found by k-means over both.

    c(u) = argmax_c û·μ̂_c,   û = u / |u| of a query or key before its rotation
    z_t = Σ_s softmax_s(K^-½ q_t·k_s) v_s

for each head of keys with its own `clusters` centroids μ. Two ways to say which s a query t sees:

- causal (ours): the last `window` of those up to t with c(k_s) = c(q_t); by `route` token, of those with
  c(k_s) = c(k_t), so that a token attends among its own kind, itself included.
- balanced (of the paper, NOT CAUSAL): every cluster takes the `window` queries and keys of a document with the largest
  û·μ̂ (by `route` token, tokens by their keys); of these, s <= t. z_t is the mean over the clusters that took q_t, 0 if
  none did. Later tokens decide what an earlier one reads, so that losses are too good and nothing can be generated.

The choice has no gradient. μ_c moves by `rate` · (mean of û over all of c in a batch - μ_c), and stays where there is
none; û learns to be near its centroid by `commitment` · mean (û - μ̂_c)². The paper starts by k-means of the first
batch, hydrax from random directions, and then what matches a query may lie in another cluster, from where no gradient
comes: with `warmup` attention is dense in the first steps, while centroids already follow.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Fraction, NonNegativeFloat, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.param import param, summed
from hydrax.nn.position import Rope
from hydrax.ops.sparse import clusters
from hydrax.ops.sparse.balanced import balanced_clusters
from hydrax.ops.sparse.lifetimes import FOREVER
from hydrax.parallel.sequence import clustered_window
from hydrax.parallel.shards import in_order

EPSILON = 1e-12
"""Of the squares of lengths."""


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    lifetimes: ClassVar[str] = "by content"

    mode: Literal["causal", "balanced"] = "causal"  # balanced: not causal, and cannot generate
    route: Literal["query", "token"] = "query"  # whose cluster a query looks at: its own, or that of its token's key
    clusters: Positive = 16  # about √T
    window: Positive = 128  # tokens of a cluster that one sees, itself included
    rate: Fraction = 0.001  # 1 - λ, of the moves of centroids
    warmup: Fraction = 0.0  # share of the training steps with dense attention, while centroids move
    commitment: NonNegativeFloat = 1e-4  # weight of the loss that draws keys to their centroids

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the keys of a layer are what it clusters")

    def slots(self, n: int) -> int:
        """Most keys of a document of n tokens that later tokens of their clusters may see."""
        return min(n, self.clusters * self.window)


class RoutingAttention(SoftmaxMixer):
    """y = W_o (z ⊙ σ(W_g x)); the state holds the last keys and values of every cluster, and how many it has had."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, dataclasses.replace(cfg, rope=Rope(fraction=0.0)), rngs=rngs)
        shape = (cfg.kv_heads or cfg.heads, cfg.clusters, (cfg.key_dim or 0) + 1)
        normal = jax.nn.initializers.normal(1.0)
        start = lambda *a: _unit(normal(*a).at[..., -1].set(0))  # noqa: E731
        self.centroids = param(rngs, start, shape, ("kv_heads", "gates", "norm"), rule="average")
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        ids = ctx.ids
        bare_q, bare_k, v = self.qkv(x, ctx.positions, exact=True)
        q, k = (cfg.rope.turn(a, ctx.positions).astype(x.dtype) for a in (bare_q, bare_k))
        v = ctx.tap("values", v)
        unit = _unit(self._routed(bare_q, bare_k))
        near = einsum("btgnk,gck->btgnc", unit, jax.lax.stop_gradient(_unit(self.centroids[..., :-1])))
        c = jnp.argmax(jax.lax.stop_gradient(near), axis=-1).astype(jnp.int32)
        if ctx.noise is not None:
            self._commit(near, ids != 0, ctx)
        v = self._watched(v, unit, c, ids != 0)
        options: dict[str, Any] = {"scale": cfg.scale, "softcap": cfg.softcap, "impl": ctx.impl}

        def dense() -> Array:
            return self.attend(q, kv_cache.Keys(k, v), ctx)

        def routed() -> Array:
            if cfg.mode == "causal":
                return self._causal(q, k, v, c, ids, ctx, options)
            if ctx.shards is not None:
                raise ConfigError("mode", "balanced", "expected causal where rows are divided (mesh.context)")
            ranked = jax.lax.stop_gradient(near)
            return balanced_clusters(q, k, v, ranked, size=cfg.window, segment_ids=ctx.segment_ids, **options)

        if state is not None:
            o, state = self._continued(q, k, v, c, ids, ctx, state, options)
        elif ctx.progress is None or cfg.warmup == 0:
            o = routed()
        else:
            o = jax.lax.cond(ctx.progress < cfg.warmup, dense, routed)
        return self.gate(ctx.tap("reads", o), x), state

    def _routed(self, q: Array, k: Array) -> Float[Array, "B T G N K"]:
        """What is compared with centroids: keys, and by `route` query the queries of each."""
        k = fp32(k)[:, :, :, None]
        if self.cfg.route == "token":
            return k
        return jnp.concatenate([k, fp32(q).reshape(*k.shape[:3], -1, k.shape[-1])], axis=3)

    def _causal(
        self, q: Array, k: Array, v: Array, c: Array, ids: Array, ctx: Context, options: dict[str, Any]
    ) -> Array:
        """Of rows without a state."""
        C = self.cfg.clusters
        rank = in_order(lambda c, i: clusters.ranks(c, i, C)[0], ctx.shards, c, ids)
        options = {**options, "window": self.cfg.window, "number": C, "segment_ids": ids, "shards": ctx.shards}
        return clustered_window(q, k, v, **_apart(c, rank), **options)

    def _continued(
        self, q: Array, k: Array, v: Array, c: Array, ids: Array, ctx: Context, state: PyTree, options: dict[str, Any]
    ) -> tuple[Array, PyTree]:
        """Behind what the state holds, and that after these tokens."""
        cfg, facts = self.cfg, dict[str, Any](positions=ctx.positions, segment_ids=ids)
        options = {**options, "window": cfg.window, "number": cfg.clusters, "segment_ids": ids}
        cache = state["cache"]
        rank, count = clusters.ranks(c, ids, cfg.clusters, state["count"])
        keys, own = kv_cache.collect(k, v, cache, **facts), _apart(c, rank)
        new = {"cluster": own["clusters"], "rank": own["ranks"]}
        all_c, all_ranks = (jnp.concatenate([cache[name], a], axis=1) for name, a in new.items())
        seen: dict[str, Any] = {"kv_clusters": all_c, "kv_ranks": all_ranks, "kv_segment_ids": keys.segment_ids}
        o = clusters.clustered_window(q, keys.k, keys.v, **own, **seen, cached=cache["k"].shape[1], **options)
        ends = jnp.where(all_ranks >= _of_clusters(count, all_c) - cfg.window, FOREVER, -1)
        old, ends = jnp.split(ends, [cache["k"].shape[1]], axis=1)
        cache = kv_cache.evict(cache, {"k": k, "v": v, **new}, **facts, ends=ends, old_ends=old)
        return o, {"cache": cache, "count": count}

    def _commit(self, near: Float[Array, "B T G N C"], valid: Bool[Array, "B T"], ctx: Context) -> None:
        """Tells of the mean of (k̂ - μ̂)² over channels, heads and real tokens, by |k̂ - μ̂|² = 2 - 2 k̂·μ̂."""
        far = (2 - 2 * near.max(-1)).mean((2, 3)) / (self.cfg.key_dim or 1)
        mean = jnp.sum(jnp.where(valid, far, 0)) / jnp.maximum(valid.sum(), 1)
        ctx.record("routing_commitment", self.cfg.commitment * mean)

    def _watched(
        self, y: Array, unit: Float[Array, "B T G N K"], c: Int[Array, "B T G N"], valid: Bool[Array, "B T"]
    ) -> Array:
        """y; the centroids get their moves for a gradient."""
        value = self.centroids[...]
        own = jax.nn.one_hot(c, self.cfg.clusters, dtype=unit.dtype) * valid[..., None, None, None]
        number = own.sum((0, 1, 3))[..., None]
        move = self.cfg.rate * (einsum("btgnc,btgnk->gck", own, unit) - number * value[..., :-1])
        return summed(y, value, jax.lax.stop_gradient(jnp.concatenate([move, number], axis=-1)))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        """Raises ConfigError for `mode="balanced"`."""
        cfg = self.cfg
        if cfg.mode == "balanced":
            raise ConfigError("mode", cfg.mode, "expected causal to generate: balanced chooses by the whole row")
        assert cfg.kv_heads is not None
        kinds: dict[str, Any] = {"by_head": (cfg.kv_heads,), "cluster": jnp.int32, "rank": jnp.int32}
        cache = cfg.init_cache(batch, cfg.slots(max_len), dtype, **kinds)
        return {"cache": cache, "count": jnp.zeros((batch, cfg.kv_heads, cfg.clusters), jnp.int32)}


def _unit(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + EPSILON)


def _apart(c: Int[Array, "B T G N"], rank: Int[Array, "B T G N"]) -> dict[str, Any]:
    """The clusters and ranks of keys, and of queries if they have their own."""
    facts = {"clusters": c[..., 0], "ranks": rank[..., 0]}
    if c.shape[3] == 1:
        return facts
    B, T = c.shape[:2]
    return {**facts, "asked": c[..., 1:].reshape(B, T, -1), "asked_ranks": rank[..., 1:].reshape(B, T, -1)}


def _of_clusters(count: Int[Array, "B G C"], c: Int[Array, "B S G"]) -> Int[Array, "B S G"]:
    """How many tokens the cluster of each key has had."""
    return jax.vmap(jax.vmap(lambda n, c: n[c], (0, 1), 1))(count, c)
