"""Layers of several mixers at once: disjoint heads under one output projection, or parallel branches.

The parts' heads z_p [B,T,H_p,V_p] pass through a fusion, which brings them to a common scale, and are joined: side by
side in the order of the heads (`Heads`, arXiv 2606.20097), or added (`Parallel`, arXiv 2411.13676).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers import Context, Mixer
from hydrax.models.mix import Mix, take_projection
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.ops.softmax import merge

Name = Literal["concat", "mean_norm", "scale_norm", "weighted", "softmax_gate", "hierarchical", "flat"]
Shapes = list[tuple[int, int]]
"""Heads and values per head of every part."""


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Options of `heads(...)` and of `parallel(...)`."""

    fusion: Name | None = None  # scale_norm for heads, mean_norm for branches, if None
    weights: tuple[float, ...] = ()  # of the parts under fusion = weighted; 1 if not given
    learned: bool = False  # whether these weights are trained
    norm_eps: PositiveFloat = 1e-6  # of the norms of mean_norm and scale_norm
    width: Positive = 64  # K of the scores of hierarchical

    def check(self, parts: int) -> None:
        """Raises `ConfigError` for weights that do not fit that many parts."""
        if self.weights and (self.fusion != "weighted" or len(self.weights) != parts):
            allowed = f"expected one per part, {parts} in all, and fusion = weighted"
            raise ConfigError("weights", self.weights, allowed)
        if self.learned and self.fusion != "weighted":
            raise ConfigError("learned", self.learned, f"needs fusion = weighted, and it is {self.fusion}")


class Concat(nnx.Module):
    """z_p as it is."""

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        del shapes, cfg, d_model, rngs

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        return zs


class MeanNorm(nnx.Module):
    """RMSNorm_HV(z_p) / P: the norm's weights are the branches' learned scales."""

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        axes = ("heads", "state_v")
        self.norms = nnx.List([RMSNorm(shape, axes=axes, eps=cfg.norm_eps, rngs=rngs) for shape in shapes])

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        return [norm(z) / len(zs) for norm, z in zip(self.norms, zs, strict=True)]


class ScaleNorm(nnx.Module):
    """γ_h RMSNorm_V(z_h), a norm per part, γ initially 1."""

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        ones = jax.nn.initializers.ones
        self.norms = nnx.List([RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs) for _, V in shapes])
        self.gains = nnx.List([param(rngs, ones, (H,), ("heads",)) for H, _ in shapes])

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        parts = zip(self.norms, self.gains, zs, strict=True)
        return [(norm(z) * gain[...][:, None]).astype(z.dtype) for norm, gain, z in parts]


class Weighted(nnx.Module):
    """a_p z_p."""

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        self.fixed = cfg.weights or (1.0,) * len(shapes)
        weights = lambda key, shape, dtype: jnp.asarray(self.fixed, dtype)  # noqa: E731
        self.learned = param(rngs, weights, (len(shapes),), ("parts",)) if cfg.learned else None

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        weights = self.fixed if self.learned is None else self.learned[...]
        return [(fp32(z) * weights[i]).astype(z.dtype) for i, z in enumerate(zs)]


class SoftmaxGate(nnx.Module):
    """P softmax(x W)_p z_p: equal weights of 1 where the gate is undecided."""

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        self.gate = Linear(d_model, len(shapes), axes=("embed", "parts"), rngs=rngs)

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        shares = len(zs) * jax.nn.softmax(fp32(self.gate(x)), axis=-1)
        return [(fp32(z) * shares[..., i, None, None]).astype(z.dtype) for i, z in enumerate(zs)]


class Hierarchical(nnx.Module):
    """P softmax_p(K^-½ (x W_q)·(z_p W_p)) z_p: a second softmax per token, over the branches (after arXiv 1811.04716).

    K is `width`. Where all branches score alike, each of them counts once.
    """

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        axes = ("parts", "inner", "rank")
        self.q = Linear(d_model, cfg.width, axes=("embed", "rank"), rngs=rngs)
        self.keys = nnx.List([Linear((1, math.prod(shape)), cfg.width, axes=axes, rngs=rngs) for shape in shapes])

    def __call__(self, zs: list[Array], x: Array) -> list[Array]:
        q = self.q(x)
        keys = [key(z.reshape(*z.shape[:2], 1, -1)) for key, z in zip(self.keys, zs, strict=True)]
        scores = jnp.stack([einsum("btk,btk->bt", q, key) for key in keys], axis=-1) * q.shape[-1] ** -0.5
        shares = len(zs) * jax.nn.softmax(scores, axis=-1)
        return [(fp32(z) * shares[..., i, None, None]).astype(z.dtype) for i, z in enumerate(zs)]


