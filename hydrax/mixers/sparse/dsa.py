"""Attention to the tokens that a lightning indexer scores best (DeepSeek sparse attention, arXiv 2512.02556).

    q^I_ti = RoPE(W_q x_t)_i,   k^I_s = RoPE(LayerNorm(W_k x_s)),   w_t = W_w x_t / √I,   I heads of width d
    I_ts = Σ_i w_ti ReLU(d^-½ q^I_ti·k^I_s),   o_t = Σ_s softmax_s(K^-½ q_t·k_s) v_s

over the `keep` tokens s <= t of largest I_ts.

The choice has no gradient. In training the indexer learns from the attention, by a loss of its own,

    Σ_t KL(p̄_t ‖ softmax(I_t)) / number of tokens,     p̄_t = the mean over heads of what t attends to, as given

over the chosen tokens; at first, for the share `warmup` of the steps, attention is dense and the loss is over all it
sees. No other loss reaches the indexer, whose input has no gradient either. Its rate is that of `optim.rates` for
`*/mixer/indexer/*`.
"""

import dataclasses
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Fraction, NonNegativeFloat, Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.param import fan_in, param
from hydrax.nn.position import Rope
from hydrax.ops.softmax.forms import Rules
from hydrax.ops.sparse import tokens
from hydrax.parallel.sequence import over_all_keys

EPSILON = 1e-6
"""Of the variance in the norm of index keys."""


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    lifetimes: ClassVar[str] = "by content"

    keep: Positive = 512  # tokens that a query sees
    index_heads: Positive = 4  # I
    index_dim: Positive = 32  # d
    index_rope: Fraction = 0.5  # of the d channels that turn, by `rope.theta`, always in halves
    index_loss: NonNegativeFloat = 1.0  # weight of the indexer's loss
    warmup: Fraction = 0.1  # share of the training steps with dense attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: an indexer chooses among the keys of its layer")


class Indexer(nnx.Module):
    """q^I [B,T,I,d], k^I [B,T,d] and w [B,T,I], all in fp32: rounded to bfloat16 they would rank otherwise."""

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        n, d = cfg.index_heads, cfg.index_dim
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        self.rope = Rope(cfg.rope.theta, cfg.index_rope)
        self.q = param(rngs, fan_in(d_model), (d_model, n, d), ("embed", "gates", "norm"), decay=True)
        self.k = param(rngs, fan_in(d_model), (d_model, d), ("embed", "norm"), decay=True)
        self.w = param(rngs, fan_in(d_model), (d_model, n), ("embed", "gates"), decay=True)
        self.weight, self.bias = (param(rngs, init, (d,), ("norm",)) for init in (ones, zeros))

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
        x = fp32(x)
        k = einsum("btd,dk->btk", x, self.k[...])
        k = k - k.mean(-1, keepdims=True)
        k = k * jax.lax.rsqrt(jnp.mean(k**2, -1, keepdims=True) + EPSILON) * self.weight[...] + self.bias[...]
        q = self.rope.turn(einsum("btd,dik->btik", x, self.q[...]), positions)
        w = einsum("btd,di->bti", x, self.w[...]) * self.w.shape[1] ** -0.5
        return q, self.rope.turn(k[:, :, None], positions)[:, :, 0], w


