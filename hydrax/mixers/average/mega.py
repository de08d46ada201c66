"""Mega: gated attention over moving averages (arXiv 2209.10655); and `ShortLongConv`, of convolutions instead.

    m = silu(N^-½ Σ_n γ_n h_n + ω n_t),   h_n = (1 - p_n a_n) h_n + p_n β_n n_t,   p = σ(δ), a = σ(α), for every channel
    z = silu(W_z m + b),   q = g_q z + c_q,   k = g_k z + c_k,   v = silu(W_v n + b),   r = silu(W_r m + b)
    y = σ(W_u m + b) ⊙ (silu(W_s m + b + W_h (r ⊙ attention(q, k, v)) + b) - x)

n is what the mixer reads, x the residual stream to which y is added: together they are a highway. Attention begins anew
with every chunk, which counts from the start of the document; beyond it only the averages remember.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn import kv_cache, long_conv
from hydrax.nn.conv import ShortConv
from hydrax.nn.features import elu1
from hydrax.nn.linear import Linear
from hydrax.nn.long_conv import EMA
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.nn.position import rope
from hydrax.ops.softmax.relative import Weights
from hydrax.parallel.sequence import linear_attention, relative_attention

Bias = Literal["none", "simple", "rotary"]


@dataclasses.dataclass(frozen=True)
class HighwayConfig(MixerConfig):
    heads: Positive = 1  # of the attention; Mega has one
    key_dim: Positive | None = None  # K per head; d_model / 4 over the heads if None
    inner_dim: Positive | None = None  # width of v and r, all heads together; 2 d_model if None
    modes: Positive = 16  # N averages of each channel
    chunk_size: Positive | None = None  # tokens per chunk of the averages' training form
    width: Positive | None = None  # channels of the averages: d_model, which is filled in

    def fill(self, d_model: int) -> Any:
        if self.width not in (None, d_model):
            raise ConfigError("width", self.width, f"expected d_model = {d_model}, or nothing")
        inner_dim = self.inner_dim or 2 * d_model
        if inner_dim % self.heads:
            raise ConfigError("heads", self.heads, f"expected a divisor of inner_dim = {inner_dim}")
        key_dim = self.key_dim or max(1, d_model // (4 * self.heads))
        return dataclasses.replace(self, key_dim=key_dim, inner_dim=inner_dim, width=d_model)

    @property
    def values(self) -> int:
        """V per head."""
        assert self.inner_dim is not None
        return self.inner_dim // self.heads


class Highway(Mixer):
    """What is common to the mixers here: all but what makes m, and the attention. Nothing follows: z is y.

    `HOLDS` are the parts of the state, which the two others make new from those of `past`.
    """

    HOLDS: ClassVar[tuple[str, ...]]

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.values
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        self.z = Linear(d_model, (H, K), axes=("embed", *keys), bias=True, rngs=rngs)
        self.gain = param(rngs, jax.nn.initializers.normal(0.02), (2, H, K), ("kinds", *keys))
        self.shift = param(rngs, jax.nn.initializers.zeros, (2, H, K), ("kinds", *keys))
        self.v = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        self.read = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        self.update = Linear(d_model, d_model, axes=("embed", "embed_out"), bias=True, rngs=rngs)
        self.skip = Linear(d_model, d_model, axes=("embed", "embed_out"), bias=True, rngs=rngs)
        self.h = Linear((H, V), d_model, axes=(*values, "embed"), bias=True, rngs=rngs)
        self.project = Same((1, d_model))

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(self.HOLDS) if state is None else state
        m, averages = self._average(x, ctx, past)
        z = fp32(jax.nn.silu(self.z(m)))
        q, k = ((z * self.gain[i] + self.shift[i]).astype(m.dtype) for i in (0, 1))
        o, attended = self._attend(q, k, ctx.tap("values", jax.nn.silu(self.v(x))), ctx, past)
        candidate = jax.nn.silu(self.skip(m) + self.h(o * jax.nn.silu(self.read(m))))
        y = jax.nn.sigmoid(self.update(m)) * (candidate - (x if ctx.residual is None else ctx.residual))
        return y[:, :, None].astype(x.dtype), averages | attended

    def _average(self, x: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        raise NotImplementedError

    def _attend(self, q: Array, k: Array, v: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Config(HighwayConfig):
    chunk: Positive = 2048  # tokens per chunk of the attention
    bias: Bias = "simple"  # of scores, by distance: a learned number for each, or the product of two turned vectors
    theta: PositiveFloat = 10000.0  # of these
    weights: Weights = "softmax"  # what scores become

    def visible(self, n: int) -> float:
        """Mean number of keys that a query of a document of n tokens sees."""
        chunks, rest = divmod(n, self.chunk)
        return (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / (2 * n)


class Mega(Highway):
    """The state holds the averages, and keys and values of the chunk."""

    Config: TypeAlias = Config
    HOLDS = ("memory", "cache")

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.averages = EMA(d_model, cfg.modes, skip=True, rngs=rngs)
        super().__init__(d_model, cfg, rngs=rngs)
        self.bias = BIASES[cfg.bias](cfg, rngs=rngs)

    def _average(self, x: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        m, memory = self.averages(x, ctx, past["memory"], self.cfg.chunk_size)
        return jax.nn.silu(m).astype(x.dtype), {"memory": memory}

    def _attend(self, q: Array, k: Array, v: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        where = ctx.places
        keys = kv_cache.collect(k, v, past["cache"], **where)
        o = relative_attention(
            q,
            keys.k,
            keys.v,
            self.bias(),
            chunk=self.cfg.chunk,
            weights=self.cfg.weights,
            scale=1.0 if self.cfg.weights == "laplace" else None,
            impl=ctx.impl,
            **kv_cache.sides(keys, ctx.positions, ctx.segment_ids, ctx.shards),
        )
        return ctx.tap("reads", o), {"cache": kv_cache.write(past["cache"], k, v, **where, window=self.cfg.chunk)}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        cache = kv_cache.empty(batch, min(max_len, cfg.chunk), cfg.heads, cfg.key_dim, cfg.values, dtype)
        return {"memory": self.averages.init_state(batch, dtype), "cache": cache}


@dataclasses.dataclass(frozen=True)
class ShortLongConfig(HighwayConfig):
    conv_width: Positive = 3  # taps of the short convolution, and of the branch beside the filter
    filter: long_conv.Name = "ema"  # the long convolution; implicit: whole rows, no documents, no decoding
    horizon: Positive = 2048  # T₀ of filter implicit, in which its kernels change and decay
    norm_eps: PositiveFloat = 1e-5  # of both norms

    @property
    def restarts(self) -> bool:
        return self.filter != "implicit"

    def state_bytes(self, b: int) -> int:
        """Of one row, with b bytes per number of the compute dtype."""
        assert self.width is not None and self.key_dim is not None and self.inner_dim is not None
        channel = 2 * b * (self.conv_width - 1) + long_conv.HELD[self.filter](self)
        return self.width * channel + 4 * self.key_dim * self.inner_dim

    def flops(self, n: int) -> float:
        """Per token, without projections."""
        assert self.width is not None and self.key_dim is not None and self.inner_dim is not None
        channel = 4 * self.conv_width + long_conv.FLOPS[self.filter](self, n)
        return self.width * channel + 4 * self.key_dim * self.inner_dim


class ShortLongConv(Highway):
    """A short convolution, then a long one, then linear attention: after CHELA (arXiv 2406.08128).

        s = silu(short(n)),   l = s + branch(s) + filter(s),   m = RMSNorm(l)
        S_t = S_{t-1} + φ(k_t) v_tᵀ,   o_t = RMSNorm_V(K^-½ S_tᵀ φ(q_t)),   φ = elu + 1

    and with them the highway of Mega. The paper says that linear attention follows short-long convolutions of which the
    short one is merged into the long one; equations, sizes, norms and gates are a definition of hydrax. `branch` and
    `filter` read the same tokens, so that their sum is one convolution, whose first taps are both kernels' sum.
    """

    Config: TypeAlias = ShortLongConfig
    HOLDS = ("short", "branch", "filter", "memory")

    def __init__(self, d_model: int, cfg: ShortLongConfig, *, rngs: nnx.Rngs):
        taps: dict[str, Any] = {"axes": ("inner",), "rngs": rngs}
        self.short = ShortConv((d_model,), cfg.conv_width, **taps)
        self.branch = ShortConv((d_model,), cfg.conv_width, activation=None, **taps)
        self.filter = long_conv.FILTERS[cfg.filter](d_model, cfg, rngs)
        self.norm = RMSNorm(d_model, axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
        super().__init__(d_model, cfg, rngs=rngs)
        self.o_norm = RMSNorm(cfg.values, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)

    def _average(self, x: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        s, short = self.short(jnp.asarray(x), past["short"], **facts)
        near, branch = self.branch(s, past["branch"], **facts)
        far, memory = self.filter(s, ctx, past["filter"], self.cfg.chunk_size)
        m = self.norm((s + near + far).astype(x.dtype))
        return m, {"short": short, "branch": branch, "filter": memory}

    def _attend(self, q: Array, k: Array, v: Array, ctx: Context, past: PyTree) -> tuple[Array, PyTree]:
        o, memory = linear_attention(
            elu1(q),
            elu1(ctx.tap("keys", k)),
            v,
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.o_norm(ctx.tap("reads", o)), {"memory": memory}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {
            "short": self.short.init_state(batch, dtype),
            "branch": self.branch.init_state(batch, dtype),
            "filter": self.filter.init_state(batch, dtype),
            "memory": jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.values), wide(dtype)),
        }


class Simple(nnx.Module):
    """A learned bias for every distance. What a causal model never reads of the published table is left out."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.table = param(rngs, jax.nn.initializers.normal(0.02), (cfg.heads, cfg.chunk), ("heads", "distance"))

    def __call__(self) -> Float[Array, "H C"]:
        return self.table[...]


