"""Layers that share: low-rank changes to common weights, and a common block whose output feeds a mixer.

Keys and values are shared through `Context.keys`; see `stack.run_group`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers import Context
from hydrax.models.layers import LayerSpec
from hydrax.models.mix import take_projection
from hydrax.nn.ffn import FFN
from hydrax.nn.linear import Linear
from hydrax.nn.norm import NORMS
from hydrax.nn.param import param


class LowRank(nnx.Module):
    """W + A B for one matrix W of a common block (arXiv 2106.09685); A of fan-in scale, B zero at first."""

    def __init__(self, shared: nnx.Param, rank: int, *, rngs: nnx.Rngs):
        inputs, outputs = ([shared.shape[i] for i in dims] for dims in shared.get_metadata("matrix"))
        axes = shared.get_metadata("axes")
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        down, up = jax.nn.initializers.normal(fan_in**-0.5), jax.nn.initializers.zeros
        kinds: dict[str, Any] = {"decay": True, "matrix": ((-2,), (-1,)), "cast": True}
        self.down = param(rngs, down, (fan_in, rank), (axes[0] if len(inputs) == 1 else "inner", "rank"), **kinds)
        self.up = param(rngs, up, (rank, fan_out), ("rank", axes[-1] if len(outputs) == 1 else "inner"), **kinds)

    def __call__(self, W: Array) -> Array:
        return W + einsum("ir,ro->io", self.down[...], self.up[...]).astype(W.dtype).reshape(W.shape)


class Adapter(nnx.Module):
    """What is a layer's own of a block that several layers share: low-rank changes, and the way out of a `Feed`."""

    def __init__(self, shared: nnx.Module, spec: LayerSpec, *, rngs: nnx.Rngs):
        flat = nnx.to_flat_state(nnx.state(shared, nnx.Param)) if spec.lora_rank else []
        matrices = {".".join(map(str, path)): p for path, p in flat if p.get_metadata("matrix") is not None}
        chosen = {name: p for name, p in matrices.items() if p.ndim == _ndim(p) and name.startswith(spec.lora_on)}
        changes = {name: LowRank(p, spec.lora_rank, rngs=rngs) for name, p in chosen.items()}
        self.changes: Any = nnx.Dict(changes)

    def applied(self, shared: nnx.Module) -> Any:
        """The shared block as this layer sees it."""
        graph, state = nnx.split(shared)
        flat = dict(nnx.to_flat_state(state))
        for path, variable in flat.items():
            change = self.changes.get(".".join(map(str, path)))
            if change is not None:
                flat[path] = variable.replace(change(variable[...]))
        return nnx.merge(graph, nnx.from_flat_state(flat))


def _ndim(p: nnx.Param) -> int:
    """Dimensions of the matrix itself; a stack of experts has more."""
    inputs, outputs = p.get_metadata("matrix")
    return len(inputs) + len(outputs)


class Feed(nnx.Module):
    """f = FFN(norm(mixer(norm [x, e]))) for the residual stream x and the embeddings e, without residuals.

    The common block of Zamba2 (arXiv 2411.15242): the mixer reads 2D channels; what it feeds adds W f to its input.
    """

    def __init__(self, cfg: Any, spec: LayerSpec, *, rngs: nnx.Rngs):
        D = cfg.d_model
        norm = functools.partial(NORMS[spec.norm], axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
        self.mixer_norm = norm(2 * D)
        self.mixer = spec.mix.build(2 * D, rngs=rngs)
        shape = take_projection(self.mixer)
        self.project = Linear(shape, D, axes=("heads", "head_dim", "embed"), rngs=rngs)
        self.ffn_norm, self.ffn = norm(D), FFN(D, spec.ffn_dim, spec.ffn, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        z, state = self.mixer.mix(self.mixer_norm(jnp.concatenate([x, ctx.embeddings], axis=-1)), ctx, state)
        return self.ffn(self.ffn_norm(self.project(z)), impl=ctx.impl), state
