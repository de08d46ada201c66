"""MoSA, mixture of sparse attention (arXiv 2505.00315): every head attends among the tokens that it chooses itself.

    r_t = σ(x_t W_r),     z_t = r_t Σ_{s <= t, s in I} softmax_s(K^-½ q_t·k_s) v_s   for t in I, else 0

for each head with its own set I of tokens of the document. Two ways to choose it, none with a gradient (W_r learns by
the factor r):

- threshold (ours, causal): r_t >= θ, and of these tokens at most `slack`/ρ of those up to t, first come. θ is a
  running statistic that is moved by `rate` · (share of tokens with r >= θ - 1/ρ), to the quantile of which 1/ρ are
  above. As a sum over tokens it does not depend on how rows are spread.
- ec (of the paper, NOT CAUSAL): the ⌊n/ρ⌋ largest r of a document of n tokens, at least one. Later tokens decide
  whether an earlier one is read, so that losses are too good and nothing can be generated.
"""

import dataclasses
import fractions
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Fraction, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.param import param, summed
from hydrax.nn.position import Rope
from hydrax.ops import documents
from hydrax.ops.sparse import sets
from hydrax.ops.sparse.lifetimes import FOREVER
from hydrax.parallel.shards import in_order

MANY = 2**28
"""More tokens than there are."""


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    lifetimes: ClassVar[str] = "by content"

    rope: Rope = dataclasses.field(default_factory=lambda: Rope(fraction=0.5))
    mode: Literal["threshold", "ec"] = "threshold"  # ec: not causal, and cannot generate
    sparsity: Positive = 16  # ρ: a head chooses one token of so many
    slack: PositiveFloat = 1.25  # tokens that it may keep by threshold, over those that it should
    rate: PositiveFloat = 0.01  # of the moves of θ
    start: Fraction = 0.5  # θ at first; r is σ of numbers around 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: every head chooses among its own keys")
        if self.kv_heads not in (None, self.heads):
            raise ConfigError("kv_heads", self.kv_heads, f"expected heads = {self.heads}: each chooses its own tokens")

    def room(self, n: Any) -> Any:
        """Most tokens that a head keeps of the first n of a document, in exact arithmetic: sums over documents fit."""
        share = min(fractions.Fraction(1), fractions.Fraction(self.slack).limit_denominator(100) / self.sparsity)
        return n * share.numerator // share.denominator

    def slots(self, n: int) -> int:
        """Most tokens of a head in a document, or in a row of documents, of n tokens."""
        return max(1, self.room(n))