class Rotary(nnx.Module):
    """rope(a, t)·rope(b, s), which depends on t - s alone."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        normal, axes = jax.nn.initializers.normal(0.02), ("heads", "state_k")
        self.chunk, self.theta = cfg.chunk, cfg.theta
        self.a = param(rngs, normal, (cfg.heads, cfg.key_dim), axes)
        self.b = param(rngs, normal, (cfg.heads, cfg.key_dim), axes)

    def __call__(self) -> Float[Array, "H C"]:
        a = jnp.broadcast_to(self.a[...], (1, self.chunk, *self.a.shape))
        turned = rope(a, jnp.arange(self.chunk)[None], self.theta)
        return einsum("chk,hk->hc", turned[0], self.b[...])


class Unbiased(nnx.Module):
    """No bias of positions."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        del cfg, rngs

    def __call__(self) -> None:
        return None


class Same(nnx.Module):
    """The identity in the place of an output projection, [B,T,1,D] -> [B,T,D]."""

    def __init__(self, shape_in: tuple[int, ...]):
        self.shape_in = shape_in

    def __call__(self, z: Float[Array, "B T 1 D"]) -> Float[Array, "B T D"]:
        return z[:, :, 0]


BIASES: dict[Bias, Any] = {"none": Unbiased, "simple": Simple, "rotary": Rotary}
