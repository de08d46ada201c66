"""Mixture of experts: every token is served by its best k of E feed-forward networks.

    z = h W_r,   s = softmax(z) or σ(z),   chosen = the k largest of s + b,   y = Σ_chosen g_e FFN_e(x) + FFN_shared(x)

g_e is s_e, divided by the sum over the chosen if `renorm`, times `scale`. h is x itself, another tensor handed in
(SmallThinker), or with chunk granularity the mean over the chunk before. Router, gates and statistics are fp32.

Papers: 2101.03961 (balance loss, capacity), 2202.08906 (z-loss), 2211.15841 (dropless), 2408.15664 (selection bias),
2412.19437 (sigmoid router, groups, shared experts).
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.nn.ffn import FFN, FOLDED, GLU, KINDS, activated, default_width
from hydrax.nn.linear import Linear
from hydrax.nn.param import param, summed
from hydrax.ops.scan import linear_scan
from hydrax.parallel.experts import Weights, by_tokens, mixture

State = dict[str, Array]

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
"""Router -> what becomes of its logits [...,E]."""

EXPERTS = tuple(kind for kind in KINDS if kind not in FOLDED)
"""Kinds of feed-forward networks that can be experts."""

TINY = 1e-20
"""Keeps sums of scores that all underflow off zero."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    experts: Positive = 8  # E
    top_k: Positive = 2  # experts per token
    width: Positive | None = None  # inner width F of one expert; that of a dense FFN if None
    kind: str = "swiglu"  # of every expert, see `EXPERTS`
    router: Literal["softmax", "sigmoid"] = "softmax"  # from scores to gates
    renorm: bool = True  # gates of the chosen experts sum to 1
    scale: PositiveFloat = 1.0  # factor on the gates
    bias: bool = False  # a bias that balances the selection and enters no gate
    shared: NonNegative = 0  # experts that serve every token: one FFN of width shared · F
    shared_gate: bool = False  # σ(x w) on them
    groups: Positive = 1  # of neighbouring experts; a group's score is the sum of its two best
    top_groups: Positive = 1  # groups that a token may choose its experts from
    capacity: PositiveFloat | None = None  # see `MoE`; None: nothing is dropped
    balance: NonNegativeFloat = 0.01  # weight of E Σ_e f_e P_e, 1 if uniform
    z_loss: NonNegativeFloat = 0.001  # weight of lse(z)², for the softmax router
    granularity: Literal["token", "chunk"] = "token"  # what is routed as one
    chunk: Positive = 32  # tokens of a chunk
    router_at: Literal["ffn", "pre_attn"] = "ffn"  # where h comes from: the input of the FFN or of the layer's mixer

    def __post_init__(self) -> None:
        reach = self.experts // self.groups * self.top_groups
        alone = self.top_k == 1 and self.experts > 1
        checks = (
            ("kind", self.kind in EXPERTS, f"expected one of {', '.join(EXPERTS)}"),
            ("groups", self.experts % self.groups == 0, f"expected a divisor of experts = {self.experts}"),
            ("top_groups", self.top_groups <= self.groups, f"expected at most groups = {self.groups}"),
            ("top_k", self.top_k <= reach, f"expected at most {reach}, the experts a token can choose from"),
            ("shared_gate", self.shared > 0 or not self.shared_gate, "expected False where shared = 0"),
            ("renorm", not (self.renorm and alone), "expected False where top_k = 1: a gate of 1 teaches no router"),
        )
        for key, holds, allowed in checks:
            if not holds:
                raise ConfigError(key, getattr(self, key), allowed)

    def flops(self, d_model: int) -> float:
        """Forward FLOPs per token of the router; those of experts follow from their sizes."""
        return 2 * d_model * self.experts


def state_bytes(cfg: MoEConfig, d_model: int, itemsize: int) -> int:
    """Bytes of one row's state at `d_model`, with activations of `itemsize` bytes."""
    return 2 * 4 * cfg.experts if cfg.granularity == "chunk" else 0


AXES = {
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}
"""The weights of experts, and their logical axes."""


