"""Routing Transformer (arXiv 2003.05997): tokens attend within their cluster, found by k-means over keys.

    c_t = argmax_c k̂_t·μ̂_c,   k̂ = k / |k| before its rotation,   μ̂ = μ / |μ|
    z_t = Σ_s softmax_s(K^-½ q_t·k_s) v_s

for each head of keys with its own `clusters` centroids. Two ways to say who attends to whom:

- causal (ours): s are the last `window` tokens of the document in the cluster of t, t itself included.
- balanced (of the paper, NOT CAUSAL): every cluster takes the `window` tokens of a document with the largest k̂·μ̂, s
  are those of them up to t; z_t is the mean over the clusters that took t, 0 if none did. Later tokens decide whether
  an earlier one is read, so that losses are too good and nothing can be generated.

The choice has no gradient. μ_c moves by `rate` · (mean of k̂ over the tokens of c in a batch - μ_c), and stays where
there are none; keys learn to be near their centroid by `commitment` · mean (k̂ - μ̂_c)². The paper starts by k-means
of the first batch, hydrax from random directions.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Fraction, NonNegativeFloat, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear
from hydrax.nn.param import param, summed
from hydrax.nn.position import Rope
from hydrax.ops.sparse import clusters, sets
from hydrax.ops.sparse.lifetimes import FOREVER
from hydrax.parallel.sequence import clustered_window
from hydrax.parallel.shards import in_order

EPSILON = 1e-12
"""Of the squares of lengths."""


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    lifetimes: ClassVar[str] = "by content"

    mode: Literal["causal", "balanced"] = "causal"  # balanced: not causal, and cannot generate
    clusters: Positive = 16  # about √T
    window: Positive = 128  # tokens of a cluster that one sees, itself included
    rate: Fraction = 0.001  # 1 - λ, of the moves of centroids
    commitment: NonNegativeFloat = 1e-4  # weight of the loss that draws keys to their centroids

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the keys of a layer are what it clusters")

    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))

    def slots(self, n: int) -> int:
        """Most keys of a document of n tokens that later tokens of their clusters may see."""
        return min(n, self.clusters * self.window)


class RoutingAttention(Mixer):
    """y = W_o (z ⊙ σ(W_g x)); the state holds the last keys and values of every cluster, and how many it has had."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, dataclasses.replace(cfg, rope=Rope(fraction=0.0)), rngs=rngs)
        shape = (cfg.kv_heads or cfg.heads, cfg.clusters, (cfg.key_dim or 0) + 1)
        normal = jax.nn.initializers.normal(1.0)
        start = lambda *a: _unit(normal(*a).at[..., -1].set(0))  # noqa: E731
        self.centroids = param(rngs, start, shape, ("kv_heads", "gates", "norm"), rule="average")
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        out = (cfg.heads, cfg.value_dim)
        self.project = Linear(out, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        ids = jnp.ones_like(ctx.positions) if ctx.segment_ids is None else ctx.segment_ids
        bare_q, bare_k, v = self.qkv(x, ctx.positions, exact=True)
        q, k = (cfg.rope.turn(a, ctx.positions).astype(x.dtype) for a in (bare_q, bare_k))
        v = ctx.tap("values", v)
        unit = _unit(fp32(bare_k))
        near = einsum("btgk,gck->btgc", unit, jax.lax.stop_gradient(_unit(self.centroids[..., :-1])))
        c = jnp.argmax(jax.lax.stop_gradient(near), axis=-1).astype(jnp.int32)
        if ctx.noise is not None:
            self._commit(near, ids != 0, ctx)
        v = self._watched(v, unit, c, ids != 0)
        options: dict[str, Any] = {"scale": cfg.scale, "softcap": cfg.softcap, "impl": ctx.impl}
        if cfg.mode == "balanced":
            o = self._balanced(q, k, v, jax.lax.stop_gradient(near), ctx, options)
        else:
            o, state = self._causal(q, k, v, c, ids, ctx, state, options)
        return self.gate(ctx.tap("reads", o), x), state

    def _causal(
        self, q: Array, k: Array, v: Array, c: Array, ids: Array, ctx: Context, state: PyTree | None, options: dict
    ) -> tuple[Array, PyTree]:
        cfg, facts = self.cfg, dict[str, Any](positions=ctx.positions, segment_ids=ids)
        options = {**options, "window": cfg.window, "number": cfg.clusters, "segment_ids": ids}
        if state is None:
            rank = in_order(lambda c, i: clusters.ranks(c, i, cfg.clusters)[0], ctx.shards, c, ids)
            return clustered_window(q, k, v, clusters=c, ranks=rank, shards=ctx.shards, **options), None
        cache = state["cache"]
        rank, count = clusters.ranks(c, ids, cfg.clusters, state["count"])
        keys = kv_cache.collect(k, v, cache, **facts)
        all_c, all_ranks = (jnp.concatenate([cache[n], a], 1) for n, a in (("cluster", c), ("rank", rank)))
        seen: dict[str, Any] = {"kv_clusters": all_c, "kv_ranks": all_ranks, "kv_segment_ids": keys.segment_ids}
        o = clusters.clustered_window(
            q, keys.k, keys.v, clusters=c, ranks=rank, **seen, cached=cache["k"].shape[1], **options
        )
        ends = jnp.where(all_ranks >= _of_clusters(count, all_c) - cfg.window, FOREVER, -1)
        old, new = jnp.split(ends, [cache["k"].shape[1]], axis=1)
        new_keys = {"k": k, "v": v, "cluster": c, "rank": rank}
        return o, {"cache": kv_cache.evict(cache, new_keys, **facts, ends=new, old_ends=old), "count": count}

    def _balanced(
        self, q: Array, k: Array, v: Array, near: Float[Array, "B T G C"], ctx: Context, options: dict[str, Any]
    ) -> Array:
        """Cluster by cluster, the sum of what its tokens read, over the number of clusters of each token."""
        if ctx.shards is not None:
            raise ConfigError("mode", "balanced", "expected causal where rows are divided (mesh.context)")
        (B, T), R = near.shape[:2], self.cfg.heads // near.shape[2]
        ids = jnp.ones((B, T), jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        kept = sets.largest(near.reshape(B, T, -1), ids, lambda n: self.cfg.window).reshape(near.shape)
        n = T if ctx.segment_ids is not None else min(T, self.cfg.window)
        find = jax.vmap(jax.vmap(lambda row: jnp.nonzero(row, size=n, fill_value=-1)[0], in_axes=1))
        k, v = (jnp.repeat(a, R, axis=2) for a in (k, v))

        @jax.checkpoint
        def add(total: Array, kept: Array) -> tuple[Array, None]:
            places = jnp.repeat(find(kept), R, axis=1)
            qs, ks, vs = (sets.take_heads(a, places) for a in (q, k, v))
            o = sets.token_set_attention(qs, ks, vs, places, segment_ids=ctx.segment_ids, **options)
            return total + sets.put_heads(fp32(o), places, T), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(fp32(v)), jnp.moveaxis(kept, 3, 0))
        number = jnp.repeat(jnp.maximum(kept.sum(-1), 1), R, axis=2)
        return (total / number[..., None]).astype(v.dtype)

    def _commit(self, near: Float[Array, "B T G C"], valid: Bool[Array, "B T"], ctx: Context) -> None:
        """Tells of the mean of (k̂ - μ̂)² over channels, heads and real tokens, by |k̂ - μ̂|² = 2 - 2 k̂·μ̂."""
        far = (2 - 2 * near.max(-1)).mean(-1) / (self.cfg.key_dim or 1)
        mean = jnp.sum(jnp.where(valid, far, 0)) / jnp.maximum(valid.sum(), 1)
        ctx.record("routing_commitment", self.cfg.commitment * mean)

    def _watched(
        self, y: Array, unit: Float[Array, "B T G K"], c: Int[Array, "B T G"], valid: Bool[Array, "B T"]
    ) -> Array:
        """y; the centroids get their moves for a gradient."""
        value = self.centroids[...]
        own = jax.nn.one_hot(c, self.cfg.clusters, dtype=unit.dtype) * valid[..., None, None]
        number = own.sum((0, 1))[..., None]
        move = self.cfg.rate * (einsum("btgc,btgk->gck", own, unit) - number * value[..., :-1])
        return summed(y, value, jax.lax.stop_gradient(jnp.concatenate([move, number], axis=-1)))

    def out(self, z: Array) -> Array:
        return self.project(z)

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


def _of_clusters(count: Int[Array, "B G C"], c: Int[Array, "B S G"]) -> Int[Array, "B S G"]:
    """How many tokens the cluster of each key has had."""
    return jax.vmap(jax.vmap(lambda n, c: n[c], (0, 1), 1))(count, c)
