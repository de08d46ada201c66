"""What every layer attends to: the T x T matrix of a mixer that is linear in its values (arXiv 2403.01590).

    reads_i = Σ_j A_ij values_j      for fixed queries, keys and gates

Softmax attention has its weights there; a recurrent layer has the product of all it forgets between j and i. Entries
may be negative, and rows need not sum to 1. Outside of A are what makes the values (projection, short convolution,
activation) and what follows the reads (skip, norm, gate, output projection).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.infer.policy import serve
from hydrax.mixers import Context, Mixer
from hydrax.models.block import Block
from hydrax.models.lm import LM
from hydrax.models.stack import Visit
from hydrax.ops.identity import LONGEST

# ------------------------------------------------------------------------------------------------------------ matrices


def probe(mixer: Mixer, x: Float[Array, "B T D"], ctx: Context, *, groups: int | None = None) -> Array:
    """A [B,heads,T,T] of a whole layer: the layer runs unchanged on values that are columns of the identity.

    Channels of one head show as many columns at a time. Where every channel has a matrix of its own (mamba, hgrn),
    each run shows one column of all, and the matrices of T runs are averaged over `groups` equal groups of channels.

    Raises:
      ValueError: the mixer is not linear in its values, the row is too long, or `groups` do not divide the channels.
    """
    v, _ = jax.eval_shape(lambda: _observe(mixer, x, ctx, lambda v: v))
    T, shared = v.shape[1], v.ndim == 4
    if T > LONGEST:
        raise ValueError(f"probe: T = {T}: expected at most {LONGEST}, for T x T numbers per head")
    if not shared and v.shape[2] % (groups or 1):
        raise ValueError(f"probe: groups = {groups}: expected a divisor of {v.shape[2]} channels")
    width = v.shape[3] if shared else 1

    def columns(first: Array) -> Array:
        """Columns first, first + 1, ... as [B,T,heads,width]."""
        unit = jnp.arange(T)[:, None] == first + jnp.arange(width)
        unit = unit[:, None] if shared else unit
        _, o = _observe(mixer, x, ctx, lambda v: jnp.broadcast_to(unit, v.shape).astype(v.dtype))
        return o if shared else o.reshape(*o.shape[:2], groups or o.shape[2], -1).mean(-1, keepdims=True)

    found = jax.lax.map(columns, jnp.arange(0, T, width))  # [runs,B,T,heads,width]
    found = jnp.moveaxis(found, (0, 3), (3, 1))
    found = found.reshape(*found.shape[:3], -1)[..., :T]
    return fp32(found)


def _observe(mixer: Mixer, x: Array, ctx: Context, change: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The values of a mixer, and what it reads after they were changed."""
    seen = {}

    def values(v: Array) -> Array:
        seen["values"] = v
        return change(v)

    def reads(o: Array) -> Array:
        seen["reads"] = o
        return o

    mixer.mix(x, dataclasses.replace(ctx, taps={**ctx.taps, "values": values, "reads": reads}), None)
    if len(seen) < 2:
        raise ValueError(f"probe: {type(mixer).__name__} is not linear in its values")
    return seen["values"], seen["reads"]


# ------------------------------------------------------------------------------------------------------ a whole model


def walk(
    lm: LM, tokens: Int[Array, "B T"], visit: Visit, segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """What `lm.hidden` returns, layer by layer.

    Raises:
      ValueError: a model that runs layers several times.
    """
    if any(section.loops > 1 for section in lm.sections):
        raise ValueError("walk: expected a model without loops")
    return serve.walk(lm, tokens, Context.of(tokens, segment_ids), visit)[0]


def matrices(
    lm: LM, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None, *, groups: int | None = 16
) -> list[Array]:
    """`probe` of every layer, from first to last."""
    found = []

    def visit(block: Block, x: Array, ctx: Context) -> Context:
        h = x if block.mixer_norm is None else block.mixer_norm(x)
        found.append(probe(block.mixer, h, ctx, groups=groups))
        return ctx

    walk(lm, tokens, visit, segment_ids)
    return found


def gradients(
    lm: LM,
    tokens: Int[Array, "B T"],
    score: Callable[[Array], Array],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "L B T"]:
    """∂score(logits) / ∂z of every layer, averaged over heads and channels; z is what its output projection reads."""

    def run(pushes: Array) -> Array:
        left = iter(pushes)

        def visit(block: Block, x: Array, ctx: Context) -> Context:
            push = next(left)[:, :, None, None]
            return dataclasses.replace(ctx, taps={"heads": lambda z: z + (push / z[0, 0].size).astype(z.dtype)})

        return score(lm.logits(walk(lm, tokens, visit, segment_ids))[..., : lm.vocabulary])

    return jax.grad(run)(jnp.zeros((lm.depth, *tokens.shape)))


# ------------------------------------------------------------------------------------------------------- what to show


def normalised(A: Float[Array, "... T T"]) -> Float[Array, "... T T"]:
    """|A| with rows that sum to 1; rows of zeros (padding) stay zero."""
    A = jnp.abs(A)
    total = A.sum(-1, keepdims=True)
    return A / jnp.where(total > 0, total, 1)


VIEWS: dict[str, Callable[[Array], Array]] = {"signed": lambda A: A, "absolute": jnp.abs, "normalised": normalised}


def head_mean(A: Float[Array, "B H T T"], view: str = "normalised") -> Float[Array, "B T T"]:
    """The mean over heads of A as it is, of |A|, or of |A| with rows that sum to 1."""
    return VIEWS[view](A).mean(1)


def rollout(layers: Sequence[Float[Array, "B T T"]]) -> Float[Array, "B T T"]:
    """How much of each token reaches each output through all layers: R = Â_L ... Â_1, Â the rows of A + I over their
    sum (arXiv 2005.00928). The identity stands for the residual stream."""
    residual = jnp.eye(layers[0].shape[-1])
    steps = [normalised(A + residual) for A in layers]
    return functools.reduce(lambda R, step: einsum("bij,bjk->bik", step, R), steps)


def attribution(layers: Sequence[Float[Array, "B T T"]], slopes: Float[Array, "L B T"]) -> Float[Array, "B T T"]:
    """`rollout` of what raises a score: signed head means of A, row i times `gradients` at token i, positive part."""
    return rollout([jax.nn.relu(slope[:, :, None] * A) for A, slope in zip(layers, slopes, strict=True)])
