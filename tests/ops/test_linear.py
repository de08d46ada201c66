"""`linear_attention`: every form against the recurrence in fp64, with every gradient, and the map of a token range."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.linear import linear_attention, summarize
from hydrax.ops.linear.cases import CASES, Case
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

CHUNKED = {"impl": "chunked", "chunk_size": 32}


def problem(name: str) -> tuple[ms.Inputs, np.ndarray]:
    case = CASES[name]
    return ms.inputs(case, beta=False), ms.documents(case.B, case.T)


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_recurrence(name: str) -> None:
    x, ids = problem(name)
    expected = ms.in_fp64(linear_attention, x, ids)
    for what, value in ms.oracle(x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(linear_attention, **CHUNKED), x, ids), expected)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", ["scalar_grouped", "vector"])
def test_gradients_match_finite_differences(name: str, impl: str) -> None:
    x, ids = problem(name)
    actual = ms.in_fp64(linear_attention, x, ids, impl)
    for what, (direction, value) in ms.directional_derivatives(x, ids).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("chunk_size", [16, 32, 48, 64, 128, 256])
def test_results_do_not_depend_on_the_chunk_size(decay: str, chunk_size: int) -> None:
    case = Case(2, 300, 1, 2, 8, 8, decay)
    x, ids = ms.inputs(case, beta=False), ms.documents(case.B, case.T)
    actual = ms.in_fp32(ms.evaluator(linear_attention, impl="chunked", chunk_size=chunk_size), x, ids)
    ms.assert_matches(actual, ms.in_fp64(linear_attention, x, ids))


@pytest.mark.parametrize("name", ["scalar", "vector"])
@pytest.mark.parametrize("gate", ms.SATURATED)
def test_saturated_gates(name: str, gate: str) -> None:
    x, ids = problem(name)
    x["log_decay"] = ms.SATURATED[gate](x["log_decay"].shape)
    actual = ms.in_fp32(ms.evaluator(linear_attention, **CHUNKED), x, ids)
    ms.assert_matches(actual, ms.in_fp64(linear_attention, x, ids))


@pytest.mark.parametrize("name", ["scalar_grouped", "vector"])
def test_bf16_keeps_fp32_states_and_gates(name: str) -> None:
    x, ids = problem(name)
    rounded = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(linear_attention, **CHUNKED)(rounded, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(linear_attention, {n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_the_past_does_not_depend_on_the_future(name: str) -> None:
    ms.assert_bit_causal(linear_attention, *problem(name), **CHUNKED)


def test_a_row_of_padding_keeps_its_state() -> None:
    x, ids = problem("scalar")
    actual = ms.in_fp32(ms.evaluator(linear_attention, **CHUNKED), x, 0 * ids)
    assert_equal("o", actual["o"], np.zeros_like(x["v"]))
    assert_equal("state", actual["state"], x["initial_state"].astype(np.float32))


@pytest.mark.parametrize("name", ["constant", "scalar_grouped", "vector"])
@pytest.mark.parametrize("packed", [False, True])
def test_summaries_compose_to_the_whole(name: str, packed: bool) -> None:
    x, ids = problem(name)
    ids = ids if packed else np.ones_like(ids)
    (Ma, Ua), (Mb, Ub), (M, U) = ms.summaries(summarize, x, ids, 32)
    assert_close("M", Mb * Ma, M, TOLERANCE["fp32_op"])
    assert_close("U", Mb[..., None] * Ua + Ub, U, TOLERANCE["fp32_op"])
    state = ms.in_fp32(ms.evaluator(linear_attention, **CHUNKED), x, ids)["state"]
    assert_close("state", M[..., None] * x["initial_state"] + U, state, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"impl": "magic"}, "impl = 'magic'"), ({"log_decay": jnp.ones((2, 64, 3))}, "log_decay")],
    ids=["impl", "log_decay"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**ms.in_jax(problem("scalar")[0]) | change)
