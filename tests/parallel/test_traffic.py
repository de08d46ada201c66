"""What devices send each other, in bytes of results, against what the mathematics of every form asks for.

Forward and backward pass in fp32, counted in the compiled program. B rows of T tokens, H heads, K and V their widths, P
devices of N slots each; a state is H x K x V.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from hydrax.core.build import build
from hydrax.core.config import load_config
from hydrax.eval import dry_run, training
from hydrax.parallel import sequence
from hydrax.parallel.mesh import AXES
from hydrax.parallel.rules import batch_sharding
from hydrax.parallel.shards import Shards
from hydrax.train.config import RunConfig
from hydrax.train.optim import make_optimizer
from hydrax.train.state import State, abstract_state, shardings
from tests.parallel.devices import ROWS, mesh_of

B, H, K, V, P, TAPS = 1, 4, 8, 16, 4, 4
FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of `parallel.sequence`, and the last dimensions of its inputs, all [B,T,...]."""

    run: Callable
    inputs: tuple[tuple[int, ...], ...]
    summary: int = 0  # numbers of (M, U) of a slot
    state: int = 0  # and of S


def _conv(x: jax.Array, **facts: Shards) -> tuple:
    return sequence.short_conv(x, jnp.ones((TAPS, H * K)), **facts)


def _attention(*x: jax.Array, **facts: Shards) -> tuple:
    return sequence.self_attention(*x, **facts), None


QKV = ((H, K), (H, K), (H, V))
OPS = {
    "delta_rule": Op(sequence.delta_rule, (*QKV, (H,), (H,)), H * (K * K + K * V), H * K * V),
    "linear_attention": Op(sequence.linear_attention, (*QKV, (H,)), H * (1 + K * V), H * K * V),
    "attention": Op(_attention, QKV),
    "short_conv": Op(_conv, ((H * K,),)),
}


def _gathered_states(op: Op, T: int, N: int) -> dict[str, int]:
    return {"all-gather": 2 * P * N * op.summary}


def _passed_states(op: Op, T: int, N: int) -> dict[str, int]:
    return {"collective-permute": 2 * (P - 1) * N * op.state}


