"""`delta_rule`: every form against the recurrence in fp64, with every gradient, and the map of a token range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.delta import delta_rule, summarize
from hydrax.ops.delta.cases import CASES
from hydrax.ops.delta.solve import unit_lower_inverse
from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

CHUNKED = {"impl": "chunked", "chunk_size": 32}
REFLECTION = 64**2 * 2.0**-24
"""Tolerance for identical keys with beta = 2 and no decay: a chunk of C tokens is a system of condition ~C², and the
rounding of its fp32 coefficients alone moves the exact solution that far."""


def problem(name: str) -> tuple[ms.Inputs, np.ndarray]:
    case = CASES[name]
    return ms.inputs(case, beta=True), ms.documents(case.B, case.T)


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_recurrence(name: str) -> None:
    x, ids = problem(name)
    expected = ms.in_fp64(delta_rule, x, ids)
    for what, value in ms.oracle(x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, ids), expected)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", ["scalar_grouped", "vector"])
def test_gradients_match_finite_differences(name: str, impl: str) -> None:
    x, ids = problem(name)
    actual = ms.in_fp64(delta_rule, x, ids, impl)
    for what, (direction, value) in ms.directional_derivatives(x, ids).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


@pytest.mark.parametrize("chunk_size", [16, 32, 48, 64, 128, 256])
def test_results_do_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    case = Case(2, 300, 1, 2, 8, 8, "scalar")
    x, ids = ms.inputs(case, beta=True), ms.documents(case.B, case.T)
    actual = ms.in_fp32(ms.evaluator(delta_rule, impl="chunked", chunk_size=chunk_size), x, ids)
    ms.assert_matches(actual, ms.in_fp64(delta_rule, x, ids))


@pytest.mark.parametrize("name", ["scalar", "vector"])
@pytest.mark.parametrize("gate", ms.SATURATED)
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 2.0])
def test_saturated_gates_and_betas(name: str, gate: str, beta: float | None) -> None:
    x, ids = problem(name)
    x["log_decay"] = ms.SATURATED[gate](x["log_decay"].shape)
    if beta is not None:
        x["beta"] = np.full_like(x["beta"], beta)
    ms.assert_matches(ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, ids), ms.in_fp64(delta_rule, x, ids))


@pytest.mark.parametrize("name", ["scalar", "vector"])
@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.99])
def test_correlated_keys(name: str, correlation: float) -> None:
    """The systems whose inverse a power series gets wrong by a tenth: keys that resemble one another, beta near 2."""
    x, ids = problem(name)
    shared = x["k"][:, :1, :1]
    x["k"] = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * x["k"]
    x["k"] = (x["k"] / np.linalg.norm(x["k"], axis=-1, keepdims=True)).astype(np.float32)
    x["beta"], x["log_decay"] = np.full_like(x["beta"], 1.99), 1e-3 * x["log_decay"]
    tolerance = max(TOLERANCE["fp32_op"], condition(x["k"], 1.99) * 2.0**-24)
    actual, expected = ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, ids), ms.in_fp64(delta_rule, x, ids)
    ms.assert_matches(actual, expected, tolerance)


def condition(k: np.ndarray, beta: float) -> float:
    """That of the worst system of a chunk: so much do its solutions enlarge the rounding of its coefficients."""
    C = CHUNKED["chunk_size"]
    rows = [k[:, n : n + C].swapaxes(1, 2) for n in range(0, k.shape[1] - C + 1, C)]
    return max(np.linalg.cond(np.eye(C) + np.tril(beta * r @ r.swapaxes(2, 3), -1)).max() for r in rows)


@pytest.mark.parametrize(("beta", "gate"), [(0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (1.0, -1.0), (2.0, -1.0)])
def test_identical_keys(beta: float, gate: float) -> None:
    x, ids = problem("scalar")
    x["k"] = np.broadcast_to(x["k"][:, :1], x["k"].shape).astype(np.float32)
    x["beta"], x["log_decay"] = np.full_like(x["beta"], beta), np.full_like(x["log_decay"], gate)
    actual, expected = ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, ids), ms.in_fp64(delta_rule, x, ids)
    ms.assert_matches(actual, expected, REFLECTION if (beta, gate) == (2.0, 0.0) else TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["scalar_grouped", "vector"])
def test_bf16_keeps_fp32_states_and_gates(name: str) -> None:
    x, ids = problem(name)
    rounded = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(delta_rule, **CHUNKED)(rounded, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(delta_rule, {n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_the_past_does_not_depend_on_the_future(name: str) -> None:
    ms.assert_bit_causal(delta_rule, *problem(name), **CHUNKED)


def test_a_row_of_padding_keeps_its_state() -> None:
    x, ids = problem("scalar")
    actual = ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, 0 * ids)
    assert_equal("o", actual["o"], np.zeros_like(x["v"]))
    assert_equal("state", actual["state"], x["initial_state"].astype(np.float32))


@pytest.mark.parametrize("name", ["scalar_grouped", "vector"])
@pytest.mark.parametrize("packed", [False, True])
def test_summaries_compose_to_the_whole(name: str, packed: bool) -> None:
    x, ids = problem(name)
    ids = ids if packed else np.ones_like(ids)
    (Ma, Ua), (Mb, Ub), (M, U) = ms.summaries(summarize, x, ids, 32)
    assert_close("M", Mb @ Ma, M, TOLERANCE["fp32_op"])
    assert_close("U", Mb @ Ua + Ub, U, TOLERANCE["fp32_op"])
    state = ms.in_fp32(ms.evaluator(delta_rule, **CHUNKED), x, ids)["state"]
    assert_close("state", M @ x["initial_state"] + U, state, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("C", [1, 7, 32, 48])
def test_unit_lower_inverse_and_its_gradient(C: int) -> None:
    rng = np.random.default_rng(0)
    k = rng.normal(size=(3, C, 16)) + 1.0  # correlated
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    L = np.tril(1.5 * k @ k.swapaxes(1, 2), -1)
    dX = rng.normal(size=L.shape)
    upper = np.triu(np.full((C, C), 1e30))  # never read
    X, pullback = jax.vjp(jax.jit(unit_lower_inverse), jnp.asarray(L + upper, jnp.float32))
    expected = np.linalg.inv(np.eye(C) + L)
    assert_close("X", X, expected, TOLERANCE["fp32_op"])
    dL = -np.tril(expected.swapaxes(1, 2) @ dX @ expected.swapaxes(1, 2), -1)
    assert_close("dL", pullback(jnp.asarray(dX, jnp.float32))[0], dL, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "magic"}, "impl = 'magic'"),
        ({"log_decay": jnp.ones((2, 64, 3))}, "log_decay"),
    ],
    ids=["impl", "log_decay"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_rule(**ms.in_jax(problem("scalar")[0]) | change)
