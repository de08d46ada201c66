"""Mega: gated attention over moving averages (arXiv 2209.10655).

    m = silu(N^-½ Σ_n γ_n h_n + ω n_t),   h_n = (1 - p_n a_n) h_n + p_n β_n n_t,   p = σ(δ), a = σ(α), for every channel
    z = silu(W_z m + b),   q = g_q z + c_q,   k = g_k z + c_k,   v = silu(W_v n + b),   r = silu(W_r m + b)
    y = σ(W_u m + b) ⊙ (silu(W_s m + b + W_h (r ⊙ attention(q, k, v)) + b) - x)

n is what the mixer reads, x the residual stream to which y is added: together they are a highway. Attention begins anew
with every chunk, which counts from the start of the document; beyond it only the averages remember.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn import kv_cache
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.nn.position import rope
from hydrax.ops.softmax.relative import Weights
from hydrax.parallel.sequence import moving_average, relative_attention

LARGEST = 1 - 1e-6
"""Of p a: powers of a decay of 0 are no numbers."""

Bias = Literal["none", "simple", "rotary"]


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 1  # of the attention; Mega has one
    key_dim: Positive | None = None  # K per head; d_model / 4 over the heads if None
    inner_dim: Positive | None = None  # width of v and r, all heads together; 2 d_model if None
    chunk: Positive = 2048  # tokens per chunk of the attention
    bias: Bias = "simple"  # of scores, by distance: a learned number for each, or the product of two turned vectors
    theta: PositiveFloat = 10000.0  # of these
    weights: Weights = "softmax"  # what scores become
    modes: Positive = 16  # N averages of each channel
    chunk_size: Positive | None = None  # tokens per chunk of the averages' training form
    width: Positive | None = None  # channels of the averages: d_model, which is filled in

    def fill(self, d_model: int) -> "Config":
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

    def visible(self, n: int) -> float:
        """Mean number of keys that a query of a document of n tokens sees."""
        chunks, rest = divmod(n, self.chunk)
        return (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / (2 * n)


class Mega(Mixer):
    """The state holds the averages, and keys and values of the chunk. Nothing follows the highway: z is y."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.values
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        self.averages = Averages(d_model, cfg.modes, rngs=rngs)
        self.z = Linear(d_model, (H, K), axes=("embed", *keys), bias=True, rngs=rngs)
        self.gain = param(rngs, jax.nn.initializers.normal(0.02), (2, H, K), ("kinds", *keys))
        self.shift = param(rngs, jax.nn.initializers.zeros, (2, H, K), ("kinds", *keys))
        self.bias = BIASES[cfg.bias](cfg, rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        self.read = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        self.update = Linear(d_model, d_model, axes=("embed", "embed_out"), bias=True, rngs=rngs)
        self.skip = Linear(d_model, d_model, axes=("embed", "embed_out"), bias=True, rngs=rngs)
        self.h = Linear((H, V), d_model, axes=(*values, "embed"), bias=True, rngs=rngs)
        self.project = Same((1, d_model))

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("memory", "cache")) if state is None else state
        m, memory = self.averages(x, ctx, past["memory"], self.cfg.chunk_size)
        v = ctx.tap("values", jax.nn.silu(self.v(x)))
        o, cache = self._attend(m, v, ctx, past["cache"])
        read = ctx.tap("reads", o) * jax.nn.silu(self.read(m))
        candidate = jax.nn.silu(self.skip(m) + self.h(read))
        y = jax.nn.sigmoid(self.update(m)) * (candidate - (x if ctx.residual is None else ctx.residual))
        return y[:, :, None].astype(x.dtype), {"memory": memory, "cache": cache}

    def _attend(
        self, m: Array, v: Array, ctx: Context, cache: kv_cache.Cache | None
    ) -> tuple[Array, kv_cache.Cache | None]:
        z = fp32(jax.nn.silu(self.z(m)))
        q, k = ((z * self.gain[i] + self.shift[i]).astype(m.dtype) for i in (0, 1))
        where: dict[str, Any] = {"positions": ctx.positions, "segment_ids": ctx.segment_ids}
        keys = kv_cache.collect(k, v, cache, **where)
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
        return o, kv_cache.write(cache, k, v, **where, window=self.cfg.chunk)

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        cache = kv_cache.empty(batch, min(max_len, cfg.chunk), cfg.heads, cfg.key_dim, cfg.values, dtype)
        return {"memory": jnp.zeros((batch, cfg.width, cfg.modes), wide(dtype)), "cache": cache}


class Averages(nnx.Module):
    """m above, in the dtype of n, and the averages h [B,D,N] in fp32."""

    def __init__(self, width: int, modes: int, *, rngs: nnx.Rngs):
        shape, axes, normal = (width, modes), ("inner", "ema"), jax.nn.initializers.normal
        self.delta = param(rngs, normal(0.2), shape, axes)
        self.alpha = param(rngs, normal(0.2), shape, axes)
        self.beta = param(rngs, _alternating, shape, axes)
        self.gamma = param(rngs, normal(1.0), shape, axes)
        self.omega = param(rngs, normal(1.0), (width,), ("inner",))

    def __call__(
        self, n: Float[Array, "B T D"], ctx: Context, state: Array | None, chunk_size: int | None
    ) -> tuple[Float[Array, "B T D"], Array]:
        p, a = jax.nn.sigmoid(self.delta[...]), jax.nn.sigmoid(self.alpha[...])
        e, h = moving_average(
            fp32(jnp.asarray(n)),
            jnp.log1p(-jnp.minimum(p * a, LARGEST)),
            p * self.beta[...],
            self.gamma[...] * self.gamma.shape[1] ** -0.5,
            initial_state=state,
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=chunk_size,
        )
        return jax.nn.silu(e + self.omega[...] * n).astype(n.dtype), h


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


def _alternating(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """+1, -1, +1, ... along the averages of a channel, and a little noise."""
    signs = 1 - 2 * (jnp.arange(shape[-1]) % 2)
    return (signs + 0.02 * jax.random.normal(key, shape)).astype(dtype)
