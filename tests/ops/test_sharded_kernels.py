"""Hopper kernels inside a `jax.shard_map` over rows and heads: lowered for CUDA, chosen, and run by numpy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from hydrax.core.typing import Array, PyTree
from hydrax.ops.delta import delta_rule, gpu as delta_kernels
from hydrax.ops.dispatch import select_fast
from hydrax.ops.linear import FORMS, gpu as linear_kernels, linear_attention
from hydrax.ops.linear.cases import Case
from hydrax.ops.pallas import step
from hydrax.ops.pallas.tuning import Tuning
from hydrax.ops.rowwise import glu, rms_norm
from hydrax.ops.scan import gpu as scan_kernels, linear_scan
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401


def _stateless(op: Callable) -> Callable:
    """With a state of its inputs."""
    return lambda x, *, segment_ids, **others: (op(x=x, **others), x[:, 0])


OPS: dict[str, Callable] = {
    "linear": linear_attention,
    "delta": delta_rule,
    "scan": linear_scan,
    "norm": _stateless(rms_norm),
    "glu": _stateless(glu),
}
ONE_PASS, SEGMENTS = Tuning(blocks=1), Tuning(blocks=8)
TOKENS, HEADS, STATE = P("rows", None, "heads"), P("heads"), P("rows", "heads")
"""How inputs, constant decays and states are divided; documents are by "rows" alone."""


def problem(op: str, decay: str, T: int = 65, B: int = 4, H: int = 2) -> dict[str, Array]:
    if op == "scan":
        shape = (B, T, H, 128)
        a, b = np.random.default_rng(0).uniform(0.0, 1.0, (2, *shape))
        return {"a": jnp.asarray(a, jnp.bfloat16), "b": jnp.asarray(b, jnp.bfloat16)}
    if op in ("norm", "glu"):
        x, gate = np.random.default_rng(0).normal(size=(2, B, 64, H, 64))
        weight = {"weight": jnp.linspace(0.5, 2, 64)} if op == "norm" else {}
        return {"x": jnp.asarray(x, jnp.bfloat16), "gate": jnp.asarray(gate, jnp.bfloat16), **weight}
    x = ms.inputs(Case(B, T, H, H, 64, 64, decay), beta=op == "delta")
    del x["initial_state"]
    return {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}


def mesh_of(rows: int, heads: int) -> Mesh:
    devices = jax.devices()[: rows * heads]
    return jax.make_mesh((rows, heads), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def evaluate(op: str, seg: Array | None, x: dict[str, Array]) -> tuple:
    """o, state and all gradients of the sum of squares of o."""

    def loss(x: dict[str, Array]) -> tuple[Array, tuple]:
        o, state = OPS[op](**x, segment_ids=seg, impl="pallas_gpu")
        return jnp.square(o.astype(jnp.float32)).sum(), (o, state)

    gradients, outputs = jax.grad(loss, has_aux=True)(x)
    return outputs, gradients


def sharded(op: str, x: PyTree, mesh: Mesh, check_vma: bool = True) -> Callable:
    """`evaluate(op, seg, x)`, each device doing its rows and heads."""
    specs = {n: P() if n == "weight" else HEADS if a.ndim == 1 else TOKENS for n, a in x.items()}
    return jax.shard_map(
        functools.partial(evaluate, op),
        mesh=mesh,
        in_specs=(P("rows"), specs),
        out_specs=((TOKENS, STATE), specs),
        check_vma=check_vma,
    )


def check_equals_unsharded(op: str, mesh: Mesh) -> None:
    """All bits, but of sums over devices; by the kernels themselves where there is a GPU."""
    x, seg = problem(op, "scalar", 32, B=2, H=1), jnp.asarray(ms.documents(2, 32))
    expected = jax.jit(functools.partial(evaluate, op))(seg, x)
    actual = jax.jit(sharded(op, x, mesh))(seg, x)
    summed = actual[1].pop("weight", 0), expected[1].pop("weight", 0)
    np.testing.assert_allclose(*summed, rtol=1e-5, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tuning], None]:
    """Ops run kernels, whatever the device."""

    def run(tuning: Tuning) -> None:
        monkeypatch.setattr("hydrax.ops.dispatch.hopper_refusal", lambda *_: None)
        for module in (linear_kernels, delta_kernels, scan_kernels, step):
            monkeypatch.setattr(module, "TUNING", dict.fromkeys([jax.devices()[0].device_kind], tuning))

    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("op", "decay", "check_vma"),
    [
        ("linear", "scalar", True),
        pytest.param("linear", "vector", True, marks=SLOW),
        pytest.param("delta", "constant", True, marks=SLOW),
        ("delta", "vector", True),
        ("scan", "", True),
        ("scan", "", False),
        ("norm", "", True),
        ("glu", "", True),
        pytest.param("linear", "none", True, marks=SLOW),
        pytest.param("linear", "scalar", False, marks=SLOW),
        pytest.param("delta", "none", True, marks=SLOW),
        pytest.param("delta", "scalar", True, marks=SLOW),
        pytest.param("linear", "vector", False, marks=SLOW),
        pytest.param("delta", "scalar", False, marks=SLOW),
        pytest.param("delta", "vector", False, marks=SLOW),
    ],
)
def test_forward_and_backward_lower_for_cuda(op: str, decay: str, check_vma: bool, kernels: Callable) -> None:
    kernels(ONE_PASS)
    x, seg = problem(op, decay), jnp.asarray(ms.documents(4, 65))
    number = {"linear": 3, "delta": 4, "scan": 2, "norm": 2, "glu": 1}[op] + ((op, decay) == ("linear", "vector"))
    assert lowered_kernels(sharded(op, x, mesh_of(4, 2), check_vma), seg, x) == number


@pytest.mark.parametrize(
    ("op", "decay", "number"),
    [
        pytest.param("linear", "scalar", 5, marks=SLOW),
        pytest.param("linear", "vector", 6, marks=SLOW),
        pytest.param("delta", "scalar", 7, marks=SLOW),
        pytest.param("delta", "vector", 7, marks=SLOW),
        ("scan", "", 4),
    ],
)
def test_segments_lower_for_cuda(op: str, decay: str, number: int, kernels: Callable) -> None:
    kernels(SEGMENTS)
    x, seg = problem(op, decay, 2048), jnp.asarray(ms.documents(4, 2048))
    assert lowered_kernels(sharded(op, x, mesh_of(4, 2)), seg, x) == number


@pytest.mark.parametrize("op", ["linear", "delta"])
def test_one_token_lowers_for_cuda(op: str, kernels: Callable) -> None:
    kernels(ONE_PASS)
    x = problem(op, "scalar", 1)
    run = jax.shard_map(lambda x: OPS[op](**x), mesh=mesh_of(4, 2), in_specs=TOKENS, out_specs=(TOKENS, STATE))
    assert lowered_kernels(run, x) == 1


def test_the_derivative_of_constant_decays_is_lowered(kernels: Callable) -> None:
    """By XLA; it is summed over rows."""
    kernels(ONE_PASS)
    x, seg = problem("linear", "constant"), jnp.asarray(ms.documents(4, 65))
    assert lowered_kernels(sharded("linear", x, mesh_of(4, 2)), seg, x) == 0


@pytest.mark.parametrize("op", OPS)
def test_bodies_equal_those_unsharded(op: str, kernels: Callable, emulated_gpu: None) -> None:  # noqa: F811
    kernels(ONE_PASS)
    check_equals_unsharded(op, mesh_of(2, 1))


def test_arrays_of_one_device_are_served_by_default(kernels: Callable) -> None:
    kernels(ONE_PASS)
    q, chosen = jnp.zeros((4, 8, 2, 64), jnp.bfloat16), []

    def op(q: Array) -> Array:
        chosen.append(select_fast("linear_attention", None, FORMS, "", q, q, q, None))
        return q

    op(q)
    for axes in ({"rows"}, {"rows", "heads"}):
        rows = P("rows")
        jax.eval_shape(jax.shard_map(op, mesh=mesh_of(4, 2), in_specs=rows, out_specs=rows, axis_names=axes), q)
    assert chosen == [FORMS["chunked"], FORMS["chunked"], FORMS["pallas_gpu"]]
