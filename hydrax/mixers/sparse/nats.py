"""NAtS, neural attention search (arXiv 2502.13251): a linear scorer says of every key how long it is seen.

    a_j = W x_j,     type_j = argmax a_j  in {global, local, sliding},     softmax over living keys

for each head of keys. A global key is seen for ever, a local one until the next global one, a sliding one by `sliding`
more tokens. The first token of a document is global. In a training step types are drawn by a_j plus Gumbel noise, and
W learns through the softmax of that (straight through) what its types are worth, see `ops.sparse.typed`; otherwise it
has no gradient.
"""

import dataclasses
import functools
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, NonNegativeFloat, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.param import fan_in, param
from hydrax.ops.dispatch import named
from hydrax.ops.sparse.lifetimes import FOREVER
from hydrax.ops.sparse.typed import GLOBAL, LOCAL, OPEN, next_global, typed_ends, worth
from hydrax.parallel.sequence import self_attention
from hydrax.parallel.shards import in_order

EXACT = ("recurrent", "xla", "chunked")
"""The forms of attention that take values in fp32 of any width, by which types learn what they are worth."""


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    lifetimes: ClassVar[str] = "by content"

    sliding: Positive = 16  # tokens after a sliding key that see it
    sparsity: NonNegativeFloat = 5e-7  # weight of the shares of queries that see global and local keys, summed
    detach: bool = True  # the scorer reads its input without a gradient to it
    capacity: Positive | None = None  # slots of the cache for each head of keys; those of a whole document if None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: keys live as long as their layer says")

    def slots(self, n: int) -> int:
        """Slots for a document of n tokens."""
        return min(n, self.capacity or n)