class MixtureOfSparseAttention(SoftmaxMixer):
    """y = W_o (z ⊙ σ(W_g x)); the state holds the chosen keys of each head, and how many it chose."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H = cfg.heads
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        fan_in = jax.nn.initializers.uniform(2 * d_model**-0.5)
        self.router = param(rngs, lambda *a: fan_in(*a) - d_model**-0.5, (d_model, H), ("embed", "heads"), decay=True)
        start = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[:, 0].set(cfg.start)  # noqa: E731
        self.theta = param(rngs, start, (H, 2), ("heads", "norm"), rule="average")
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        facts = ctx.places
        ids = ctx.ids
        q, k, v = self.qkv(x, ctx.positions)
        assert k is not None
        v = ctx.tap("values", v)
        r = jax.nn.sigmoid(einsum("btd,dh->bth", fp32(x), self.router[...]))
        r = self._watched(r, ids != 0)
        known = (jax.lax.stop_gradient(r), ctx.positions, ids)
        if state is None:
            kept = in_order(lambda r, p, i: self._choose(r, p, i, None)[0], ctx.shards, *known)
        else:
            kept, seen = self._choose(known[0], ctx.positions, ids, state["seen"])
        ends = jnp.where(kept, FOREVER, -1)
        if state is None and ctx.shards is None:
            o = self._among(q, k, v, kept, ids, ctx.impl)
        elif state is None:
            o = self.attend(q, kv_cache.Keys(k, v), ctx, ends=ends)
        else:
            cache = state["cache"]
            keys = kv_cache.collect(k, v, cache, **facts)
            old = jnp.full(cache["positions"].shape, FOREVER)
            o = self.attend(q, keys, ctx, ends=jnp.concatenate([old, ends], axis=1))
            cache = kv_cache.evict(cache, {"k": k, "v": v}, **facts, ends=ends, old_ends=old)
            state = {"cache": cache, "seen": seen}
        z = ctx.tap("reads", o) * jnp.where(kept, r, 0)[..., None]
        return self.gate(z.astype(x.dtype), x), state

    def _watched(self, r: Float[Array, "B T H"], valid: Bool[Array, "B T"]) -> Array:
        """r; θ gets its moves for a gradient."""
        theta, rows = self.theta[...], valid[..., None]
        high = (r >= theta[:, 0]) - 1 / self.cfg.sparsity
        move = self.cfg.rate * jnp.sum(jnp.where(rows, high, 0), axis=(0, 1))
        return summed(r, theta, jax.lax.stop_gradient(jnp.stack([move, jnp.full_like(move, jnp.sum(valid))], axis=-1)))

    def _choose(self, r: Array, positions: Array, ids: Array, seen: Array | None) -> tuple[Array, Array]:
        """Which tokens each head keeps, bool [B,T,H], and how many so far in the last document, int32 [B,H]."""
        filled, valid = documents.fill_padding(ids)
        if self.cfg.mode == "ec":
            most = lambda n: jnp.maximum(1, n // self.cfg.sparsity)  # noqa: E731
            return sets.largest(r, ids, most), jnp.zeros(r[:, 0].shape, jnp.int32)
        high = (r >= self.theta[...][:, 0]) & valid[..., None]
        begins = documents.changes(filled)[..., None]
        room = jnp.broadcast_to(self.cfg.room(positions + 1)[..., None], high.shape)
        before = jnp.zeros_like(room[:, 0]) if seen is None else seen
        count = kept_so_far(high, jnp.where(valid[..., None], room, MANY), begins, before)
        last = jnp.where(begins, 0, jnp.concatenate([before[:, None], count[:, :-1]], axis=1))
        return count > last, count[:, -1]

    def _among(self, q: Array, k: Array, v: Array, kept: Array, ids: Array, impl: str | None) -> Array:
        """o of the kept tokens, 0 of the others."""
        cfg, T = self.cfg, q.shape[1]
        n = T if cfg.mode == "ec" else cfg.slots(T)  # of many short documents ec takes one token each
        find = jax.vmap(jax.vmap(lambda row: jnp.nonzero(row, size=n, fill_value=-1)[0], in_axes=1))
        places = find(kept)
        q, k, v = (sets.take_heads(a, places) for a in (q, k, v))
        options: dict[str, Any] = {"scale": cfg.scale, "softcap": cfg.softcap, "impl": impl}
        o = sets.token_set_attention(q, k, v, places, segment_ids=ids, **options)
        return sets.put_heads(o, places, T)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        """Raises ConfigError for `mode="ec"`."""
        cfg = self.cfg
        if cfg.mode == "ec":
            raise ConfigError("mode", cfg.mode, "expected threshold to generate: ec chooses by the whole row")
        cache = cfg.init_cache(batch, cfg.slots(max_len), dtype, by_head=(cfg.heads,))
        return {"cache": cache, "seen": jnp.zeros((batch, cfg.heads), jnp.int32)}


def kept_so_far(
    high: Bool[Array, "B T H"], room: Int[Array, "B T H"], begins: Bool[Array, "B T #H"], before: Int[Array, "B H"]
) -> Int[Array, "B T H"]:
    """n_t = min(n_(t-1) + high_t, room_t), from `before`, or 0 where a document begins.

    Steps are n -> min(n + a, b); so are two of them together.
    """

    def then(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.minimum(one[0] + two[0], MANY), jnp.minimum(one[1] + two[0], two[1])

    a = high.astype(jnp.int32)
    steps = (jnp.where(begins, MANY, a), jnp.where(begins, jnp.minimum(a, room), room))
    a, b = jax.lax.associative_scan(then, steps, axis=1)
    return jnp.minimum(before[:, None] + a, b)
