"""No mixing at all:  y_t = W_o (silu(W_z x_t) ⊙ W_u x_t), the ablation that shows what a layer's attention adds.

As many parameters as softmax attention, no state, no other token (arXiv 2510.11602).
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    inner_dim: Positive | None = None  # inner width; 4 d_model / 3 to the nearest multiple of 8 if None

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, inner_dim=self.inner_dim or 8 * max(1, round(d_model / 6)))


class MLP(Mixer):
    """One head as wide as the inner layer."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.gate = Linear(d_model, cfg.inner_dim, axes=("embed", "mlp"), rngs=rngs)
        self.up = Linear(d_model, cfg.inner_dim, axes=("embed", "mlp"), rngs=rngs)
        self.project = Linear(cfg.inner_dim, d_model, axes=("mlp", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        return (jax.nn.silu(self.gate(x)) * self.up(x))[:, :, None], state

    def out(self, z: Array) -> Array:
        return self.project(z.reshape(*z.shape[:2], -1))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {}