class IndexedAttention(SoftmaxMixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds keys, values and index keys of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.indexer = Indexer(d_model, cfg, rngs=rngs)
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        facts = ctx.places
        q, k, v = self.qkv(x, ctx.positions)
        assert k is not None
        v = ctx.tap("values", v)
        index = self.indexer(x, ctx.positions)
        if state is not None:
            keys = kv_cache.collect(k, v, state, **facts)
            index_k = jnp.concatenate([state["index"], index[1]], axis=1)
            o, _ = self._sparse(ctx, (q, index), (keys, index_k), learns=False)
            state = kv_cache.write(state, k, v, **facts, index=index[1])
            return self.gate(ctx.tap("reads", o), x), state
        learns = ctx.noise is not None and self.cfg.index_loss > 0
        if learns:
            index = self.indexer(jax.lax.stop_gradient(x), ctx.positions)
        o, loss = self._trained(ctx, q, kv_cache.Keys(k, v), index, learns)
        if learns:
            real = ctx.ids != 0
            mean = jnp.sum(jnp.where(real, loss, 0)) / jnp.maximum(real.sum(), 1)
            ctx.record("index", self.cfg.index_loss * mean)
        return self.gate(ctx.tap("reads", o), x), None

    def _trained(
        self, ctx: Context, q: Array, keys: kv_cache.Keys, index: tuple[Array, Array, Array], learns: bool
    ) -> tuple[Array, Array]:
        """Outputs and losses [B,T] of whole rows: dense in the first steps of a training, then sparse."""
        cfg = self.cfg

        def sparse() -> tuple[Array, Array]:
            return self._sparse(ctx, (q, index), (keys, index[1]), learns)

        def dense() -> tuple[Array, Array]:
            loss = jnp.zeros_like(index[2][..., 0])
            if learns:
                loss = self._seeing(ctx, (q, index), (keys, index[1]), self._dense_loss)
            return self.attend(q, keys, ctx), loss

        if ctx.progress is None or cfg.warmup == 0:
            return sparse()
        return jax.lax.cond(ctx.progress < cfg.warmup, dense, sparse)

    def _sparse(self, ctx: Context, rows: tuple, keys: tuple, learns: bool) -> tuple[Array, Array]:
        cfg, rules = self.cfg, self._rules

        def f(rows: dict[str, Any], keys: dict[str, Any]) -> tuple[Array, Array]:
            index, queries, seen = _read(rows, keys)
            idx = tokens.select_tokens(index, queries, seen, cfg.keep)
            o = tokens.token_topk_attention(
                rows["q"],
                keys["k"],
                keys["v"],
                idx,
                scale=cfg.scale,
                softcap=cfg.softcap,
                segment_ids=rows["segment_ids"],
                positions=rows["positions"],
                kv_segment_ids=keys["segment_ids"],
                kv_positions=keys["positions"],
                impl=ctx.impl,
            )
            nothing = jnp.zeros_like(index[2][..., 0])
            return o, tokens.index_loss(index, queries, seen, idx, rules) if learns else nothing

        return self._seeing(ctx, rows, keys, f)

    def _dense_loss(self, rows: dict[str, Any], keys: dict[str, Any]) -> Array:
        index, queries, seen = _read(rows, keys)
        return tokens.index_loss(index, queries, seen, None, self._rules)

    @property
    def _rules(self) -> Rules:
        cfg = self.cfg
        assert cfg.key_dim is not None
        return Rules(cfg.key_dim**-0.5 if cfg.scale is None else cfg.scale, cfg.softcap, None, 0, aligned=False)

    def _seeing(self, ctx: Context, rows: tuple, keys: tuple, f: Any) -> Any:
        """f of all facts of queries and of keys, on the devices that share rows."""
        (q, (index_q, _, w)), (seen, index_k) = rows, keys
        ids = ctx.ids
        own = {"positions": ctx.positions, "segment_ids": ids}
        other = own if seen.positions is None else {"positions": seen.positions, "segment_ids": seen.segment_ids}
        given = {"q": q, "index": index_q, "w": w, **own}
        return over_all_keys(f, given, {"k": seen.k, "v": seen.v, "index": index_k, **other}, ctx.shards)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {
            **cfg.init_cache(batch, max_len, dtype),
            "index": jnp.zeros((batch, max_len, cfg.index_dim), wide(dtype)),
        }


def _read(rows: dict[str, Any], keys: dict[str, Any]) -> tuple:
    """The indexer's queries, keys and weights; queries and keys of the attention."""
    places = (rows["segment_ids"], rows["positions"], keys["segment_ids"], keys["positions"])
    return (rows["index"], keys["index"], rows["w"]), *tokens.rows_and_keys(rows["q"], keys["k"], keys["v"], *places)