def _exchanged(op: Op, T: int, N: int) -> dict[str, int]:
    return {"all-to-all": 2 * T // P * (sum(math.prod(x) for x in op.inputs) + H * V)}


def _gathered_keys(op: Op, T: int, N: int) -> dict[str, int]:
    return {"all-gather": T * H * (K + V), "reduce-scatter": T // P * H * (K + V)}


def _passed_keys(op: Op, T: int, N: int) -> dict[str, int]:
    """P-1 hops of keys, values and positions, twice, and those of gradients back to where the keys are from."""
    return {"collective-permute": T // P * ((P - 1) * 2 * (H * (K + V) + 1) + P * H * (K + V))}


def _tails(op: Op, T: int, N: int) -> dict[str, int]:
    return {"collective-permute": 2 * N * (TAPS - 1) * H * K}


SENT = {
    "allgather_state": _gathered_states,
    "ring_state": _passed_states,
    "ulysses": _exchanged,
    "allgather_kv": _gathered_keys,
    "ring": _passed_keys,
    "halo": _tails,
}
"""Numbers in the results of every kind of collective: (op, T, N) -> {kind: numbers}. Without T: the same for all T."""

STATES = [(op, form) for op in ("linear_attention", "delta_rule") for form in ("allgather_state", "ring_state")]
FORMS = [*STATES, ("attention", "allgather_kv"), ("attention", "ring"), ("short_conv", "halo")]
QUICK = {("linear_attention", "allgather_state"), ("attention", "allgather_kv"), ("short_conv", "halo")}


def slow(op: str, form: str, layout: str) -> list:
    return [] if (op, form) in QUICK and layout == "contiguous" else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("op", "form", "layout"),
    [
        pytest.param(*case, marks=slow(*case))
        for case in [
            *((op, form, layout) for op, form in FORMS for layout in ("contiguous", "zigzag")),
            *((op, "ulysses", "contiguous") for op in ("linear_attention", "delta_rule", "attention")),
        ]
    ],
)
def test_what_a_form_sends(op: str, form: str, layout: str):
    slots = 2 if layout == "zigzag" else 1
    for T in (64, 128):
        found = {c.kind: c.nbytes for c in dry_run.collectives(program(OPS[op], form, layout, T))}
        assert found == {kind: FLOAT * n for kind, n in SENT[form](OPS[op], T, slots).items()}


def program(op: Op, form: str, layout: str, T: int) -> str:
    """The compiled gradients of an op on P devices, inputs and gradients divided."""

    def loss(*x: jax.Array) -> jax.Array:
        return (op.run(*x, shards=Shards.of((B, T), None, (form,), layout))[0] ** 2).sum()

    given, mesh = [jax.ShapeDtypeStruct((B, T, *x), jnp.float32) for x in op.inputs], mesh_of(P)
    on = NamedSharding(mesh, ROWS)
    gradients = jax.grad(loss, argnums=tuple(range(len(given))))
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients, in_shardings=on, out_shardings=on).lower(*given)
    return lowered.compile(compiler_options=dry_run.QUICK).as_text() or ""


def step(rows: int, T: int) -> tuple[State, jax.stages.Compiled]:
    """A training step of a small model with `fsdp` over P devices, and the shapes of its state."""
    small = {"model.d_model": 16, "model.num_layers": 2, "model.pattern": "fill(gla)", "optim.name": "adamw"}
    small |= {"train.accumulate": 1, "train.batch_size": rows, "data.seq_len": T, "mesh.fsdp": P}
    cfg = build(RunConfig, load_config("quickstart", **small).to_dict())
    sizes, auto = [getattr(cfg.mesh, axis) for axis in AXES], (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(sizes, AXES, axis_types=auto, devices=jax.devices()[:P])
    plan, run, _ = training.training_step(cfg, jnp.float32)
    state = abstract_state(plan, make_optimizer(cfg.optim, cfg.train.steps, plan.meta), mesh)
    place, batch = shardings(state), jax.eval_shape(functools.partial(training.batch, cfg))
    with jax.set_mesh(mesh):
        jitted = jax.jit(run, in_shardings=(place, batch_sharding(mesh)), out_shardings=(place, None), donate_argnums=0)
        return state, jitted.lower(state, batch).compile(compiler_options=dry_run.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "T"), [(4, 32), (8, 64)])
def test_fsdp_sends_parameters_twice_and_gradients_once(rows: int, T: int):
    """However many tokens there are; gradients as sums of all, of which accelerators keep each a part."""
    state, compiled = step(rows, T)
    params = state["params"]
    divided = {name for name, x in params.items() if x.sharding.shard_shape(x.shape) != x.shape}
    sizes = {name: FLOAT * math.prod(x.shape) for name, x in params.items()}
    found = {c.kind: c.nbytes for c in dry_run.collectives(compiled.as_text() or "")}
    assert found.keys() == {"all-gather", "all-reduce"}
    assert found["all-gather"] == 2 * sum(sizes[name] for name in divided)  # forward and backward
    gradients = sum(sizes.values()) + sizes["embed/weight"]  # the embedding's as rows looked up, and as the last matrix
    assert 0 <= found["all-reduce"] - gradients < 50 * FLOAT  # and losses, norms, counts


@pytest.mark.slow
def test_memory_is_what_the_compiler_says():
    """Of a device: parts of the state, exactly, and what a step needs beside it; its rows are small."""
    state, compiled = step(4, 32)
    analysis, found = compiled.memory_analysis(), dry_run._memory(state, compiled)
    assert found["activations, gradients"] == analysis.temp_size_in_bytes
    held = found["parameters"] + found["optimizer"]
    assert 0 < analysis.argument_size_in_bytes - held < 32 * 8 * FLOAT
    whole = sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves((state["params"], state["opt_state"])))
    assert whole / P < held < 1.1 * whole / P
