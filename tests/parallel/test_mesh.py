"""The mesh decides where numbers lie and never which: parameters, losses and checkpoints are the same on all meshes."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.parallel import rules
from hydrax.parallel.mesh import AXES, MeshConfig, make_mesh
from hydrax.train.checkpoint import Checkpoints
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import State, abstract_state, new_state, shardings
from hydrax.train.step import make_train_step
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close
from tests.train import tiny

pytestmark = pytest.mark.thorough

STEPS, ROWS, TOKENS = 20, 8, 24
MODEL = {
    "d_model": 32,
    "pattern": "2*(gdn,attn)",
    "vocab_size": tiny.VOCABULARY,
    "ffn_dim": 32,
    "mixers": {name: mixers.row(name).tiny for name in mixers.names()},
}
CONFIG = build(ModelConfig, MODEL)
PLAN = lm.blueprint(CONFIG)
# Outputs of recurrent mixers are normalised, where they are small rounding grows; Adam makes full steps of it. A
# low rate and an eps above rounding keep twenty steps comparable.
OPTIM = build(OptimConfig, {"lr": 1e-4, "warmup": 2, "eps": 1e-6})
TX = make_optimizer(OPTIM, STEPS, PLAN.meta)
MESHES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 8}, id="fsdp8", marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, id="fsdp4-tensor2", marks=pytest.mark.slow),
        pytest.param({"fsdp": 1, "context": 8}, id="context8", marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 4, "layout": "zigzag"}, id="fsdp2-context4-zigzag", marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, id="fsdp2-context2-tensor2"),
    ],
)


@functools.cache
def mesh(*, layout: str = "contiguous", **sizes: int) -> Mesh:
    """A mesh of these sizes over all devices, or over the first one; the layout is the model's affair."""
    if sizes:
        return make_mesh(build(MeshConfig, sizes))
    return jax.make_mesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])


@functools.cache
def initial(**sizes: int) -> State:
    return new_state(PLAN, TX, 0, mesh(**sizes))


@functools.cache
def train_step(*, layout: str = "contiguous", **sizes: int):
    place = shardings(abstract_state(PLAN, TX, mesh(**sizes)))
    step = make_train_step(lm.blueprint(CONFIG, layout=layout), TX, make_schedule(OPTIM, STEPS))
    rows = rules.batch_sharding(mesh(**sizes))
    return jax.jit(step, in_shardings=(place, rows), out_shardings=(place, None))


def losses(state: State, first: int, last: int, **sizes: int) -> tuple[State, list[float]]:
    """The losses of steps [first, last) from a state on a mesh, and the state after them."""
    seen = []
    with jax.set_mesh(mesh(**sizes)):
        for i in range(first, last):
            state, metrics = train_step(**sizes)(state, tiny.batch(ROWS, TOKENS, seed=i % 4))
            seen.append(float(metrics["loss"]))
    return state, seen


