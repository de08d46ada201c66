"""One token of the ops with a matrix state on Hopper without one: lowered for CUDA, and the body run by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.linear.cases import Case
from hydrax.ops.pallas import step
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu  # noqa: F401
from tests.tolerances import TOLERANCE, assert_close

OPS = {"linear": linear_attention, "delta": delta_rule}
DECAYS = ("none", "constant", "scalar", "vector")
SHAPES = {
    "square": (1, 1, 64, 64),
    "grouped": (2, 4, 128, 128),
    "wide values": (1, 2, 96, 192),
}
RUNS = [(op, decay, "square", "bfloat16") for op in OPS for decay in DECAYS] + [
    ("linear", "scalar", "grouped", "float32"),
    ("delta", "vector", "grouped", "bfloat16"),
    ("delta", "scalar", "wide values", "float32"),
]


def problem(op: str, decay: str, shape: str, dtype: str) -> dict[str, Array]:
    x = ms.inputs(Case(2, 1, *SHAPES[shape], decay), beta=op == "delta")
    return {name: jnp.asarray(a, dtype if name in "qkv" else jnp.float32) for name, a in x.items()}


def evaluate(op: str, x: dict[str, Array], ids: np.ndarray | None) -> tuple[Array, Array]:
    names = ("q", "k", "v", *(["beta"] if op == "delta" else []), "log_decay", "segment_ids", "initial_state")

    def form(*inputs: Array | None) -> tuple[Array, Array]:
        return OPS[op](**dict(zip(names, inputs, strict=True)), impl="recurrent")

    x = x | {"segment_ids": None if ids is None else jnp.asarray(ids)}
    return step.step(form, x["q"].shape[-1] ** -0.5, *(x.get(name) for name in names))


def check_case(op: str, decay: str, shape: str, dtype: str, packed: bool) -> None:
    """Output and state against the recurrence; by the kernel itself where there is a GPU."""
    x = problem(op, decay, shape, dtype)
    ids = np.array([[3], [0]], np.int32) if packed else np.ones((2, 1), np.int32)  # a document, padding
    expected = ms.oracle({name: np.asarray(a, np.float64) for name, a in x.items()}, ids)
    o, S = jax.jit(functools.partial(evaluate, op, ids=ids if packed else None))(x)
    assert o.dtype == x["v"].dtype
    assert S.dtype == jnp.float32
    assert_close("state", S, expected["state"], TOLERANCE["fp32_op"])
    assert_close("o", o, expected["o"], TOLERANCE["fp32_op" if dtype == "float32" else "bf16_output"])


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "decay", "shape", "dtype"), RUNS)
@pytest.mark.usefixtures("emulated_gpu")
def test_body_equals_the_recurrence(op: str, decay: str, shape: str, dtype: str, packed: bool) -> None:
    check_case(op, decay, shape, dtype, packed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("emulated_gpu")
def test_padding_leaves_the_state(op: str) -> None:
    check_case(op, "constant", "square", "float32", True)


@pytest.mark.parametrize(("op", "decay", "shape", "dtype"), RUNS)
def test_lowers_for_cuda_in_place(op: str, decay: str, shape: str, dtype: str) -> None:
    run = jax.jit(functools.partial(evaluate, op, ids=np.ones((2, 1), np.int32)))
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    module = jax.export.export(run, platforms=["cuda"], disabled_checks=[check])(problem(op, decay, shape, dtype))
    assert module.mlir_module().count("mosaic_gpu_v2") == 1
    assert "output_operand_alias<output_tuple_indices = [1]" in module.mlir_module()


@pytest.mark.parametrize("op", OPS)
def test_another_form_gives_the_gradient(op: str) -> None:
    """On any machine: no kernel runs."""
    x, ids = ms.inputs(Case(2, 1, *SHAPES["square"], "scalar"), beta=op == "delta"), np.array([[3], [0]], np.int32)
    with jax.enable_x64():
        (o, S), pullback = jax.vjp(lambda x: evaluate(op, x, ids), jax.tree.map(jnp.asarray, x))
        gradients = pullback(tuple(map(jnp.asarray, ms.cotangents(x))))[0]
    actual = {"o": o, "state": S} | {f"d{name}": a for name, a in gradients.items()}
    ms.assert_matches(actual, ms.in_fp64(OPS[op], x, ids), TOLERANCE["fp64"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the device is 'cpu'"),
        ({"q": jnp.zeros((1, 1, 1, 64), jnp.float16)}, "float16"),
        ({"v": jnp.zeros((1, 1, 1, 96))}, "K, V = 64, 96"),
    ],
    ids=["device", "fp16", "width"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    assert message in step.refusal(**dict.fromkeys("qkv", jnp.zeros((1, 1, 1, 64))) | change)