class Experts(nnx.Module):
    """E feed-forward networks of one kind, initialised as `FFN`: weights [E,D,F] and [E,F,D]."""

    def __init__(self, experts: int, d_model: int, width: int, kind: str, *, rngs: nnx.Rngs):
        def weight(name: str) -> nnx.Param:
            sizes = {"experts": experts, "embed": d_model, "mlp": width}
            return param(
                rngs,
                jax.nn.initializers.lecun_normal(batch_axis=(0,)),
                tuple(sizes[axis] for axis in AXES[name]),
                AXES[name],
                decay=True,
                matrix=((-2,), (-1,)),
                cast=True,
                residual=name == "down",
            )

        self.kind = kind
        self.gate = weight("gate") if kind in GLU else None
        self.up = weight("up")
        self.down = weight("down")

    def __call__(self, x: Array, ids: Array, gates: Array, capacity: int | None) -> Float[Array, "B T D"]:
        """See `parallel.experts.mixture`."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        weights = {name: weight[...] for name, weight in named.items() if weight is not None}
        return mixture(functools.partial(_ffns, self.kind), weights, x, ids, gates, axes=AXES, capacity=capacity)


class MoE(nnx.Module):
    """The layer above, y [B,T,D] of x [B,T,D], beside its weighted losses.

    "balance" is `cfg.balance` · E Σ_e f_e P_e, f_e the share of assignments (Σ f = 1) and P_e the mean of s_e / Σ s;
    "router_z" is `cfg.z_loss` · mean lse(z)². Both are over the real tokens of the call; padding counts nowhere.

    The gradient of the selection bias b is load_e - mean load in (token, choice) pairs, whatever the loss: a plain sum
    over tokens, which adds up over microbatches and devices. An optimiser moves b by -rate · sign of it.

    `capacity`: an expert takes the first ⌈capacity · k · T / E⌉ of its tokens in each row. It adds nothing to later
    ones, and their other gates do not grow. Rows do not influence each other, nor the future the past, but the
    documents packed in one row compete, and what is dropped depends on the T of the call: decoding drops nothing.

    `granularity="chunk"`: the tokens of chunk c of a document, `chunk` of them, share the experts and gates that the
    mean of h over chunk c - 1 chooses, those of chunk 0 what a learned vector chooses. The state has the sum of the
    logits over the present chunk so far, and the logits it is routed by (z is linear in h), fp32 [B,E] each.
    """

    def __init__(self, d_model: int, cfg: MoEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        E, F = cfg.experts, cfg.width or default_width(cfg.kind, d_model)
        normal, zeros = jax.nn.initializers.normal(0.02), jax.nn.initializers.zeros
        self.router = param(rngs, normal, (d_model, E), ("embed", "router"), decay=True)
        self.bias = param(rngs, zeros, (E,), ("router",), rule="balance") if cfg.bias else None
        self.first = param(rngs, normal, (d_model,), ("act_embed",)) if cfg.granularity == "chunk" else None
        self.experts = Experts(E, d_model, F, cfg.kind, rngs=rngs)
        self.shared = FFN(d_model, cfg.shared * F, cfg.kind, rngs=rngs) if cfg.shared else None
        self.shared_gate = Linear(d_model, 1, axes=("embed", "gates"), rngs=rngs) if cfg.shared_gate else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        router_input: Float[Array, "B T D"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State, dict[str, Array]]:
        """y, the state after the last real token of each row, and the losses by name.

        Raises:
          ValueError: `router_input` is missing with `router_at="pre_attn"`, or given without.
        """
        cfg = self.cfg
        if (router_input is None) != (cfg.router_at == "ffn"):
            raise ValueError(f"router_input: expected with router_at='pre_attn' only, not {cfg.router_at!r}")
        valid = jnp.ones(positions.shape, bool) if segment_ids is None else segment_ids != 0
        logits = einsum("btd,de->bte", fp32(x if router_input is None else router_input), self.router[...])
        state = self.init_state(x.shape[0], x.dtype) if state is None else state
        if self.first is not None:
            start = einsum("d,de->e", self.first[...], self.router[...])
            logits, state = _by_chunks(logits, start, positions, valid, state, cfg.chunk)
        scores = SCORES[cfg.router](logits)
        ranked = jax.lax.stop_gradient(scores if self.bias is None else scores + self.bias[...])
        ids = by_tokens(functools.partial(select, cfg=cfg), ranked)
        chosen = jax.nn.one_hot(ids, cfg.experts, dtype=scores.dtype)  # [B,T,k,E]
        gates = jnp.sum(chosen * scores[..., None, :], axis=-1)
        gates = cfg.scale * (gates / (gates.sum(-1, keepdims=True) + TINY) if cfg.renorm else gates)
        load = jnp.sum(jnp.where(valid[..., None, None], chosen, 0), axis=(0, 1, 2))
        if self.bias is not None:
            gates = summed(gates, self.bias[...], load - load.mean())
        (_, T, k), cap = ids.shape, cfg.capacity
        slots = None if cap is None else min(T, math.ceil(cap * k * T / cfg.experts))
        y = self.experts(x, ids, gates, slots)
        if self.shared is not None:
            weight = 1.0 if self.shared_gate is None else jax.nn.sigmoid(fp32(self.shared_gate(x)))
            y = y + weight * fp32(self.shared(x))
        return y.astype(x.dtype), state, losses(logits, scores, load, valid, cfg)

    def init_state(self, batch: int, dtype: jnp.dtype) -> State:
        """The state before the first token: nothing, or zeros with chunk granularity."""
        names = ("sum", "logits") if self.cfg.granularity == "chunk" else ()
        return {name: jnp.zeros((batch, self.cfg.experts), wide(dtype)) for name in names}


def select(scores: Float[Array, "*B E"], cfg: MoEConfig) -> Int[Array, "*B k"]:
    """The experts of the `top_k` largest scores, within the `top_groups` best groups; ties go to the lower index."""
    if cfg.top_groups < cfg.groups:
        grouped = scores.reshape(*scores.shape[:-1], cfg.groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        reach = jax.nn.one_hot(jax.lax.top_k(best, cfg.top_groups)[1], cfg.groups, dtype=bool).any(-2)
        scores = jnp.where(reach[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, cfg.top_k)[1]


def losses(
    logits: Float[Array, "B T E"],
    scores: Float[Array, "B T E"],
    load: Float[Array, "E"],
    valid: Bool[Array, "B T"],
    cfg: MoEConfig,
) -> dict[str, Array]:
    """The losses of `MoE` whose weight is not 0; `load` counts the assignments of real tokens."""

    def mean(a: Array) -> Array:
        return jnp.where(valid[..., None], a, 0).sum((0, 1)) / jnp.maximum(valid.sum(), 1)

    terms = {}
    if cfg.balance:
        shares = mean(scores / (scores.sum(-1, keepdims=True) + TINY))
        terms["balance"] = cfg.balance * cfg.experts * jnp.sum(load / jnp.maximum(load.sum(), 1) * shares)
    if cfg.z_loss and cfg.router == "softmax":
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        terms["router_z"] = cfg.z_loss * mean(lse**2)[0]
    return terms


def _by_chunks(
    logits: Float[Array, "B T E"],
    start: Float[Array, "E"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    state: State,
    chunk: int,
) -> tuple[Array, State]:
    """For each token the mean of `logits` over the chunk before its own, `start` in the first one; the state after.

    Positions alone say where a chunk begins, and a document begins one: nothing older enters it.
    """
    begins = (valid & (positions % chunk == 0))[..., None]
    keep = jnp.broadcast_to(jnp.where(begins, 0, 1), logits.shape)
    sums, total = linear_scan(keep, jnp.where(valid[..., None], logits, 0), initial_state=state["sum"])
    before = jnp.concatenate([state["sum"][:, None], sums[:, :-1]], axis=1) / chunk
    routed = jnp.where(positions[..., None] == 0, start, before)
    held, last = linear_scan(keep, jnp.where(begins, routed, 0), initial_state=state["logits"])
    return held, {"sum": total, "logits": last}


def _ffns(kind: str, weights: Weights, x: Array, sizes: Array | None) -> Array:
    """Each expert's outputs, in the dtype of x: see `parallel.experts.FFN`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(x: Array, name: str) -> Array:
        W = weights[name].astype(x.dtype)
        if sizes is None:
            return jnp.einsum("becd,edf->becf", x, W, precision=precision)
        return jax.lax.ragged_dot(x, W, sizes, precision=precision)

    gate = product(x, "gate") if "gate" in weights else None
    return product(activated(kind, product(x, "up"), gate), "down")
