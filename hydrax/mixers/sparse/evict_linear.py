"""An exact window, and a matrix state of what has left it: token j enters the state when token j + window is read.

    o^w_t = Σ_{t-w<j<=t} softmax_j(K^-½ q_t·k_j) v_j,      S_t = the state of tokens j <= t - w,  o^s_t = S_tᵀ φ(q_t)
    sum:    z = a_h RMSNorm(o^w) + b_h RMSNorm(o^s)
    joint:  z = (Σ_w e^s v + S_tᵀφ(q)) / (Σ_w e^s + z_tᵀφ(q)),  s = K^-½ q_t·k_j,  z_t = Σ φ(k_j)

hydrax's own form of a window whose evicted keys feed a linear state; `joint` weighs as Lizard does (arXiv 2507.09025).
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import features, kv_cache
from hydrax.nn.decay import StepDecay
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm, l2_norm
from hydrax.nn.param import param
from hydrax.nn.position import Rope
from hydrax.ops.softmax import merge
from hydrax.ops.sparse import leaving
from hydrax.parallel.sequence import delta_rule, linear_attention
from hydrax.parallel.shards import in_order


class Memory(NamedTuple):
    """How a state takes a token: by addition or by the delta rule, after it forgot per head, per key channel or not."""

    delta: bool
    decay: Literal["none", "scalar", "vector"]


MEMORIES = {
    "linear_attn": Memory(False, "none"),
    "mamba2": Memory(False, "scalar"),
    "gla": Memory(False, "vector"),
    "deltanet": Memory(True, "none"),
    "gdn": Memory(True, "scalar"),
    "kda": Memory(True, "vector"),
}
"""The mixers whose op the state is."""


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; key_dim if None
    window: Positive = 128  # visible keys, the query's own included
    memory: Literal["linear_attn", "mamba2", "gla", "deltanet", "gdn", "kda"] = "gdn"  # the op of the evicted rest
    fusion: Literal["sum", "joint"] = "sum"  # both normed and added, or one denominator (additive memories)
    feature_map: features.Name | None = None  # φ of the state's queries and keys; elu1, or identity if delta, if None
    rope: Rope = dataclasses.field(default_factory=Rope)  # of queries and keys, in the window and in the state
    gate_rank: Positive = 16  # low-rank width of a decay per key channel
    norm_eps: PositiveFloat = 1e-5  # of the norms of `sum`
    chunk_size: ChunkSize | None = None  # tokens per chunk of the state's training form

    def __post_init__(self) -> None:
        if self.fusion != "joint":
            return
        if MEMORIES[self.memory].delta:
            additive = ", ".join(name for name, row in MEMORIES.items() if not row.delta)
            raise ConfigError("fusion", "joint", f"{self.memory} can weigh below 0: expected sum, or memory {additive}")
        if not features.TABLE[self.phi].nonnegative:
            usable = ", ".join(name for name, row in features.TABLE.items() if row.nonnegative)
            raise ConfigError("feature_map", self.phi, f"fusion = joint divides by a sum: expected one of {usable}")

    def fill(self, d_model: int) -> "Config":
        K = self.key_dim or per_head(d_model, self.heads)
        return dataclasses.replace(self, key_dim=K, value_dim=self.value_dim or K, feature_map=self.phi)

    @property
    def phi(self) -> str:
        """The feature map."""
        return self.feature_map or ("identity" if MEMORIES[self.memory].delta else "elu1")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, features of a key, and columns: the values and, if they divide, z."""
        width = features.TABLE[self.phi].width(self.key_dim)
        return self.heads, width, self.value_dim + (self.fusion == "joint")

    @property
    def gates(self) -> dict[str, tuple[int, ...]]:
        """What a token brings beside key and value."""
        delta, decay = MEMORIES[self.memory]
        shapes: dict[str, tuple[int, ...]] = {"scalar": (self.heads,), "vector": self.state_shape[:2]}
        gates = {"log_decay": shapes[decay]} if decay in shapes else {}
        return gates | ({"beta": (self.heads,)} if delta else {})


