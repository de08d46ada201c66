"""`linear_scan` on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.pallas.tuning import Tuning
from hydrax.ops.scan import gpu, linear_scan
from hydrax.ops.scan.cases import Linear
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu  # noqa: F401
from tests.ops.test_scan import inputs, real
from tests.tolerances import TOLERANCE, assert_close

ONE_PASS = Tuning(blocks=1)
SEGMENTS = Tuning(blocks=4)
CASES = {
    "tiles": (Linear(2, 64, (128,)), ONE_PASS),
    "odd": (Linear(2, 65, (2, 128)), ONE_PASS),
    "one_token": (Linear(2, 1, (128,)), ONE_PASS),
    "segments": (Linear(1, 512, (128,)), SEGMENTS),
}
DECAYS = {
    "nothing": (0.0,),
    "everything": (1.0,),
    "mixed": (0.0, -1.0, 1 - 2**-8, 2.0**-100, 0.5),
}
RUNS = [*((name, "float32") for name in CASES), ("odd", "bfloat16")]


def problem(name: str, dtype: str) -> tuple[ms.Inputs, dict, np.ndarray, Tuning]:
    """Inputs in fp64, the same in `dtype` with the values of the first, documents, tuning."""
    case, tuning = CASES[name]
    low = {n: jnp.asarray(x, jnp.float32 if n == "initial_state" else dtype) for n, x in inputs(case).items()}
    return {n: np.asarray(x, np.float64) for n, x in low.items()}, low, ms.documents(case.B, case.T), tuning


def by_kernels(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    """`linear_scan` runs its kernels, whatever the device."""
    monkeypatch.setattr("hydrax.ops.dispatch.hopper_refusal", lambda *_: None)
    monkeypatch.setattr(gpu, "TUNING", dict.fromkeys([jax.devices()[0].device_kind], tuning))


def evaluate(x: dict, cotangents: tuple, ids: np.ndarray | None) -> dict:
    op = functools.partial(real, impl="pallas_gpu", segment_ids=None if ids is None else jnp.asarray(ids))
    (o, h), pullback = jax.vjp(lambda x: op(**x), x)
    do, dh = cotangents
    gradients = pullback((jnp.asarray(do, o.dtype), jnp.asarray(dh, h.dtype)))[0]
    return {"o": o, "state": h} | {f"d{n}": dx for n, dx in gradients.items()}


def _check(exact: ms.Inputs, low: dict, ids: np.ndarray, packed: bool = True) -> None:
    """Outputs, state and all gradients against the recurrence; by the kernels themselves where there is a GPU."""
    expected = ms.in_fp64(real, exact, ids if packed else np.ones_like(ids))
    actual = evaluate(low, ms.cotangents(exact), ids if packed else None)
    assert actual.keys() == expected.keys()
    for what, value in actual.items():
        full = low["v"].dtype == jnp.float32
        assert_close(what, value, expected[what], TOLERANCE["fp32_op"] if full else ms.bf16_tolerance(what))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "dtype"), RUNS)
@pytest.mark.usefixtures("emulated_gpu")
def test_bodies_equal_the_recurrence(name: str, dtype: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(name, dtype, packed, monkeypatch)


def check_case(name: str, dtype: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, low, ids, tuning = problem(name, dtype)
    by_kernels(tuning, monkeypatch)
    _check(exact, low, ids, packed)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("emulated_gpu")
def test_decays_of_nothing_and_everything(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_decays(decay, monkeypatch)


def check_decays(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, low, ids, tuning = problem("odd", "float32")
    by_kernels(tuning, monkeypatch)
    exact["decay"] = np.random.default_rng(3).choice(DECAYS[decay], size=exact["decay"].shape)
    _check(exact, low | {"decay": jnp.asarray(exact["decay"], jnp.float32)}, ids)


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_forward_and_backward_lower_for_cuda(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, low, ids, tuning = problem(name, dtype)
    by_kernels(tuning, monkeypatch)
    allowed = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    run = jax.jit(functools.partial(evaluate, cotangents=ms.cotangents(exact), ids=ids))
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=[allowed])(low)
    assert exported.mlir_module().count("mosaic_gpu_v2") == (4 if name == "segments" else 2)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (jnp.zeros((1, 8, 128)), jnp.zeros((1, 8, 128)), "the device is 'cpu'"),
        (jnp.zeros((1, 8, 2, 65)), jnp.zeros((1, 8, 2, 65)), "130 channels"),
        (jnp.zeros((1, 8, 128)), jnp.zeros((1, 8, 128), jnp.bfloat16), "float32, bfloat16"),
        (jnp.zeros((1, 8, 128), jnp.complex64), jnp.zeros((1, 8, 128), jnp.complex64), "complex64"),
    ],
    ids=["device", "channels", "dtypes", "complex"],
)
def test_what_cannot_be_served_is_refused(a: jax.Array, b: jax.Array, message: str) -> None:
    assert message in gpu.refusal(a, b)


def test_without_a_gpu_the_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="impl = 'pallas_gpu' cannot serve: the device is 'cpu'"):
        linear_scan(jnp.zeros((1, 8, 128)), jnp.zeros((1, 8, 128)), impl="pallas_gpu")
