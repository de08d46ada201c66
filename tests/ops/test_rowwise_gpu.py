"""`glu` and `rms_norm` on Hopper without one: their kernels lowered for CUDA, and their bodies run by numpy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.eval.tolerances import op_tolerance
from hydrax.ops.rowwise import ACTIVATIONS, glu, gpu_glu, gpu_norm, rms_norm
from hydrax.ops.rowwise.cases import Case, inputs
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.tolerances import assert_close

CASES = {
    "gated": Case(1, 2, (32, 128), weight=True, gate=True),
    "sigmoid": Case(1, 3, (64, 64), weight=True, gate=True, activation="sigmoid"),
    "l2": Case(1, 2, (32, 128), mean=False),
    "tiles": Case(1, 2, (192, 64), weight=True),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """These ops can run their kernels, whatever the device."""
    monkeypatch.setattr("hydrax.ops.dispatch.hopper_refusal", lambda *_: None)


def problem(case: Case, dtype: str) -> tuple[dict[str, Array], Array]:
    """Inputs and the cotangent, all representable in bfloat16; weights stay in fp32."""
    x = {n: jnp.asarray(a, jnp.bfloat16).astype("float32" if n == "weight" else dtype) for n, a in inputs(case).items()}
    dy = np.random.default_rng(1).normal(size=x["x"].shape)
    return x, jnp.asarray(dy, jnp.bfloat16).astype(dtype)


def evaluate(op: Callable, impl: str, x: dict[str, Array], dy: Array) -> dict[str, Array]:
    y, pullback = jax.vjp(lambda x: op(**x, impl=impl), x)
    return {"o": y} | {f"d{n}": d for n, d in pullback(dy)[0].items()}


def check(op: Callable, case: Case, dtype: str) -> None:
    """The output and all gradients against the definition; by the kernels themselves where there is a GPU."""
    actual, expected = (
        jax.jit(functools.partial(evaluate, op, impl))(*problem(case, how))
        for impl, how in (("pallas_gpu", dtype), ("recurrent", "float32"))
    )
    assert actual.keys() == expected.keys()
    for what, value in actual.items():
        assert_close(what, value, expected[what], op_tolerance(what, dtype))


def check_norm(case: Case) -> None:
    check(functools.partial(rms_norm, activation=case.activation, mean=case.mean, eps=1e-5), case, "bfloat16")


def check_glu(case: Case, dtype: str) -> None:
    check(functools.partial(glu, activation=case.activation), case, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("emulated_gpu")
def test_norm_bodies_equal_the_definition(name: str) -> None:
    check_norm(CASES[name])


@pytest.mark.parametrize("dtype", gpu_glu.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("emulated_gpu")
def test_glu_bodies_equal_the_definition(activation: str | None, dtype: str) -> None:
    check_glu(Case(2, 3, (4096,), gate=True, activation=activation), dtype)


@pytest.mark.parametrize("name", CASES)
def test_norm_forward_and_backward_lower_for_cuda(name: str) -> None:
    case = CASES[name]
    op = functools.partial(rms_norm, activation=case.activation, mean=case.mean)
    assert lowered_kernels(functools.partial(evaluate, op, "pallas_gpu"), *problem(case, "bfloat16")) == 2


def test_glu_backward_lowers_for_cuda() -> None:
    case = Case(2, 3, (4096,), gate=True)
    assert lowered_kernels(functools.partial(evaluate, glu, "pallas_gpu"), *problem(case, "bfloat16")) == 1


@pytest.mark.parametrize(
    ("refusal", "shape", "dtype", "reason"),
    [
        (gpu_norm.refusal, (2, 64, 128), "float32", "x and gate are float32: expected bfloat16"),
        (gpu_norm.refusal, (2, 64, 96), "bfloat16", "rows of 96: expected 64 or 128"),
        (gpu_norm.refusal, (2, 33, 64), "bfloat16", "66 rows: expected a multiple of 64"),
        (gpu_norm.refusal, (2, 64, 64), "bfloat16", "the device is 'cpu': expected one of"),
        (gpu_glu.refusal, (2, 64, 64), "float16", "gate is float16, x float16: expected both float32 or bfloat16"),
        (gpu_glu.refusal, (3, 5, 64), "float32", "960 entries: expected a multiple of 4096"),
        (gpu_glu.refusal, (2, 64, 64), "float32", "the device is 'cpu': expected one of"),
    ],
)
def test_refusals_say_why(refusal: Callable, shape: tuple[int, ...], dtype: str, reason: str) -> None:
    x = jnp.zeros(shape, dtype)
    assert refusal(x, x).startswith(reason)