class Flat(nnx.Module):
    """e^(l_p) z_p / Σ e^(l_p), l_p [B,T,H] the logarithm of a branch's denominator: one softmax over all their keys.

    Branches tap "lse", those in `WITH_LSE` do, and leave z_p as it was averaged (after arXiv 1811.04716).
    """

    def __init__(self, shapes: Shapes, cfg: FusionConfig, d_model: int, *, rngs: nnx.Rngs):
        del shapes, cfg, d_model, rngs

    def __call__(self, zs: list[Array], x: Array, lses: list[Array]) -> list[Array]:
        return [merge(*zip(zs, lses, strict=True))[0]]


WITH_LSE = ("attn", "swa")
"""Mixers that tap the logarithm of their softmax's denominator."""

FUSIONS: dict[str, Any] = {
    "flat": Flat,
    "hierarchical": Hierarchical,
    "concat": Concat,
    "mean_norm": MeanNorm,
    "scale_norm": ScaleNorm,
    "weighted": Weighted,
    "softmax_gate": SoftmaxGate,
}


@dataclasses.dataclass(frozen=True)
class HeadsOptions(FusionConfig):
    total: Positive | None = None  # heads of the layer; the parts' counts added up if None
    # Heads of the first part, for every layer the block occurs in; the second part takes the rest of `total`.
    assignment: tuple[tuple[int, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Heads(Mix):
    """y = W_o [.. z_h ..], heads of several kinds in one layer.

    `orders` tells for every layer which heads the parts' heads are, one part after the other: it is data, so layers
    that differ in nothing else are scanned together.
    """

    members: tuple[Mix, ...]
    fusion: FusionConfig
    orders: tuple[tuple[int, tuple[int, ...]], ...]  # (layer, heads)

    @property
    def label(self) -> str:
        return f"heads({','.join(part.label for part in self.members)})"

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return HeadsMixer(d_model, self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Parallel(Mix):
    """y = W_o Σ_p fusion(z_p), or W_o [z_1 .. z_P] where nothing brings the parts to a common scale (concat)."""

    members: tuple[Mix, ...]
    fusion: FusionConfig

    @property
    def label(self) -> str:
        return f"parallel({','.join(part.label for part in self.members)})"

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return ParallelMixer(d_model, self, rngs=rngs)


class _Composed(Mixer):
    """What compositions of whole mixers share: parts that read the same input, and a projection of their own."""

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.parts = nnx.List([part.build(d_model, rngs=rngs) for part in cfg.members])
        self.shapes = tuple(map(take_projection, self.parts))
        self.fusion = FUSIONS[cfg.fusion.fusion](list(self.shapes), cfg.fusion, d_model, rngs=rngs)

    def _read(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[list[Array], list[PyTree]]:
        """What every part reads [B,T,H_p,V_p], after the fusion, and the parts' states."""
        states = [None] * len(self.parts) if state is None else state
        lses: list[Array] = []

        def keep(lse: Array) -> Array:
            lses.append(lse)
            return lse

        if isinstance(self.fusion, Flat):
            ctx = dataclasses.replace(ctx, taps={**ctx.taps, "lse": keep})
        results = [part.mix(x, ctx, s) for part, s in zip(self.parts, states, strict=True)]
        zs = [z.reshape(*z.shape[:2], *shape) for (z, _), shape in zip(results, self.shapes, strict=True)]
        return self.fusion(zs, x, *([lses] if lses else [])), [s for _, s in results]

    def out(self, z: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return [part.init_state(batch, max_len, dtype) for part in self.parts]


class HeadsMixer(_Composed):
    """The module of `Heads`."""

    def __init__(self, d_model: int, cfg: Heads, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        H, V = sum(heads for heads, _ in self.shapes), self.shapes[0][1]
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        zs, states = self._read(x, ctx, state)
        return jnp.concatenate(zs, axis=2)[:, :, self._places(ctx.layer_index)], states

    def _places(self, layer: int | Array) -> Array:
        """Where each head of the layer stands among the heads of the parts."""
        layers, orders = zip(*self.cfg.orders, strict=True)
        at = jnp.argmax(jnp.asarray(layers) == layer)
        return jnp.argsort(jnp.asarray(orders)[at])


class ParallelMixer(_Composed):
    """The module of `Parallel`."""

    def __init__(self, d_model: int, cfg: Parallel, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        widths = [math.prod(shape) for shape in self.shapes]
        width = sum(widths) if cfg.fusion.fusion == "concat" else widths[0]
        self.project = Linear((1, width), d_model, axes=("parts", "inner", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        zs, states = self._read(x, ctx, state)
        zs = [z.reshape(*z.shape[:2], 1, -1) for z in zs]
        return jnp.concatenate(zs, axis=-1) if self.cfg.fusion.fusion == "concat" else sum(zs[1:], zs[0]), states
