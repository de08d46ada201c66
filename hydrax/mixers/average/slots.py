"""Mixers of running softmax averages: `aaren`, `agent`, `efficient`. They have M slots per head, each the average of
the values so far under weights of its own, and a mixture of the slots for every token.

    o_t = Σ_m p_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm}

Weights of values sum to 1 for every token if the p do. What is read does not depend on the order of the past: only a
convolution or another mixer before it can tell one order from another.
"""

import dataclasses
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, NonNegative, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.parallel.sequence import slot_softmax


@dataclasses.dataclass(frozen=True)
class SlotConfig(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> Self:
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class SlotAverages(Mixer):
    """y = W_o o; the state holds, per slot, the largest score, rounded to an integer, and both sums over it.

    Subclasses say what p and s are, with M = `slots`. With `width`, o_t also gets a causal convolution of the values.
    """

    def __init__(self, d_model: int, cfg: Any, slots: int, *, rngs: nnx.Rngs, width: int = 0):
        self.cfg, self.slots = cfg, slots
        H, V = cfg.heads, cfg.value_dim
        axes = ("heads", "state_v")
        self.v = Linear(d_model, (H, V), axes=("embed", *axes), rngs=rngs)
        self.v_conv = ShortConv((H, V), width, axes=axes, activation=None, rngs=rngs) if width else None
        self.project = Linear((H, V), d_model, axes=(*axes, "embed"), residual=True, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Float[Array, "B T H M"], Float[Array, "B T H M"]]:
        """p and s, in fp32."""
        raise NotImplementedError

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["memory"]
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        p, s = self.weights(x, ctx)
        v = ctx.tap("values", self.v(x))
        o, (top, numerator, denominator) = slot_softmax(
            p,
            s,
            v,
            initial_state=None if past is None else (state["max"], past["numerator"], past["denominator"]),
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        o, new = ctx.tap("reads", o), {"max": top, "memory": {"numerator": numerator, "denominator": denominator}}
        if self.v_conv is None:
            return o, new
        near, tail = self.v_conv(v, None if state is None else state["v"], **facts)
        return o + near, {**new, "v": tail}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        slots = (batch, self.cfg.heads, self.slots)
        sums = {"numerator": (*slots, self.cfg.value_dim), "denominator": slots}
        memory = {name: jnp.zeros(shape, wide(dtype)) for name, shape in sums.items()}
        state = {"max": jnp.zeros(slots, jnp.int32), "memory": memory}
        return state if self.v_conv is None else {**state, "v": self.v_conv.init_state(batch, dtype)}


@dataclasses.dataclass(frozen=True)
class AarenConfig(SlotConfig):
    slots: Positive = 1  # M learned queries per head, mixed by each token if more than one


class Aaren(SlotAverages):
    """Attention whose queries are parameters, as a recurrence (Aaren, arXiv 2405.13956):

    o_t = Σ_m p_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm},      s_jm = K^-½ a_m·k_j,      p_t = softmax(W_r x_t)

    The paper has one query a per head, so that p = 1.
    """

    Config: TypeAlias = AarenConfig

    def __init__(self, d_model: int, cfg: AarenConfig, *, rngs: nnx.Rngs):
        H, K, M = cfg.heads, cfg.key_dim, cfg.slots
        self.query = param(rngs, jax.nn.initializers.normal(K**-0.5), (H, M, K), ("heads", "slots", "state_k"))
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.read = Linear(d_model, (H, M), axes=("embed", "heads", "slots"), rngs=rngs) if M > 1 else None
        super().__init__(d_model, cfg, M, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        k = fp32(ctx.tap("keys", self.k(x)))
        s = einsum("hmk,bthk->bthm", fp32(self.query[...]), k) * self.cfg.key_dim**-0.5
        return jnp.ones_like(s) if self.read is None else jax.nn.softmax(fp32(self.read(x)), axis=-1), s


@dataclasses.dataclass(frozen=True)
class AgentConfig(SlotConfig):
    agents: Positive = 16  # M per head
    conv_width: NonNegative = 3  # taps of the convolution of the values; 0: none


class Agent(SlotAverages):
    """Agent attention (arXiv 2312.08874), causal form: M learned agents read the past, and tokens read the agents.

        o_t = Σ_m softmax_m(K^-½ q_t·a_m) Σ_{j<=t} softmax_j(K^-½ a_m·k_j) v_j + conv(v)_t

    The paper is about images: its agents are the pooled queries of all tokens, which here would look ahead. Agents
    are parameters instead, as the queries of `aaren` are, and the causal form is hydrax's own. The convolution of the
    values (3 taps) is the paper's, in one dimension.
    """

    Config: TypeAlias = AgentConfig

    def __init__(self, d_model: int, cfg: AgentConfig, *, rngs: nnx.Rngs):
        H, K, M = cfg.heads, cfg.key_dim, cfg.agents
        self.agents = param(rngs, jax.nn.initializers.normal(0.02), (H, M, K), ("heads", "slots", "state_k"))
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        super().__init__(d_model, cfg, M, rngs=rngs, width=cfg.conv_width)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        a = fp32(self.agents[...]) * self.cfg.key_dim**-0.5
        q, k = fp32(self.q(x)), fp32(ctx.tap("keys", self.k(x)))
        logits, s = (einsum("hmk,bthk->bthm", a, y) for y in (q, k))
        return jax.nn.softmax(logits, axis=-1), s


@dataclasses.dataclass(frozen=True)
class EfficientConfig(SlotConfig):
    key_norm: bool = True  # RMSNorm of the keys
    norm_eps: PositiveFloat = 1e-6  # of that


class Efficient(SlotAverages):
    """Efficient attention (arXiv 1812.01243), causal form: every key feature averages the past by a softmax of its own.

        o_t = Σ_n softmax_n(q_t)_n Σ_{j<=t} softmax_j(k_jn) v_j

    In the paper the softmax of a key feature is over the whole input; here it runs over the past, which is hydrax's own
    form. Keys are normed to the length √K, or one outlier would fill a slot for the rest of the document.
    """

    Config: TypeAlias = EfficientConfig

    def __init__(self, d_model: int, cfg: EfficientConfig, *, rngs: nnx.Rngs):
        shape, axes = (cfg.heads, cfg.key_dim), ("heads", "state_k")
        self.q = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.k = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.k_norm = RMSNorm(cfg.key_dim, axes=axes[1:], eps=cfg.norm_eps, rngs=rngs) if cfg.key_norm else None
        super().__init__(d_model, cfg, cfg.key_dim, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        k = ctx.tap("keys", self.k(x))
        return jax.nn.softmax(fp32(self.q(x)), axis=-1), fp32(k if self.k_norm is None else self.k_norm(k))
