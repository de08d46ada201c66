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
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.tolerances import assert_close

CASES = {
    "ranges": Case(2, 25, (2, 64), 4, True, "silu"),
    "relu": Case(1, 8, (128,), 2, False, "relu"),
    "elu1": Case(1, 8, (128,), 2, True, "elu1"),
    "one_tap": Case(1, 5, (128,), 1, False, "silu"),
    "one_token": Case(2, 1, (128,), 4, False, "silu"),
    "eight_taps": Case(1, 17, (128,), 8),
}
EDGES = np.array([[1] * 15 + [2] * 2 + [3] + [0] * 7, [0] * 25], np.int32)
"""Documents that begin beside the edge of a range, padding, a row of nothing else."""
RUNS = {
    "ranges": ("ranges", "float32", EDGES),
    "undivided": ("ranges", "bfloat16", None),
    **{name: (name, "float32", ms.documents(CASES[name].B, CASES[name].T)) for name in CASES if name != "ranges"},
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`short_conv` can run its kernels, whatever the device; tiles and ranges are short."""
    monkeypatch.setattr("hydrax.ops.dispatch.hopper_refusal", lambda *_: None)
    monkeypatch.setattr(gpu, "TILE", 8)
    monkeypatch.setattr(gpu, "TILES", 2)


def problem(case: Case, dtype: str) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Inputs and cotangents, all representable in bfloat16."""
    rng = np.random.default_rng(1)
    x = {n: jnp.asarray(a, jnp.bfloat16).astype(dtype) for n, a in inputs(case).items()}
    return x, tuple(
        jnp.asarray(rng.normal(size=x[n].shape), jnp.bfloat16).astype(dtype) for n in ("x", "initial_state")
    )


def evaluate(
    impl: str, activation: str | None, ids: np.ndarray | None, x: dict[str, Array], cotangents: tuple[Array, Array]
) -> dict[str, Array]:
    seg = None if ids is None else jnp.asarray(ids)
    op = functools.partial(short_conv, activation=activation, segment_ids=seg, impl=impl)
    (y, state), pullback = jax.vjp(lambda x: op(**x), x)
    return {"o": y, "state": state} | {f"d{n}": d for n, d in pullback(cotangents)[0].items()}


def check_case(case: Case, dtype: str, ids: np.ndarray | None) -> None:
    """Outputs, state and all gradients against the recurrence; by the kernels themselves where there is a GPU."""
    actual, expected = (
        jax.jit(functools.partial(evaluate, impl, case.activation, ids))(*problem(case, how))
        for impl, how in (("pallas_gpu", dtype), ("recurrent", "float32"))
    )
    assert actual.keys() == expected.keys()
    for what, value in actual.items():
        assert_close(what, value, expected[what], op_tolerance(what, dtype))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("emulated_gpu")
def test_bodies_equal_the_recurrence(name: str) -> None:
    case, *how = RUNS[name]
    check_case(CASES[case], *how)


@pytest.mark.parametrize("name", ["ranges", "elu1", "one_tap"])
def test_forward_and_backward_lower_for_cuda(name: str) -> None:
    case, dtype, ids = RUNS[name]
    run = functools.partial(evaluate, "pallas_gpu", CASES[case].activation, ids)
    assert lowered_kernels(run, *problem(CASES[case], dtype)) == 2


def test_tiles_as_on_the_device_lower_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("hydrax.ops.dispatch.hopper_refusal", lambda *_: None)
    case = Case(2, 1024, (256,), 4, False, "silu")
    assert lowered_kernels(functools.partial(evaluate, "pallas_gpu", "silu", None), *problem(case, "bfloat16")) == 2


def test_the_kernels_are_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = problem(CASES["ranges"], "bfloat16")
    monkeypatch.setattr(gpu, "fused", None)
    jax.eval_shape(lambda x: short_conv(**x), x)


@pytest.mark.parametrize(
    ("x", "taps", "message"),
    [
        (jnp.zeros((1, 8, 128)), 4, "the device is 'cpu'"),
        (jnp.zeros((1, 8, 2, 65)), 4, "130 channels"),
        (jnp.zeros((1, 8, 128)), 9, "9 taps"),
        (jnp.zeros((1, 8, 128), jnp.float16), 4, "float16"),
    ],
    ids=["device", "channels", "taps", "dtype"],
)
def test_what_cannot_be_served_is_refused(x: Array, taps: int, message: str) -> None:
    assert message in gpu.refusal(x, jnp.zeros((taps, *x.shape[2:])))


def test_without_a_gpu_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="impl = 'pallas_gpu' cannot serve: the device is 'cpu'"):
        short_conv(jnp.zeros((1, 8, 128)), jnp.zeros((4, 128)), impl="pallas_gpu")


def test_no_tokens_are_no_reason_to_refuse() -> None:
    """Before the first token there are none of a convolution of one tap."""
    assert "the device is" in gpu.refusal(jnp.zeros((1, 0, 128), jnp.bfloat16), jnp.zeros((1, 128)))
