"""Runs the layers: every group of repeated periods is one scan over parameters stacked on axis 0."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax import mixers
from hydrax.core.typing import Array, Float, PyTree
from hydrax.models.block import Block
from hydrax.models.spec import Group, ModelConfig
from hydrax.parallel.rules import constrain

_policies = jax.checkpoint_policies

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "mixer": _policies.save_only_these_names("mixer_out"),
    "dots": _policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass of a period keeps: everything, its input, also the mixers' outputs, or all weight products."""


class Period(nnx.Module):
    """The layers that one group repeats."""

    def __init__(self, blocks: list[Block]):
        self.blocks = nnx.List(blocks)


def init_group(group: Group, cfg: ModelConfig, *, depth: int, key: Array) -> Period:
    """A `Period` whose parameters have a leading axis of `group.repeats`.

    Layer i draws from `fold_in(key, i)`, so the values do not depend on how the layers are grouped.
    """
    graphs = []

    def repeat(r: Array) -> PyTree:
        first = group.start + r * len(group.period)
        blocks = [
            Block(cfg, spec, depth=depth, rngs=nnx.Rngs(params=jax.random.fold_in(key, first + i)))
            for i, spec in enumerate(group.period)
        ]
        graph, state = nnx.split(Period(blocks))
        graphs.append(graph)
        return state

    states = jax.vmap(repeat)(jnp.arange(group.repeats))
    for _, parameter in nnx.to_flat_state(states):
        parameter.set_metadata(axes=("layers", *parameter.get_metadata("axes")))
    return nnx.merge(graphs[0], states)


def run_group(
    group: Group,
    period: Period,
    x: Float[Array, "B T D"],
    ctx: mixers.Context,
    states: list[PyTree] | None,
    *,
    remat: str,
    unroll: int,
) -> tuple[Float[Array, "B T D"], list[PyTree] | None]:
    """All layers of a group, `unroll` periods per iteration of the scan.

    `states` holds, per layer of the period, a state stacked over the repeats.
    """
    graph, params = nnx.split(period)

    def repeat(x: Array, xs: tuple) -> tuple[Array, list[PyTree] | None]:
        params, states, r = xs
        first = group.start + r * len(group.period)
        new = []
        for i, block in enumerate(nnx.merge(graph, params).blocks):
            x, state = block(x, ctx.at(first + i), None if states is None else states[i])
            new.append(state)
        return constrain(x, ("batch", "seq", "act_embed")), None if states is None else new

    if REMAT[remat] is not None:
        # A real loop keeps a period apart from its recomputation; straight-line code needs a barrier, or both merge.
        repeat = jax.checkpoint(repeat, policy=REMAT[remat], prevent_cse=unroll >= group.repeats)
    xs = (params, states, jnp.arange(group.repeats))
    return jax.lax.scan(repeat, x, xs, unroll=min(unroll, group.repeats))