@MESHES
def test_parameters_do_not_depend_on_the_mesh(sizes: dict[str, int]):
    """Bit by bit, although every device makes only its part."""
    state = initial(**sizes)
    parts = {k: x.size // x.addressable_shards[0].data.size for k, x in state["params"].items()}
    assert parts["embed/weight"] == 8
    assert parts["periods/0/blocks/0/mixer/inputs/q/kernel"] == 8
    assert_trees_close("initial", jax.device_get(state), jax.device_get(initial()), 0.0)


@MESHES
def test_training_runs_the_same_on_every_mesh_and_continues_on_one_device(sizes: dict[str, int], tmp_path):
    """The first gradient, and 20 losses: on 8 devices, on 1, and on 1 from a checkpoint that 8 saved half-way."""
    one, first = losses(initial(), 0, 1)
    _, want = losses(one, 1, STEPS)
    want = [*first, *want]
    early, late = np.mean(want[:4]), np.mean(want[-4:])  # the same four batches
    assert late < early * (1 - 20 * TOLERANCE["fp32_op"])

    state, first = losses(initial(**sizes), 0, 1, **sizes)
    moments = [jax.device_get(s["opt_state"][1].mu) for s in (state, one)]  # the gradient, clipped, times 1 - b1
    assert all(np.any(x) for x in moments[1].values())
    assert_trees_close("gradient", *moments, TOLERANCE["fp32_model"])
    state, before = losses(state, 1, STEPS // 2, **sizes)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(STEPS // 2, state, {}, {})
        _, after = losses(state, STEPS // 2, STEPS, **sizes)
        saved = checkpoints.restore(abstract_state(PLAN, TX, mesh()))
    for i, (loss, expected) in enumerate(zip([*first, *before, *after], want, strict=True)):
        assert_close(f"loss of step {i}", loss, expected, TOLERANCE["fp32_op"])
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(saved.state))
    assert_trees_close("restored", jax.device_get(saved.state), jax.device_get(state), 0.0)
    _, continued = losses(saved.state, STEPS // 2, STEPS)
    assert_close("continued", continued, want[STEPS // 2 :], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("vocab", "embed"), (128, 32), {"fsdp": 8}, (None, ("fsdp",))),
        (("vocab", "embed"), (128, 32), {"fsdp": 4, "tensor": 2}, (("tensor",), ("fsdp",))),
        (("embed", "heads", "head_dim"), (32, 4, 8), {"fsdp": 2, "tensor": 4}, (("fsdp",), ("tensor",), None)),
        (("embed", "heads", "head_dim"), (32, 3, 8), {"fsdp": 4, "tensor": 2}, (("fsdp",), None, None)),  # 3 heads
        (("embed", "embed"), (32, 32), {"fsdp": 8}, (("fsdp",), None)),  # an axis of the mesh serves once
        (("embed",), (32,), {"fsdp": 2, "context": 4}, (("fsdp", "context"),)),
        (("embed",), (6,), {"fsdp": 2, "context": 4}, (("fsdp",),)),  # the first row does not divide it
        (("embed",), (7,), {"fsdp": 8}, (None,)),
        (("batch", "seq", "act_embed"), (8, 16, 32), {"fsdp": 4, "context": 2}, (("fsdp",), ("context",), None)),
        (("layers", "norm"), (4, 32), {"fsdp": 8}, (None, None)),
    ],
)
def test_rules(axes: tuple, shape: tuple, sizes: dict[str, int], expected: tuple):
    assert rules.partition(axes, shape, mesh(**sizes)) == PartitionSpec(*expected)


def test_every_axis_of_a_parameter_is_known():
    """A misspelt logical axis would be replicated in silence."""
    small = {
        "conv",
        "depth",
        "distance",
        "ema",
        "embed_out",
        "feature",
        "gates",
        "kinds",
        "norm",
        "parts",
        "rank",
        "slots",
    }
    unsharded = small | {"layers", "head_dim", "state_k", "state_v"}
    known = unsharded | {axis for axis, _ in rules.RULES}
    plans = [PLAN, *(lm.blueprint(build(ModelConfig, {**MODEL, "pattern": name})) for name in mixers.names())]
    assert {axis for plan in plans for meta in plan.meta.values() for axis in meta.axes} <= known


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, (1, 8, 1, 1, 1)), ({"fsdp": 2, "tensor": -1}, (1, 2, 1, 1, 4)), ({"replica": 2}, (2, 4, 1, 1, 1))],
)
def test_sizes(sizes: dict[str, int], expected: tuple[int, ...]):
    assert build(MeshConfig, sizes).sizes(8) == expected
    assert rules.batch_shards(make_mesh(build(MeshConfig, sizes))) == np.prod(expected[:2])


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 16}, {"fsdp": 4}, {"replica": -1}])
def test_sizes_that_do_not_fit_the_devices(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match=r"mesh = .*: expected sizes whose product is the 8 devices, at most one -1"):
        build(MeshConfig, sizes).sizes(8)


def test_a_size_is_positive_or_minus_one():
    with pytest.raises(ConfigError, match=r"fsdp = 0: expected an integer >= 1, or -1"):
        build(MeshConfig, {"fsdp": 0})


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((2, 3))
    assert rules.constrain(x, ("batch", "seq")) is x


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}, {"context": 8}])
def test_one_process_holds_all_rows(sizes: dict[str, int]):
    assert rules.local_rows(mesh(**sizes), 16) == slice(0, 16)
