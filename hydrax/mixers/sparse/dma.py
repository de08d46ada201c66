"""Dynamic mask attention (arXiv 2508.02124): the values of a token say how much it is seen, and by whom.

    s_j = A softplus(W v_j),     β_j = e^{s_j},     o_t = Σ_j softmax_j(K^-1/2 q_t·k_j + β_j) v_j

over the `keep` keys j <= t with the largest s_j, for each head of keys; v_j are the values of all heads. The selection
has no gradient, β has that of a bias. A key that `keep` others beat never returns, so that the cache holds `keep` keys.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.param import fan_in, param
from hydrax.ops.sparse.ranked import ranked_ends
from hydrax.parallel.shards import in_order

HIGHEST = 30.0
"""Of exponents: β stays finite."""

BIASES = {"exp": lambda s: jnp.exp(jnp.minimum(s, HIGHEST)), "linear": lambda s: s}


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    lifetimes: ClassVar[str] = "by content"

    qk_norm: Literal["none", "head", "full"] = "head"  # RMSNorm of q and k before RoPE: over K, or over all heads
    keep: Positive = 2048  # keys that a query sees, for each head of keys
    keep_last: NonNegative = 0  # last keys that it sees besides, its own included
    granularity: Positive | None = None  # all keys of the query's block of so many, and the best of those before it
    bias_form: Literal["exp", "linear"] = "exp"  # β = e^s or s

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the values choose the keys")
        if self.keep_last and self.granularity is not None:
            raise ConfigError("keep_last", self.keep_last, "expected 0 with granularity, which keeps the query's block")

    def slots(self, n: int) -> int:
        """Most keys of a head that are alive at once in a document of n tokens."""
        return min(n, self.keep + max(self.keep_last, self.granularity or 0))


class DynamicMaskAttention(SoftmaxMixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds the keys that are still among the best, of each head its own."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        G, V = cfg.kv_heads, cfg.value_dim
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.w = param(rngs, fan_in(G * V), (G, V, G), ("kv_heads", "head_dim", "norm"), decay=True)
        self.a = param(rngs, jax.nn.initializers.normal(0.02), (G,), ("norm",))
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        facts = ctx.places
        q, k, _ = self.qkv(x, ctx.positions)
        assert k is not None
        exact = self._values(x)
        score, v = self._score(exact), ctx.tap("values", exact.astype(x.dtype))
        keys = kv_cache.collect(k, v, state, **facts)
        scores, ends = self._rank(score, keys, state, ctx)
        bias = BIASES[cfg.bias_form](scores)
        o = self.attend(q, keys, ctx, ends=ends, alive=cfg.slots(x.shape[1]), key_bias=bias)
        if state is not None:
            S = state["score"].shape[1]
            new = {"k": k, "v": v, "score": score}
            state = kv_cache.evict(state, new, **facts, ends=ends[:, S:], old_ends=ends[:, :S])
        return self.gate(ctx.tap("reads", o), x), state

    def _values(self, x: Array) -> Float[Array, "B T G V"]:
        """In fp32: rounded to bfloat16 they would rank otherwise."""
        linear = self.qkv.v
        assert linear is not None
        v = einsum("btd,dgv->btgv", x, linear.kernel[...].astype(x.dtype))
        return v if linear.bias is None else v + fp32(linear.bias[...])

    def _score(self, v: Float[Array, "B T G V"]) -> Float[Array, "B T G"]:
        return self.a[...] * jax.nn.softplus(einsum("btgv,gvh->bth", v, self.w[...].astype(v.dtype)))

    def _rank(
        self, score: Array, keys: kv_cache.Keys, state: PyTree | None, ctx: Context
    ) -> tuple[Float[Array, "B S G"], Int[Array, "B S G"]]:
        """Scores and ends of all keys, those in the cache first."""
        cfg = self.cfg
        rules: dict[str, Any] = {
            "keep": cfg.keep,
            "keep_last": cfg.keep_last,
            "granularity": cfg.granularity,
            "impl": ctx.impl,
        }
        if state is None:
            ids = ctx.ids
            return score, in_order(lambda *x: ranked_ends(*x, **rules), ctx.shards, score, ctx.positions, ids)
        scores = jnp.concatenate([state["score"].astype(score.dtype), score], axis=1)
        return scores, ranked_ends(scores, keys.positions, keys.segment_ids, old=state["score"].shape[1], **rules)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return cfg.init_cache(batch, cfg.slots(max_len), dtype, by_head=(cfg.kv_heads,), score=wide(dtype))
