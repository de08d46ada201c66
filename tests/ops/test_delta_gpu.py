"""`delta_rule` on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.delta import delta_rule, gpu
from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.tolerances import assert_close

ONE_PASS = gpu.Tuning(blocks=1)
SEGMENTS = gpu.Tuning(blocks=8)
ROOM = gpu.Tuning(blocks=2)
"""For the columns of the values of one head, and halves of its row where chunks are independent."""
CASES = {
    "scalar": (Case(2, 70, 1, 1, 64, 64, "scalar"), ONE_PASS),
    "constant": (Case(2, 63, 1, 1, 64, 64, "constant"), ONE_PASS),
    "one_token": (Case(2, 1, 1, 1, 64, 64, "scalar"), ONE_PASS),
    "wide": (Case(1, 257, 1, 1, 128, 128, "scalar"), ONE_PASS),
    "grouped": (Case(1, 65, 1, 2, 64, 128, "scalar"), ONE_PASS),
    "wider_values": (Case(1, 65, 1, 1, 64, 256, "none"), ONE_PASS),
    "narrow_values": (Case(1, 130, 1, 2, 128, 64, "scalar"), ONE_PASS),
    "segments": (Case(1, 2048, 1, 1, 64, 64, "scalar"), SEGMENTS),
    "room": (Case(1, 1024, 1, 1, 64, 128, "scalar"), ROOM),
}
CORRELATED = (0.9, 1.0)


def problem(case: Case) -> tuple[ms.Inputs, dict, np.ndarray]:
    """Inputs in fp64, the same in bf16 and fp32 with the values of the first, documents."""
    low = {
        n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in ms.inputs(case, beta=True).items()
    }
    return {n: np.asarray(a, np.float64) for n, a in low.items()}, low, ms.documents(case.B, case.T)


def evaluate(x: dict, cotangents: tuple, ids: np.ndarray | None, tuning: gpu.Tuning) -> dict:
    """o, state and all gradients."""
    seg, scale = None if ids is None else jnp.asarray(ids), x["q"].shape[-1] ** -0.5

    def op(x: dict) -> tuple:
        inputs = (x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), seg, x["initial_state"])
        return gpu.fused(*inputs, scale=scale, tuning=tuning)

    (o, S), pullback = jax.vjp(op, x)
    do, dS = cotangents
    if ids is not None:
        do = do * (ids != 0)[:, :, None, None]
    gradients = pullback((jnp.asarray(do, o.dtype), jnp.asarray(dS, S.dtype)))[0]
    return {"o": o, "state": S} | {f"d{n}": a for n, a in gradients.items()}


def check(exact: dict, low: dict, ids: np.ndarray, packed: bool, tuning: gpu.Tuning) -> None:
    """Outputs, state and all gradients against the recurrence; by the kernels themselves where there is a GPU."""
    expected = ms.in_fp64(delta_rule, exact, ids if packed else np.ones_like(ids))
    for what, value in evaluate(low, ms.cotangents(exact), ids if packed else None, tuning).items():
        assert_close(what, value, expected[what], ms.bf16_tolerance(what))


def check_case(case: Case, tuning: gpu.Tuning, packed: bool) -> None:
    exact, low, ids = problem(case)
    check(exact, low, ids, packed, tuning)


def check_correlated(correlation: float) -> None:
    """Keys that resemble one another, written in full: what a power series of the chunk's system gets wrong."""
    case, tuning = CASES["scalar"]
    exact, low, ids = problem(case)
    k = np.sqrt(correlation) * exact["k"][:, :1, :1] + np.sqrt(1 - correlation) * exact["k"]
    low["k"] = jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), jnp.bfloat16)
    low["beta"] = jnp.ones_like(low["beta"])
    check({n: np.asarray(a, np.float64) for n, a in low.items()}, low, ids, False, tuning)


def check_gates(gates: Callable, case: Case, tuning: gpu.Tuning) -> None:
    """The same for log-decays `gates(shape)`, with documents."""
    exact, low, ids = problem(case)
    low["log_decay"] = jnp.asarray(gates(exact["log_decay"].shape), jnp.float32)
    check(exact | {"log_decay": np.float64(low["log_decay"])}, low, ids, True, tuning)


# Documents or none, rather than both: compiling the recurrence for yet another shape takes seconds.
@pytest.mark.parametrize(("name", "packed"), [(name, name not in ("constant", "wide")) for name in CASES])
def test_bodies_equal_the_recurrence(name: str, packed: bool, emulated_gpu: None) -> None:  # noqa: F811
    check_case(*CASES[name], packed)


@pytest.mark.parametrize("gate", ["-10", "-1e4", "mixed", "bursts"])
def test_saturated_gates(gate: str, emulated_gpu: None) -> None:  # noqa: F811
    check_gates(ms.SATURATED[gate], *CASES["scalar"])


@pytest.mark.parametrize("correlation", CORRELATED)
def test_correlated_keys(correlation: float, emulated_gpu: None) -> None:  # noqa: F811
    check_correlated(correlation)


@pytest.mark.parametrize(("name", "kernels"), [("wide", 4), ("narrow_values", 4), ("segments", 7), ("room", 4)])
def test_forward_and_backward_lower_for_cuda(name: str, kernels: int) -> None:
    check_lowering(*CASES[name], name == "narrow_values", kernels)


def check_lowering(case: Case, tuning: gpu.Tuning, packed: bool, kernels: int) -> None:
    """So many kernels, for outputs and all gradients."""
    exact, low, ids = problem(case)
    run = functools.partial(evaluate, cotangents=ms.cotangents(exact), ids=ids if packed else None, tuning=tuning)
    assert lowered_kernels(run, low) == kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the device is 'cpu'"),
        ({"q": jnp.zeros((1, 8, 1, 64))}, "bfloat16"),
        ({"v": jnp.zeros((1, 8, 1, 96), jnp.bfloat16)}, "K, V = 64, 96"),
    ],
    ids=["device", "fp32", "width"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    x = dict.fromkeys("qkv", jnp.zeros((1, 8, 1, 64), jnp.bfloat16)) | {"log_decay": None} | change
    assert message in gpu.refusal(**x)


def test_without_a_gpu_the_kernels_are_refused() -> None:
    x = dict.fromkeys("qkv", jnp.zeros((1, 8, 1, 64), jnp.bfloat16)) | {"beta": jnp.zeros((1, 8, 1))}
    with pytest.raises(ValueError, match="impl = 'pallas_gpu' cannot serve: the device is 'cpu'"):
        delta_rule(**x, impl="pallas_gpu")
