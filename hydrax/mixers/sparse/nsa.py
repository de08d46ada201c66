"""Native sparse attention (arXiv 2502.11089): three views of the past, each query's own mixture of them.

    o_t = g_t¹ ⊙ Σ_c p_tc v̄_c  +  g_t² ⊙ attention(t; S_t)  +  g_t³ ⊙ attention(t; the last `window` tokens)

    k̄_c = φ_k(k_{c·d} .. k_{c·d + l - 1}),    v̄_c = φ_v(the same of v),    d and l the stride and length of spans
    p_tc = softmax_c(K^-½ q_t·k̄_c) over the spans that end at or before t
    S_t = the block of t, the `local` before it, the `init_blocks` first ones, and those of largest Σ_c ω_jc p_tc, `top`
          in all; ω_jc is how many strides block j and span c share, p_tc here the sum over a group of heads
    g_t = σ(x_t W_g), for every head

A query before the first span has a zero first view. Spans and blocks count from the start of the document. The choice
has no gradient: what chooses learns as far as the first view does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.nn.position import Rope
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.softmax.forms import Keys, Queries, Rules
from hydrax.ops.sparse import block_topk_attention, compress, pooled
from hydrax.ops.sparse.span_scores import Choice
from hydrax.parallel.sequence import over_all_keys


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"kernel": 32, "stride": 16, "compress": "mlp", "kv_sharing": "separate"},
        "fla": {"kernel": 64, "stride": 64, "compress": "mean", "kv_sharing": "shared", "rotate": "keys"},
    }
    lifetimes: ClassVar[str] = "by content"

    kernel: Positive = 32  # l: tokens of a span
    stride: Positive = 16  # d: tokens from span to span
    block: Positive = 64  # tokens per block
    top: Positive = 16  # blocks that a query reads, its own among them
    init_blocks: NonNegative = 1  # blocks of the start of the document that are always read
    local: NonNegative = 1  # blocks before the own one that are always read
    window: Positive = 512  # last tokens of the third view, the query's own included
    compress: Literal["mean", "weighted", "linear", "mlp"] = "mean"  # φ; all but the mean know places in a span
    kv_sharing: Literal["shared", "separate"] = "shared"  # whether all views have the same keys and values
    rotate: Literal["start", "centre", "keys"] = "start"  # where in its span k̄ turns by RoPE; keys: k does, before φ

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "kernel"):
            if getattr(self, name) % self.stride:
                raise ConfigError(name, getattr(self, name), f"expected a multiple of stride = {self.stride}")
        if self.top <= self.init_blocks + self.local:
            least = f"expected more than init_blocks + local = {self.init_blocks + self.local}"
            raise ConfigError("top", self.top, least)
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the sums over strides are of the layer's own keys")

    @property
    def strides(self) -> int:
        """Of a span."""
        return self.kernel // self.stride

    @property
    def roles(self) -> int:
        """Sums that are kept of a stride: one, or one for each place that it can have in a span."""
        return 1 if self.compress == "mean" else self.strides

    @property
    def compress_flops(self) -> int:
        """Of φ, per token."""
        assert self.kv_heads is not None and self.key_dim is not None and self.value_dim is not None
        per_token = {"mean": 0, "weighted": 0, "linear": self.roles, "mlp": self.roles + 1 / self.stride}
        return round(2 * per_token[self.compress] * self.kv_heads * (self.key_dim**2 + self.value_dim**2))

    @property
    def choice(self) -> Choice:
        """The blocks, as the op wants it."""
        sizes = (self.block, self.kernel, self.stride, self.init_blocks, self.local, self.top)
        return Choice(*sizes, pool="sum")


class Compress(nnx.Module):
    """φ: x [B,T,G,K] of the tokens of a span -> [B,N,G,K]. In fp32, since blocks are ranked by it.

        mean  Σ_i x_i / l,    weighted  Σ_i w_i x_i,    linear  Σ_i x_i W_i,    mlp  gelu(Σ_i x_i W_i) W

    x_i is with a learned place e_i (`placed`), but for the mean. Every head has its own weights.
    """

    def __init__(self, cfg: Config, dim: int, *, placed: bool, rngs: nnx.Rngs):
        self.cfg, self.dim = cfg, dim
        m, n, G, l = cfg.strides, cfg.stride, cfg.kv_heads, cfg.kernel  # noqa: E741
        assert G is not None
        matrix = ("norm", "norm", "kv_heads", "head_dim", "norm")
        fan_in = jax.nn.initializers.normal((l * dim) ** -0.5)
        makers: dict[str, Callable[[], nnx.Param | None]] = {
            "mean": lambda: None,
            "weighted": lambda: param(
                rngs, jax.nn.initializers.constant(1 / l), (m, n, G), ("norm", "norm", "kv_heads")
            ),
            "linear": lambda: param(rngs, fan_in, (m, n, G, dim, dim), matrix, decay=True),
            "mlp": lambda: param(rngs, fan_in, (m, n, G, dim, dim), matrix, decay=True),
        }
        self.w = makers[cfg.compress]()
        placed = placed and cfg.compress != "mean"
        small, place = jax.nn.initializers.normal(0.02), ("norm", "norm", "kv_heads", "head_dim")
        self.places = param(rngs, small, (m, n, G, dim), place) if placed else None
        last, axes = jax.nn.initializers.normal(dim**-0.5), ("kv_heads", "head_dim", "norm")
        self.last = param(rngs, last, (G, dim, dim), axes, decay=True) if cfg.compress == "mlp" else None

    def terms(self, x: Float[Array, "B T G K"], positions: Array, ids: Array) -> Float[Array, "B T m G K"]:
        """What tokens add to the sums over strides."""
        if self.w is None:
            return fp32(x)[:, :, None] / self.cfg.kernel
        if self.cfg.compress == "weighted":
            return compress.scaled_terms(x, self.w[...], positions)
        return compress.mapped_terms(x, self.w[...], positions, ids)

    def spans(self, sums: pooled.Blocks) -> pooled.Blocks:
        """φ of whole spans."""
        found = compress.spans(sums, self.cfg.strides)
        u = found.x
        if self.places is not None and self.w is not None:
            matrix = "mpgk,mpgkh->gh" if self.w[...].ndim == 5 else "mpgk,mpg->gk"
            u += einsum(matrix, self.places[...], self.w[...])
        if self.last is not None:
            u = einsum("bngk,gkh->bngh", jax.nn.gelu(u), self.last[...])
        return found._replace(x=u)


class NativeSparseAttention(SoftmaxMixer):
    """y = W_o o; the state holds keys and values of the document, and sums over strides of them for φ."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        G, K, V = cfg.kv_heads, cfg.key_dim, cfg.value_dim
        assert G is not None and K is not None and V is not None
        bare = dataclasses.replace(cfg, rope=Rope(fraction=0.0))
        self.qkv = QKV(d_model, bare, rngs=rngs, kv_heads=G if cfg.kv_sharing == "shared" else 3 * G)
        self.k_spans = Compress(cfg, K, placed=True, rngs=rngs)
        self.v_spans = Compress(cfg, V, placed=False, rngs=rngs)
        self.mixture = Linear(d_model, (cfg.heads, 3), axes=("embed", "heads", "norm"), rngs=rngs)
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        facts = ctx.places
        ids = ctx.ids
        own = {"positions": ctx.positions, "segment_ids": ids}
        bare_q, bare_k, v = self.qkv(x, ctx.positions, exact=True)
        assert bare_k is not None and v is not None
        if cfg.kv_sharing == "shared" and cfg.compress in ("mean", "weighted"):  # else v is not read as it is
            v = ctx.tap("values", v)
        fine_q, fine_k = (cfg.rope.turn(a, ctx.positions) for a in (bare_q, bare_k))
        q, k = fine_q.astype(x.dtype), fine_k.astype(x.dtype)
        rows = {"q": q, "fine": fine_q, **own}
        (k1, k2, k3), (v1, v2, v3) = (
            (self._view(a, i) for i, a in enumerate(views))
            for views in ((fine_k if cfg.rotate == "keys" else bare_k, k, k), (v, v, v))
        )
        if state is None:
            tokens = {"k1": k1, "v1": v1, "k": k2, "v": v2, **own}
            far = over_all_keys(self._trained(ctx), rows, tokens, ctx.shards)
            near = kv_cache.Keys(k3, v3)
        else:
            terms = {"k": self.k_spans.terms(k1, *own.values()), "v": self.v_spans.terms(v1, *own.values())}
            at = (cfg.stride, ctx.positions, ids)
            sums = {n: pooled.block_sums(t, *at, state["sums"][n]) for n, t in terms.items()}
            keys = kv_cache.in_order(k2, v2, state["cache"], **facts)
            far = self._far(ctx, rows, sums, keys)
            near = keys if "ring" not in state else kv_cache.collect(k3, v3, state["ring"], **facts)
            new = {
                "sums": {n: pooled.add_sums(state["sums"][n], t, *at) for n, t in terms.items()},
                "cache": kv_cache.write(state["cache"], k2, v2, **facts),
            }
            if "ring" in state:
                new["ring"] = kv_cache.write(state["ring"], k3, v3, **facts, window=cfg.window)
            state = new
        o = self._blend(x, [*far, self.attend(q, near, ctx, window=cfg.window)])
        return self.gate(ctx.tap("reads", o), x), state

    def _view(self, x: Float[Array, "B T n K"], i: int) -> Float[Array, "B T G K"]:
        """The keys or values of view i: of the spans, the blocks, the window."""
        G = self.cfg.kv_heads
        assert G is not None
        return x if self.cfg.kv_sharing == "shared" else x[:, :, i * G : (i + 1) * G]

    def _blend(self, x: Array, views: list[Array]) -> Array:
        gates = jax.nn.sigmoid(self.mixture(x, exact=True))
        return sum(gates[..., i, None] * fp32(o) for i, o in enumerate(views)).astype(x.dtype)  # type: ignore[union-attr]

    def _trained(self, ctx: Context) -> Callable[[dict[str, Array], dict[str, Array]], tuple[Array, Array]]:
        """The first two views of some queries by all keys of their rows."""

        def f(rows: dict[str, Array], keys: dict[str, Array]) -> tuple[Array, Array]:
            own = {n: keys[n] for n in ("positions", "segment_ids")}
            terms = {"k": self.k_spans.terms(keys["k1"], *own.values())}
            terms["v"] = self.v_spans.terms(keys["v1"], *own.values())
            sums = {n: pooled.block_sums(t, self.cfg.stride, **own) for n, t in terms.items()}
            places = {} if ctx.shards is None else own
            return self._far(ctx, rows, sums, kv_cache.Keys(keys["k"], keys["v"], **places))

        return f

    def _far(
        self, ctx: Context, rows: dict[str, Array], sums: dict[str, pooled.Blocks], keys: kv_cache.Keys
    ) -> tuple[Array, Array]:
        """What the spans tell, and the blocks that they choose."""
        cfg, dtype = self.cfg, rows["q"].dtype
        positions, ids = rows["positions"], rows["segment_ids"]
        by_group = rows["fine"].reshape(*rows["q"].shape[:2], cfg.kv_heads, -1, cfg.key_dim)
        scale = cfg.scale or cfg.key_dim**-0.5
        rules = Rules(scale, cfg.softcap, None, 0, aligned=False)
        spans = self._spans(sums)
        far = Queries(by_group, positions, ids), spans, sums["k"], cfg.choice, rules
        o, idx = compress.span_attention(*far, dtype=dtype, impl=ctx.impl)
        chosen = block_topk_attention(
            rows["q"],
            keys.k,
            keys.v,
            checkpoint_name(idx, KERNEL),  # the backward pass must not choose again from scores it rounds otherwise
            block_size=cfg.block,
            scale=cfg.scale,
            softcap=cfg.softcap,
            positions=positions,
            segment_ids=ids,
            kv_positions=keys.positions,
            kv_segment_ids=keys.segment_ids,
            impl=ctx.impl,
        )
        return o.reshape(chosen.shape).astype(dtype), chosen

    def _spans(self, sums: dict[str, pooled.Blocks]) -> Keys:
        """k̄ and v̄ at their last tokens, k̄ turned to its place."""
        cfg, k, v = self.cfg, self.k_spans.spans(sums["k"]), self.v_spans.spans(sums["v"]).x
        starts = k.numbers * cfg.stride
        if cfg.rotate != "keys":
            places = starts + (0 if cfg.rotate == "start" else (cfg.kernel - 1) / 2)
            k = k._replace(x=cfg.rope.turn(k.x, places))
        return Keys(k.x, v, starts + cfg.kernel - 1, k.segment_ids)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        shape = (batch, -(-max_len // cfg.stride), cfg.roles, cfg.kv_heads)
        sums = {
            "k": jnp.zeros((*shape, cfg.key_dim), wide(dtype)),
            "v": jnp.zeros((*shape, cfg.value_dim), wide(dtype)),
        }
        state = {"cache": cfg.init_cache(batch, max_len, dtype), "sums": sums}
        if cfg.kv_sharing == "separate":
            state["ring"] = cfg.init_cache(batch, min(max_len, cfg.window), dtype)
        return state
