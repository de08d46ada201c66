"""`linear_attention` on Hopper without one: its kernels lowered for CUDA, and their bodies run by numpy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.linear import by_form, forms, gpu, linear_attention
from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms
from tests.ops.emulated_gpu import emulated_gpu, lowered_kernels  # noqa: F401
from tests.tolerances import assert_close

ONE_PASS = gpu.Tuning(blocks=1)
SEGMENTS = gpu.Tuning(blocks=8)
CASES = {
    "none": (Case(2, 65, 1, 1, 64, 64, "none"), ONE_PASS),
    "constant": (Case(2, 128, 1, 1, 128, 128, "constant"), ONE_PASS),
    "constant_odd": (Case(2, 63, 1, 1, 64, 64, "constant"), ONE_PASS),
    "one_token": (Case(2, 1, 1, 1, 64, 64, "scalar"), ONE_PASS),
    "scalar": (Case(1, 257, 1, 1, 128, 128, "scalar"), ONE_PASS),
    "grouped": (Case(1, 300, 1, 2, 64, 128, "scalar"), ONE_PASS),
    "wide_values": (Case(1, 70, 1, 1, 64, 256, "constant"), ONE_PASS),
    "narrow_values": (Case(1, 130, 1, 2, 128, 64, "scalar"), ONE_PASS),
    "segments": (Case(1, 1024, 1, 1, 64, 64, "scalar"), SEGMENTS),
    "constant_segments": (Case(1, 1024, 1, 1, 64, 64, "constant"), SEGMENTS),
}
FACTS = ("none", "constant", "constant_segments", "scalar")
"""Cases that show all that is different without documents."""
RUNS = [
    pytest.param(name, packed, marks=() if packed or name in FACTS else pytest.mark.slow)
    for name in CASES
    for packed in (False, True)
]


def problem(case: Case) -> tuple[ms.Inputs, dict, np.ndarray]:
    """Inputs in fp64, the same in bf16 and fp32 with the values of the first, documents."""
    x = ms.inputs(case, beta=False)
    low = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    return {n: np.asarray(a, np.float64) for n, a in low.items()}, low, ms.documents(case.B, case.T)


def evaluate(x: dict, cotangents: tuple, ids: np.ndarray | None, tuning: gpu.Tuning, *, learned: bool = False) -> dict:
    """o, state and all gradients; those of constant decays if `learned`."""
    seg, scale = None if ids is None else jnp.asarray(ids), x["q"].shape[-1] ** -0.5
    form = functools.partial(by_form, forms.chunked, scale)
    fixed = {n: a for n, a in x.items() if n == "log_decay" and a.ndim == 1 and not learned}

    def op(own: dict) -> tuple:
        x = own | fixed
        inputs = (x["q"], x["k"], x["v"], x.get("log_decay"), seg, x["initial_state"])
        return gpu.fused(*inputs, scale=scale, form=form, tuning=tuning)

    (o, S), pullback = jax.vjp(op, {n: a for n, a in x.items() if n not in fixed})
    do, dS = cotangents
    if ids is not None:
        do = do * (ids != 0)[:, :, None, None]
    gradients = pullback((jnp.asarray(do, o.dtype), jnp.asarray(dS, S.dtype)))[0]
    return {"o": o, "state": S} | {f"d{n}": a for n, a in gradients.items()}


def check_case(case: Case, tuning: gpu.Tuning, packed: bool) -> None:
    """Outputs, state and all gradients against the recurrence; by the kernels themselves where there is a GPU."""
    exact, low, ids = problem(case)
    expected = ms.in_fp64(linear_attention, exact, ids if packed else np.ones_like(ids))
    actual = evaluate(low, ms.cotangents(exact), ids if packed else None, tuning)
    assert expected.keys() - actual.keys() == ({"dlog_decay"} if case.decay == "constant" else set())
    for what, value in actual.items():
        assert_close(what, value, expected[what], ms.bf16_tolerance(what))


@pytest.mark.parametrize(("name", "packed"), RUNS)
def test_bodies_equal_the_recurrence(name: str, packed: bool, emulated_gpu: None) -> None:  # noqa: F811
    check_case(*CASES[name], packed)


def test_another_form_gives_the_gradient_of_constant_decays() -> None:
    """On any machine: no kernel runs."""
    case, tuning = CASES["constant"]
    exact, low, ids = problem(case)
    expected = ms.in_fp64(linear_attention, exact, ids)
    for what, value in evaluate(low, ms.cotangents(exact), ids, tuning, learned=True).items():
        assert_close(what, value, expected[what], ms.bf16_tolerance(what))


@pytest.mark.parametrize(
    "gate",
    [g if g in ("-10", "-1e4", "mixed", "bursts") else pytest.param(g, marks=pytest.mark.slow) for g in ms.SATURATED],
)
def test_saturated_gates(gate: str, emulated_gpu: None) -> None:  # noqa: F811
    check_gates(ms.SATURATED[gate], *CASES["grouped"])


def check_gates(gates: Callable, case: Case, tuning: gpu.Tuning) -> None:
    """The same for log-decays `gates(shape)`, with documents."""
    exact, low, ids = problem(case)
    exact["log_decay"] = gates(exact["log_decay"].shape)
    low["log_decay"] = jnp.asarray(exact["log_decay"], jnp.float32)
    expected = ms.in_fp64(linear_attention, exact | {"log_decay": np.float64(low["log_decay"])}, ids)
    for what, value in evaluate(low, ms.cotangents(exact), ids, tuning).items():
        assert_close(what, value, expected[what], ms.bf16_tolerance(what))


@pytest.mark.parametrize(("name", "packed"), RUNS)
def test_forward_and_backward_lower_for_cuda(name: str, packed: bool) -> None:
    check_lowering(*CASES[name], packed, 5 if "segments" in name else 3)


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
    x = dict.fromkeys("qkv", jnp.zeros((1, 8, 1, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match="impl = 'pallas_gpu' cannot serve: the device is 'cpu'"):
        linear_attention(**x, impl="pallas_gpu")