class EvictLinear(Mixer):
    """y = W_o z. The state: a ring of `window` keys, values and gates, and the matrix of all that left it."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, F = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.state_shape[1]
        make, decay = features.TABLE[cfg.phi].make, MEMORIES[cfg.memory].decay
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.q_map, self.k_map = make(K, rngs), make(K, rngs)
        self.beta = Linear(d_model, H, axes=("embed", "heads"), rngs=rngs) if MEMORIES[cfg.memory].delta else None
        low_rank, rank = decay == "vector", cfg.gate_rank
        self.step_down = Linear(d_model, rank, axes=("embed", "rank"), rngs=rngs) if low_rank else None
        steps = {
            "none": lambda: None,
            "scalar": lambda: Linear(d_model, H, axes=("embed", "heads"), rngs=rngs),
            "vector": lambda: Linear(rank, (H, F), axes=("rank", "heads", "state_k"), rngs=rngs),
        }
        self.step_size = steps[decay]()
        key_dim = F if low_rank else None
        # rates far below those of a mixer on its own: what has left the window is to be remembered over many windows
        self.decay = None if decay == "none" else StepDecay(H, key_dim, rates=(0.01, 1.0), rngs=rngs)
        added, ones = cfg.fusion == "sum", jax.nn.initializers.ones
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, affine=False, rngs=rngs)
        self.gains = param(rngs, ones, (H, 2), ("heads", "parts")) if added else None
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg, joint = self.cfg, self.cfg.fusion == "joint"
        q, k = (cfg.rope.turn(a, ctx.positions) for a in (self.q(x), ctx.tap("keys", self.k(x))))
        v, gates = ctx.tap("values", self.v(x)), self._gates(x)
        facts = ctx.places
        past = {"ring": None, "memory": None} if state is None else state
        keys = kv_cache.collect(k, v, past["ring"], **facts)
        options: dict[str, Any] = {"window": cfg.window, "shards": ctx.shards, "impl": ctx.impl}
        near: Any = kv_cache.attend(q, keys, return_lse=joint, **options, **facts)
        far, memory = self._recall(q, {"k": k, "v": v, **gates}, ctx, past)
        z = self._joined(near, far, ctx) if joint else self._added(near, far, ctx)
        ring = kv_cache.write(past["ring"], k, v, **facts, window=cfg.window, **gates)
        return z, {"ring": ring, "memory": memory}

    def _gates(self, x: Array) -> dict[str, Any]:
        """Log-decay and write strength of every token, fp32."""
        gates = {}
        if self.decay is not None:
            gates["log_decay"] = self.decay(self.step_size(x if self.step_down is None else self.step_down(x)))[0]
        if self.beta is not None:
            gates["beta"] = jax.nn.sigmoid(fp32(self.beta(x)))
        return gates

    def _recall(self, q: Array, new: dict[str, Array], ctx: Context, past: PyTree) -> tuple[Array, Array]:
        """What the state gives to the queries [B,T,H,V], or with a column for z, and the state."""
        cfg, delta = self.cfg, MEMORIES[self.cfg.memory].delta

        def left(new: dict[str, Array], positions: Array, ids: Array | None) -> tuple[dict[str, Array], Array]:
            return leaving(new, past["ring"], window=cfg.window, positions=positions, segment_ids=ids)

        old, there = in_order(left, ctx.shards, new, ctx.positions, ctx.segment_ids)
        q, k, v = self.q_map(q), self.k_map(old.pop("k")), old.pop("v")
        k = jnp.where(there[..., None, None], k, 0)  # φ(0) need not be 0
        if delta:
            q, k = (l2_norm(a, impl=ctx.impl) for a in (q, k))
        if cfg.fusion == "joint":
            v = features.with_ones(v)
        return (delta_rule if delta else linear_attention)(
            q,
            k,
            v,
            **old,
            scale=1.0 if cfg.fusion == "joint" else None,
            initial_state=past["memory"],
            chunk_size=cfg.chunk_size,
            **ctx.rows,
        )

    def _added(self, near: Array, far: Array, ctx: Context) -> Array:
        """a_h RMSNorm(near) + b_h RMSNorm(far)."""
        both = jnp.stack([near, far.astype(near.dtype)], axis=3)
        both = ctx.tap("reads", both.reshape(*near.shape[:2], -1, near.shape[3])).reshape(both.shape)
        return (fp32(self.norm(both)) * self.gains[...][..., None]).sum(3).astype(near.dtype)

    def _joined(self, near: tuple[Array, Array], far: Array, ctx: Context) -> Array:
        """One average over the keys of the window and those of the state."""
        weight = fp32(far[..., -1])
        some = weight > 0
        lse = jnp.where(some, jnp.log(jnp.where(some, weight, 1)), -jnp.inf)
        o = fp32(far[..., :-1]) / jnp.where(some, weight, 1)[..., None]
        return ctx.tap("reads", merge(near, (o, lse))[0])

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        slots = min(max_len, cfg.window)
        gates = {name: jnp.zeros((batch, slots, *shape), wide(dtype)) for name, shape in cfg.gates.items()}
        ring = kv_cache.empty(batch, slots, cfg.heads, cfg.key_dim, cfg.value_dim, dtype)
        return {"ring": ring | gates, "memory": jnp.zeros((batch, *cfg.state_shape), wide(dtype))}
