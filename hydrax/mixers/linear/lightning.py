"""Lightning attention (arXiv 2405.17381):  S_t = exp(g) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t,   with constant g."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import Positive, PositiveFloat
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.ops.linear import linear_attention

ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 8
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; key_dim if None
    activation: Literal["none", "silu"] = "silu"  # of q, k and v
    slope_rule: Literal["layerwise", "uniform"] = "layerwise"  # decay falling to 0 in the last layer, or equal in all
    scale: PositiveFloat = 1.0  # factor on the output
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        width = self.key_dim or per_head(d_model, self.heads)
        return dataclasses.replace(self, key_dim=width, value_dim=self.value_dim or width)


class Lightning(Mixer):
    """g_h = -s_h (1 - l/(L-1) + 1e-5) for layer l of L, ALiBi slopes s;  y = W_o (RMSNorm_HV(o) ⊙ σ(W_g x))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.gate = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.norm = RMSNorm((H, V), axes=("heads", "state_v"), rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        act = ACTIVATIONS[self.cfg.activation]
        o, memory = linear_attention(
            act(self.q(x)),
            act(self.k(x)),
            act(self.v(x)),
            log_decay(self.cfg.heads, self.cfg.slope_rule, ctx.layer_index, ctx.depth),
            scale=self.cfg.scale,
            initial_state=None if state is None else state["memory"],
            segment_ids=ctx.segment_ids,
            impl=ctx.impl,
            chunk_size=self.cfg.chunk_size,
        )
        return self.norm(o) * jax.nn.sigmoid(self.gate(x)), {"memory": memory}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {"memory": jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), jnp.float32)}


def log_decay(heads: int, rule: str, layer_index: int | Array, depth: int) -> Array:
    """g [H] of one layer; "uniform" is the first layer's decay everywhere."""
    layer = layer_index if rule == "layerwise" else 0
    return -jnp.asarray(slopes(heads), jnp.float32) * (1 - layer / max(depth - 1, 1) + 1e-5)


def slopes(heads: int) -> np.ndarray:
    """ALiBi slopes (arXiv 2108.12409): 2^(-8h/H) for h = 1 .. H; beyond a power of two, every other one of the next."""
    power = 1 << (heads.bit_length() - 1)

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8 * np.arange(1, n + 1) / n)

    return np.concatenate([geometric(power), geometric(2 * power)[::2][: heads - power]])
