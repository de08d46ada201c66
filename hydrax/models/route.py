"""One of two mixers for a whole document, chosen by what its first tokens say (after arXiv 2604.07394).

    p = σ(MLP(mean of x over the first P tokens)),    z_t = z^full_t for t < P or p > ½, else z^sparse_t
The choice is made when token P is read and never looks ahead. Its gradient is that of p (straight-through), and a loss
weight·(mean p - target)² holds the share of full documents near a target.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Fraction, NonNegativeFloat, Positive
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers import Context, Mixer
from hydrax.models.mix import Mix, take_projection
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import linear_scan


@dataclasses.dataclass(frozen=True)
class RouteOptions:
    """Options of `route(full, sparse)`."""

    prefix: Positive = 128  # P, tokens the router reads; they are mixed by the first part
    tie: bool = True  # parameters that both parts have are shared
    width: Positive = 64  # of the router's hidden layer
    target: Fraction = 0.5  # share of documents for the first part
    weight: NonNegativeFloat = 0.0  # of the loss that holds it


@dataclasses.dataclass(frozen=True)
class Route(Mix):
    """The description; `members` are the full and the sparse part."""

    members: tuple[Mix, Mix]
    options: RouteOptions
    d_model: int

    @property
    def label(self) -> str:
        return f"route({','.join(part.label for part in self.members)})"

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return RouteMixer(d_model, self, rngs=rngs)

    def nbytes(self, max_len: int, itemsize: int) -> tuple[int, int]:
        fixed, growing = super().nbytes(max_len, itemsize)
        return fixed + 4 * self.d_model, growing


class RouteMixer(Mixer):
    """The module of `Route`. Both parts are computed; their states advance whatever is chosen."""

    def __init__(self, d_model: int, cfg: Route, *, rngs: nnx.Rngs):
        self.cfg, options = cfg, cfg.options
        self.full, self.sparse = (part.build(d_model, rngs=rngs) for part in cfg.members)
        self.project = self.full.project
        self.shape = take_projection(self.full)
        take_projection(self.sparse)
        if options.tie:
            _tie(self.full, self.sparse)
        self.hidden = Linear(d_model, options.width, axes=("embed", "rank"), bias=True, rngs=rngs)
        self.choice = Linear(options.width, 1, axes=("rank", "parts"), bias=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("full", "sparse", "router")) if state is None else state
        g, router = self._gate(x, ctx, past["router"])
        full, full_state = self.full.mix(x, ctx, past["full"])
        sparse, sparse_state = self.sparse.mix(x, ctx, past["sparse"])
        g = g[:, :, None, None]
        full, sparse = (z.reshape(*z.shape[:2], *self.shape) for z in (full, sparse))
        z = (g * fp32(full) + (1 - g) * fp32(sparse)).astype(full.dtype)
        return z, {"full": full_state, "sparse": sparse_state, "router": router}

    def _gate(self, x: Array, ctx: Context, past: Array | None) -> tuple[Float[Array, "B T"], Array]:
        """1 for the full part, 0 for the sparse one, with the gradient of p; and the sum over the prefix so far."""
        options = self.cfg.options
        reads = (ctx.positions < options.prefix)[:, :, None]
        seen = fp32(jnp.where(reads, x, 0))
        sums, last = linear_scan(
            jnp.ones_like(seen), seen, initial_state=past, segment_ids=ctx.segment_ids, shards=ctx.shards
        )
        p = jax.nn.sigmoid(fp32(self.choice(jax.nn.silu(self.hidden(sums / options.prefix)))))[:, :, 0]
        chosen = (p > 0.5).astype(p.dtype) + (p - jax.lax.stop_gradient(p))  # the difference is exactly 0
        counted = ~reads[:, :, 0] if ctx.segment_ids is None else ~reads[:, :, 0] & (ctx.segment_ids != 0)
        if options.weight > 0:
            share = jnp.sum(jnp.where(counted, p, 0)) / jnp.maximum(jnp.sum(counted), 1)
            ctx.record("route", jnp.where(jnp.any(counted), options.weight * (share - options.target) ** 2, 0.0))
        return jnp.where(reads[:, :, 0], 1.0, chosen), last

    def out(self, z: Array) -> Array:
        return self.project(z.reshape(*z.shape[:2], *self.project.shape_in))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {
            "full": self.full.init_state(batch, max_len, dtype),
            "sparse": self.sparse.init_state(batch, max_len, dtype),
            "router": jnp.zeros((batch, self.cfg.d_model), wide(dtype)),
        }


def _tie(source: Mixer, other: Mixer) -> None:
    """Gives `other` the parameters of `source` that have the same path and shape."""
    given, nodes = dict(nnx.iter_graph(source)), dict(nnx.iter_graph(other))
    for path, own in nodes.items():
        common = given.get(path)
        if isinstance(own, nnx.Param) and isinstance(common, nnx.Param) and own.shape == common.shape:
            setattr(nodes[path[:-1]], str(path[-1]), common)
