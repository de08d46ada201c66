"""HGRN (arXiv 2311.04823):  h_t = λ_t ⊙ h_{t-1} + (1 - λ_t) ⊙ c_t,   λ_t >= γ, a bound that grows with depth."""

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.parallel.sequence import linear_scan


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    value_dim: Positive | None = None  # V, channels of the state; d_model if None
    complex: bool = False  # the first published form: every channel is complex and turns by a learned angle per token
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, value_dim=self.value_dim or d_model)


class HGRN(Mixer):
    """λ = γ + (1 - γ) σ(W_f x), c = silu(W_i x);  y = W_o (RMSNorm(h) ⊙ silu(W_g x)).

    Complex: λ e^{iθ} in the place of the decay λ, real and imaginary parts of c side by side, and LayerNorm over those
    of h.
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        parts, axes = (2 if cfg.complex else 1, cfg.value_dim), ("parts", "inner")
        self.input = Linear(d_model, parts, axes=("embed", *axes), rngs=rngs)
        self.forget = Linear(d_model, cfg.value_dim, axes=("embed", "inner"), rngs=rngs)
        self.gate = Linear(d_model, parts, axes=("embed", *axes), rngs=rngs)
        self.norm = RMSNorm(parts, axes=axes, eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear(parts, d_model, axes=(*axes, "embed"), residual=True, rngs=rngs)
        if cfg.complex:
            self.theta = param(rngs, _angles, (cfg.value_dim,), ("inner",))
            self.norm_bias = param(rngs, jax.nn.initializers.zeros, parts, axes)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        # Sums and products of positive numbers: λ near 0 and 1 - λ near 0 keep their digits, as do their gradients. In
        # log space a bound of 0 would be log 0, and 1 - λ a difference.
        f, floor = fp32(self.forget(x)), ctx.lower_bound(self.cfg.value_dim)
        keep = floor + (1 - floor) * jax.nn.sigmoid(f)
        write = (1 - floor) * jax.nn.sigmoid(-f) * ctx.tap("values", _joined(fp32(jax.nn.silu(self.input(x)))))
        if self.cfg.complex:
            keep = keep * jax.lax.complex(jnp.cos(self.theta[...]), jnp.sin(self.theta[...]))
        h, memory = linear_scan(
            keep,
            write,
            initial_state=None if state is None else _joined(state["memory"]),
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        h = self._normalised(_parts(ctx.tap("reads", h)))
        return h.astype(x.dtype) * jax.nn.silu(self.gate(x)), {"memory": _parts(memory)}

    def _normalised(self, h: Array) -> Array:
        if not self.cfg.complex:
            return self.norm(h)
        return self.norm(h - h.mean((-2, -1), keepdims=True)) + self.norm_bias[...]

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, 2 if self.cfg.complex else 1, self.cfg.value_dim), wide(dtype))}


def _joined(parts: Array) -> Array:
    """[...,1,V] -> [...,V]; [...,2,V] -> complex [...,V]."""
    return parts[..., 0, :] if parts.shape[-2] == 1 else jax.lax.complex(parts[..., 0, :], parts[..., 1, :])


def _parts(h: Array) -> Array:
    """The inverse of `_joined`."""
    return jnp.stack([h.real, h.imag], axis=-2) if jnp.iscomplexobj(h) else h[..., None, :]


def _angles(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """10000^(-2d/V) for channel d."""
    (V,) = shape
    return jnp.exp(-2 * math.log(10000) / V * jnp.arange(V, dtype=dtype))