class NeuralAttentionSearch(SoftmaxMixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds the living keys of each head.

    If there are more than slots, the oldest local keys leave early; the state counts them as `dropped` [B,Hk].
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.scorer = param(
            rngs, fan_in(d_model), (d_model, cfg.kv_heads, 3), ("embed", "kv_heads", "norm"), decay=True
        )
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg, facts = self.cfg, ctx.places
        q, k, v = self.qkv(x, ctx.positions)
        assert k is not None
        v = ctx.tap("values", v)
        logits = einsum("btd,dgn->btgn", fp32(jax.lax.stop_gradient(x) if cfg.detach else x), self.scorer[...])
        types, kinds, following, last = self._types(logits, ctx)
        ends = typed_ends(kinds, ctx.positions, following, cfg.sliding)
        keys = kv_cache.collect(k, v, state, **facts)
        if state is None:
            o = self.attend(q, keys, ctx, ends=ends)
            if ctx.noise is not None:
                given = jax.lax.stop_gradient((o, q, k, v, following, {**facts, "shards": ctx.shards}))
                o = _with_types(cfg, ctx.impl, o, types, given)
                ctx.record("nats_sparsity", self._sparsity(types, following, last, ctx))
        else:
            alive = jnp.concatenate([_closed(state["ends"], kinds, keys), ends], axis=1)
            o = self.attend(q, keys, ctx, ends=alive)
            state = self._kept(state, {"k": k, "v": v, "ends": ends}, keys, alive, facts)
        return self.gate(ctx.tap("reads", o), x), state

    def _types(self, logits: Float[Array, "B T G 3"], ctx: Context) -> tuple[Array, Array, Array, Array]:
        """Types as numbers [B,T,G,3] that are 0 or 1 and have a gradient, and as indices; `next_global`."""
        noise = None if ctx.noise is None else jax.random.fold_in(ctx.noise, ctx.layer_index)
        ids = ctx.ids

        def choose(logits: Array, positions: Array, ids: Array) -> tuple[Array, ...]:
            scores = logits if noise is None else logits + jax.random.gumbel(noise, logits.shape, logits.dtype)
            first = (positions == 0)[..., None]
            kinds = jnp.where(first, GLOBAL, jnp.argmax(jax.lax.stop_gradient(scores), axis=-1))
            soft = jnp.where(first[..., None], 0, jax.nn.softmax(scores, axis=-1))
            hard = jax.nn.one_hot(kinds, 3, dtype=soft.dtype)
            following, last = next_global(kinds, positions, ids)
            return hard + soft - jax.lax.stop_gradient(soft), kinds, following, last

        return in_order(choose, ctx.shards, logits, ctx.positions, ids)

    def _sparsity(self, types: Array, following: Array, last: Array, ctx: Context) -> Array:
        """λ Σ_j (queries that see key j, as far as its type makes it so) / T, the mean over rows."""
        p, T = ctx.positions[..., None], ctx.positions.shape[1]
        lives = {GLOBAL: last[..., None] + 1 - p, LOCAL: jnp.minimum(following, last[..., None]) - p}
        seen = sum(types[..., kind] * n for kind, n in lives.items()) / T
        if ctx.segment_ids is not None:
            seen = jnp.where((ctx.segment_ids != 0)[..., None], seen, 0)
        return self.cfg.sparsity * jnp.sum(seen) / types.shape[0]

    def _kept(
        self,
        state: PyTree,
        new: dict[str, Array],
        keys: kv_cache.Keys,
        ends: Int[Array, "B S G"],
        facts: dict[str, Any],
    ) -> PyTree:
        """The cache after these tokens. Where keys are too many, old ones leave: local, then sliding, then global."""
        S = state["k"].shape[1]
        if self.cfg.capacity is None:
            return kv_cache.evict(state, new, **facts, ends=ends[:, S:], old_ends=ends[:, :S])
        state = dict(state)
        dropped = state.pop("dropped")
        place, document = keys.positions, keys.segment_ids
        assert place is not None and document is not None
        now = jnp.max(jnp.where(document != 0, jnp.arange(document.shape[1])[:, None], -1), axis=1, keepdims=True)
        now = jnp.take_along_axis(document, jnp.maximum(now, S), axis=1)  # the last document; 0 if all is padding
        own = (document == now) & (document != 0)
        alive = own & (ends > jnp.max(jnp.where(own, place, -1), axis=1, keepdims=True))
        excess = jnp.maximum(alive.sum(1) - S, 0)
        later = jnp.where(ends == OPEN, 0, jnp.where(ends == FOREVER, FOREVER // 2, FOREVER // 4))
        order = jnp.argsort(jnp.argsort(jnp.where(alive, place + later, FOREVER), axis=1), axis=1)
        ends = jnp.where(alive & (order < excess[:, None]), -1, ends)
        state = kv_cache.evict(state, new, **facts, ends=ends[:, S:], old_ends=ends[:, :S])
        assert state is not None
        return {**state, "dropped": jnp.where(document[:, S] == now[:, 0], dropped, 0) + excess}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        cache = cfg.init_cache(batch, cfg.slots(max_len), dtype, by_head=(cfg.kv_heads,), ends=jnp.int32)
        counts = {} if cfg.capacity is None else {"dropped": jnp.zeros((batch, cfg.kv_heads), jnp.int32)}
        return {**cache, **counts}


def _closed(ends: Int[Array, "B S G"], kinds: Int[Array, "B T G"], keys: kv_cache.Keys) -> Int[Array, "B S G"]:
    """Ends of keys in a cache, where the first global key of the new tokens ends the open ones."""
    S = ends.shape[1]
    assert keys.positions is not None and keys.segment_ids is not None
    document, place = keys.segment_ids[:, S:], keys.positions[:, S:]
    closes = (kinds == GLOBAL) & (document == document[:, :1]) & (document != 0)
    first = jnp.min(jnp.where(closes, place, OPEN), axis=1, keepdims=True)
    return jnp.where(ends == OPEN, first, ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_types(cfg: Config, impl: str | None, o: Array, types: Array, given: tuple) -> Array:
    """o, with a gradient to the types: what they are worth."""
    return o


def _forward(cfg: Config, impl: str | None, o: Array, types: Array, given: tuple) -> tuple[Array, tuple]:
    return o, given


def _backward(cfg: Config, impl: str | None, given: tuple, do: Array) -> tuple:
    o, q, k, v, following, facts = given
    served = impl if named("attention", impl) in EXACT else None
    options: dict[str, Any] = {**facts, "scale": cfg.scale, "softcap": cfg.softcap, "impl": served}
    attend = functools.partial(self_attention, q, k, return_lse=True, **options)
    return do, worth(attend, v, o, do, following, cfg.sliding), None


_with_types.defvjp(_forward, _backward)
