"""Runs the layers: every group of repeated periods is one scan over parameters stacked on axis 0."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hydrax import mixers
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, PyTree
from hydrax.models.block import Block
from hydrax.models.layers import Group, LayerSpec
from hydrax.models.sharing import Adapter
from hydrax.models.spec import LoopConfig, ModelConfig
from hydrax.nn.param import param
from hydrax.ops.dispatch import KERNEL
from hydrax.parallel.rules import constrain

_policies = jax.checkpoint_policies


def _attention(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Softmax attention by cuDNN, whose results have no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


_dear = _policies.save_from_both_policies(_policies.save_only_these_names(KERNEL), _attention)

PERIOD = "period_in"
"""The name of what a period reads."""

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PERIOD],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _policies.nothing_saveable,
    "mixer": _policies.save_only_these_names("mixer_out"),
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _dear),
}
"""What the backward pass of a period keeps: everything, its input in the memory of the host, or of the device, also the
mixers' outputs, or all that takes a kernel: weight products, softmax attention and the mixers' own kernels."""

Losses = dict[str, Array]
Visit = Callable[[Block, Array, mixers.Context], mixers.Context]
"""Called with every layer before it runs; what it returns is the layer's context."""

Made = dict[tuple[str, int], Any]
"""What layers make for later ones, by kind and layer: "keys" (and values), the "stream" before a gated block."""

Shared = Mapping[str, Any]
"""Blocks that several layers use, by name."""


class Period(nnx.Module):
    """The layers that one group repeats; of those with common weights, what is their own.

    `gates` has η for every layer that closes a gated block, None for the others.
    """

    def __init__(self, blocks: list[Block | Adapter], gates: list[nnx.Param | None]):
        self.blocks = nnx.List(blocks)
        self.gates = nnx.List(gates)


class Passes(nnx.Module):
    """ρ_τ of a loop: what each pass keeps of the stream before it."""

    def __init__(self, cfg: LoopConfig, loops: int, d_model: int, *, rngs: nnx.Rngs):
        shapes = {
            "none": None,
            "scalar": ((loops, 1), ("loops", "one")),
            "channel": ((loops, d_model), ("loops", "norm")),
        }
        shape = shapes[cfg.gate]
        self.gates = None if shape is None else param(rngs, jax.nn.initializers.zeros, *shape)


class Run(NamedTuple):
    """What running layers gives."""

    x: Float[Array, "B T D"]
    states: PyTree
    losses: Losses
    made: Made


def init_group(group: Group, cfg: ModelConfig, shared: Shared, *, depth: int, key: Array) -> Period:
    """A `Period` whose parameters have a leading axis of `group.repeats`.

    Layer i draws from `fold_in(key, i)`, so the values do not depend on how the layers are grouped.
    """
    graphs = []

    def repeat(r: Array) -> PyTree:
        first = group.start + r * len(group.period)
        blocks = [
            _own(cfg, spec, shared, depth=depth, rngs=nnx.Rngs(params=jax.random.fold_in(key, first + i)))
            for i, spec in enumerate(group.period)
        ]
        zeros = [param(nnx.Rngs(0), jax.nn.initializers.zeros, (), ()) if s.closes else None for s in group.period]
        graph, state = nnx.split(Period(blocks, zeros))
        graphs.append(graph)
        return state

    states = jax.vmap(repeat)(jnp.arange(group.repeats))
    for _, parameter in nnx.to_flat_state(states):
        parameter.set_metadata(axes=("layers", *parameter.get_metadata("axes")))
    return nnx.merge(graphs[0], states)


def variant(group: Group, index: int, period: Period, cfg: ModelConfig, shared: Shared, depth: int) -> Period:
    """The same parameters under the options of another pass."""
    if index == 0:
        return period
    other = dataclasses.replace(group, period=group.variants[index])
    graph, _ = nnx.split(nnx.eval_shape(lambda: init_group(other, cfg, shared, depth=depth, key=jax.random.key(0))))
    return nnx.merge(graph, nnx.split(period)[1])


def run_group(
    group: Group,
    period: Period,
    x: Float[Array, "B T D"],
    ctx: mixers.Context,
    states: list[PyTree] | None,
    *,
    shared: Shared,
    made: Made,
    remat: str,
    unroll: int,
) -> Run:
    """All layers of a group, `unroll` periods per iteration of the scan.

    `states` holds, per layer of the period, a state stacked over the repeats. `made` is what earlier groups keep for
    later layers, and what this group's single layers keep is added; periods that repeat have theirs for themselves.
    """
    graph, params = nnx.split(period)

    def repeat(x: Array, xs: tuple) -> tuple[Array, tuple]:
        params, states, r = xs
        x = checkpoint_name(x, PERIOD)
        run = run_period(group, nnx.merge(graph, params), x, ctx, r, states, shared=shared, made=made)
        out = run.made if group.repeats == 1 else {}
        return constrain(run.x, ("batch", "seq", "act_embed")), (run.states, run.losses, out)

    if REMAT[remat] is not None:
        # A real loop keeps a period apart from its recomputation; straight-line code needs a barrier, or both merge.
        repeat = jax.checkpoint(repeat, policy=REMAT[remat], prevent_cse=unroll >= group.repeats)
    xs = (params, states, jnp.arange(group.repeats))
    x, (new, losses, more) = jax.lax.scan(repeat, x, xs, unroll=min(unroll, group.repeats))
    made = made | jax.tree.map(lambda k: k[0], more)
    return Run(x, None if states is None else new, jax.tree.map(jnp.sum, losses), made)


def added(a: Losses, b: Losses) -> Losses:
    """Losses of both by name, summed."""
    return {**a, **b, **{name: a[name] + b[name] for name in a.keys() & b.keys()}}


def run_period(
    group: Group,
    period: Period,
    x: Float[Array, "B T D"],
    ctx: mixers.Context,
    r: int | Array,
    states: list[PyTree] | None,
    *,
    shared: Shared,
    made: Made,
    visit: Visit | None = None,
) -> Run:
    """The layers of repeat r of a group."""
    first = group.start + r * len(group.period)
    new: list[PyTree] = []
    losses: Losses = {}
    more: Made = {}
    for i, (spec, own, gate) in enumerate(zip(group.period, period.blocks, period.gates, strict=True), group.start):
        if spec.opens:
            more["stream", i] = x
        block = own.applied(shared[spec.block]) if isinstance(own, Adapter) else own
        records: dict[str, Any] = {}
        given = (made | more).get(("keys", i - spec.producer)) if spec.producer else None
        here = dataclasses.replace(ctx.at(first + i - group.start), records=records, keys=given)
        here = here if visit is None else visit(block, x, here)
        x, state = block(x, here, None if states is None else states[i - group.start], shared)
        new.append(state)
        own_keys = records.pop("keys", None)
        if spec.produces:
            more["keys", i] = own_keys
        if gate is not None:
            entry = (made | more)["stream", i + 1 - spec.closes]
            x = x + (fp32(gate[...]) * fp32(entry)).astype(x.dtype)
        losses = added(losses, records)
    return Run(x, new if states is not None else None, losses, more)


def _own(cfg: ModelConfig, spec: LayerSpec, shared: Shared, *, depth: int, rngs: nnx.Rngs) -> Block | Adapter:
    if spec.shared:
        return Adapter(shared[spec.block], spec, rngs=rngs)
    return Block(cfg, spec, shared, depth=depth, rngs=rngs)
