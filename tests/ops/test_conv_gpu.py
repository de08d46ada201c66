"""`short_conv` on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.eval.tolerances import op_tolerance
from hydrax.ops.conv import gpu, short_conv
from hydrax.ops.conv.cases import Case, inputs
from hydrax.ops.pallas.tuning import Tuning
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.tolerances import assert_close

CASES = {
    "ranges": Case(2, 65, (2, 64), 4, True, "silu"),
    "linear": Case(1, 40, (128,), 3, True),
    "one_tap": Case(1, 5, (128,), 1, False, "silu"),
    "one_token": Case(2, 1, (128,), 4, False, "silu"),
    "eight_taps": Case(2, 33, (128,), 8, False, "silu"),
}
RUNS = [*((name, "float32") for name in CASES), ("ranges", "bfloat16")]
SHORT = np.array([[1] * 31 + [2] * 2 + [3] + [0] * 31, [0] * 65], np.int32)
"""A document that lies on an edge of a range, padding that fills one, a row of nothing else."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`short_conv` can run its kernels, whatever the device; a range is one tile."""
    monkeypatch.setattr("hydrax.ops.conv.hopper_refusal", lambda *_: None)
    monkeypatch.setattr(gpu, "TUNING", dict.fromkeys([jax.devices()[0].device_kind], Tuning()))


def problem(name: str, dtype: str) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Inputs and cotangents, all representable in bfloat16."""
    case, rng = CASES[name], np.random.default_rng(1)
    x = {n: jnp.asarray(a, jnp.bfloat16).astype(dtype) for n, a in inputs(case).items()}
    return x, tuple(jnp.asarray(rng.normal(size=x[n].shape), jnp.bfloat16).astype(dtype) for n in ("x", "initial_state"))


def evaluate(
    impl: str, activation: str | None, ids: np.ndarray | None, x: dict[str, Array], cotangents: tuple[Array, Array]
) -> dict[str, Array]:
    seg = None if ids is None else jnp.asarray(ids)
    op = functools.partial(short_conv, activation=activation, segment_ids=seg, impl=impl)
    (y, state), pullback = jax.vjp(lambda x: op(**x), x)
    return {"o": y, "state": state} | {f"d{n}": d for n, d in pullback(cotangents)[0].items()}


def check_case(name: str, dtype: str, ids: np.ndarray | None) -> None:
    """Outputs, state and all gradients against the recurrence; by the kernels themselves where there is a GPU."""
    how = CASES[name].activation, ids
    actual = jax.jit(functools.partial(evaluate, "pallas_gpu", *how))(*problem(name, dtype))
    expected = jax.jit(functools.partial(evaluate, "recurrent", *how))(*problem(name, "float32"))
    assert actual.keys() == expected.keys()
    for what, value in actual.items():
        assert_close(what, value, expected[what], op_tolerance(what, dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "dtype"), RUNS)
@pytest.mark.usefixtures("emulated_gpu")
def test_bodies_equal_the_recurrence(name: str, dtype: str, packed: bool) -> None:
    case = CASES[name]
    check_case(name, dtype, ms.documents(case.B, case.T) if packed else None)


@pytest.mark.usefixtures("emulated_gpu")
def test_documents_at_the_edges_of_ranges() -> None:
    check_case("ranges", "float32", SHORT)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_forward_and_backward_lower_for_cuda(name: str, dtype: str, packed: bool) -> None:
    case = CASES[name]
    ids = ms.documents(case.B, case.T) if packed else None
    assert lowered_kernels(functools.partial(evaluate, "pallas_gpu", case.activation, ids), *problem(name, dtype)) == 2
