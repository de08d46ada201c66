"""Lightning attention (arXiv 2405.17381):  S_t = exp(g) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t,   with constant g."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.nn.position import Rope, lrpe, lrpe_phases
from hydrax.parallel.sequence import linear_attention

ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}

TNL = {"value_activation": "none", "norm_affine": False, "gate_activation": "none"}


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 8
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; key_dim if None
    activation: Literal["none", "silu"] = "silu"  # of q and k
    value_activation: Literal["none", "silu"] = "silu"  # of v
    qk_norm: Literal["none", "head"] = "none"  # RMSNorm of q and k over K, before the activation
    position: Literal["none", "rope", "lrpe"] = "none"  # of q and k, after it; lrpe is learned and doubles K
    rope: Rope = dataclasses.field(default_factory=Rope)  # where position = rope
    slope_rule: Literal["layerwise", "uniform"] = "layerwise"  # decay falling to 0 in the last layer, or equal in all
    scale: PositiveFloat | None = 1.0  # factor on the output; K^-½ if None
    norm_affine: bool = True  # a learned weight in the output norm
    gate_activation: Literal["none", "sigmoid"] = "sigmoid"  # of the output gate
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "minimax": {},  # the defaults
        "sala": {
            "activation": "none",
            "value_activation": "none",
            "qk_norm": "head",
            "position": "rope",
            "slope_rule": "uniform",
            "scale": None,
        },
        "tnl": TNL,
        "tnl_first": {**TNL, "position": "lrpe"},  # the first layer of TNL
    }

    def __post_init__(self) -> None:
        if self.position != "rope" and self.rope != Rope():
            raise ConfigError("rope", self.rope, f"needs position = rope, and position is {self.position}")

    def fill(self, d_model: int) -> "Config":
        width = self.key_dim or per_head(d_model, self.heads)
        scale = width**-0.5 if self.scale is None else self.scale
        return dataclasses.replace(self, key_dim=width, value_dim=self.value_dim or width, scale=scale)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, channels of a key, values."""
        return self.heads, self.key_dim * (2 if self.position == "lrpe" else 1), self.value_dim


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
        self.norm = RMSNorm((H, V), axes=("heads", "state_v"), affine=cfg.norm_affine, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)
        normed = cfg.qk_norm == "head"
        self.q_norm, self.k_norm = (RMSNorm(K, axes=("state_k",), rngs=rngs) if normed else None for _ in range(2))
        learned = cfg.position == "lrpe"
        self.phases = param(rngs, lrpe_phases, (H, K), ("heads", "state_k")) if learned else None

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        o, memory = linear_attention(
            self._placed(self.q(x), self.q_norm, ctx),
            self._placed(ctx.tap("keys", self.k(x)), self.k_norm, ctx),
            ctx.tap("values", ACTIVATIONS[cfg.value_activation](self.v(x))),
            log_decay(cfg.heads, cfg.slope_rule, ctx.layer_index, ctx.depth),
            scale=cfg.scale,
            initial_state=None if state is None else state["memory"],
            chunk_size=cfg.chunk_size,
            **ctx.rows,
        )
        gate = ACTIVATIONS[cfg.gate_activation](self.gate(x))
        return self.norm(ctx.tap("reads", o)) * gate, {"memory": memory}

    def _placed(self, x: Array, norm: RMSNorm | None, ctx: Context) -> Array:
        """Queries or keys as they meet the memory: normed, activated, at their positions."""
        x = ACTIVATIONS[self.cfg.activation](x if norm is None else norm(x))
        if self.cfg.position == "rope":
            return self.cfg.rope.turn(x, ctx.positions)
        return x if self.phases is None else lrpe(x, ctx.positions, self.phases[...])

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, *self.cfg.state_shape), wide(dtype))}


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
