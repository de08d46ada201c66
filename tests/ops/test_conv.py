"""`short_conv`: both forms against a loop over documents in numpy, with every gradient, and the state they hand on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.conv import short_conv
from hydrax.ops.conv.cases import CASES, Case, inputs
from tests.ops.matrix_state import documents
from tests.tolerances import TOLERANCE, assert_close, assert_equal

SHORT = Case(4, 6, (3,), 4)
SHORT_IDS = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [0] * 6], np.int32)
"""Last documents shorter than W - 1: one that continues the initial state, one that does not, one token, none."""


def oracle(
    x: dict[str, np.ndarray], ids: np.ndarray, activation: str | None, dilation: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Document by document: the inputs with what precedes them, then a dot product per token."""
    reach, y, states = x["initial_state"].shape[1], np.zeros_like(x["x"]), x["initial_state"].copy()
    for b, row in enumerate(ids):
        for document in dict.fromkeys(row[row != 0].tolist()):
            tokens = np.flatnonzero(row == document)
            before = x["initial_state"][b] if tokens[0] == 0 else np.zeros_like(states[b])
            stream = np.concatenate([before, x["x"][b, tokens]])
            for i, t in enumerate(tokens):
                z = (stream[i : i + reach + 1 : dilation] * x["w"]).sum(0) + x.get("b", 0)
                y[b, t] = z / (1 + np.exp(-z)) if activation == "silu" else z
            states[b] = stream[len(stream) - reach :]
    return y, states


@functools.cache
def evaluator(activation: str | None, impl: str, dilation: int = 1) -> Callable:
    @jax.jit
    def run(x: dict, ids: jax.Array | None, cotangents: tuple) -> tuple:
        f = functools.partial(short_conv, activation=activation, dilation=dilation, segment_ids=ids, impl=impl)
        (y, state), pullback = jax.vjp(lambda x: f(**x), x)
        return y, state, pullback(tuple(c.astype(y.dtype) for c in cotangents))[0]

    return run


def cotangents(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=x["x"].shape), rng.normal(size=x["initial_state"].shape)


def directional_derivative(x: dict, ids: np.ndarray, name: str, d: np.ndarray, *how: Any) -> float:
    def loss(a: np.ndarray) -> float:
        return sum(float((c * r).sum()) for c, r in zip(cotangents(x), oracle(x | {name: a}, ids, *how), strict=True))

    return (loss(x[name] + d) - loss(x[name] - d)) / 2


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", [*CASES, "short"])
def test_outputs_states_and_gradients_match_the_oracle(name: str, impl: str) -> None:
    case = SHORT if name == "short" else CASES[name]
    x, ids = inputs(case), SHORT_IDS if name == "short" else documents(case.B, case.T)
    with jax.enable_x64():
        run = evaluator(case.activation, impl, case.dilation)
        y, state, gradients = jax.tree.map(np.asarray, run(x, ids, cotangents(x)))
    y_ref, state_ref = oracle(x, ids, case.activation, case.dilation)
    assert_close("y", y, y_ref, 1e-12)
    assert_close("state", state, state_ref, 1e-12)
    for name, dx in gradients.items():
        for i in range(3):
            d = np.random.default_rng(i).normal(size=dx.shape) * 1e-5
            want = directional_derivative(x, ids, name, d, case.activation, case.dilation)
            assert_close(f"d{name}", (dx * d).sum(), want, 1e-7)


@pytest.mark.parametrize("name", ["bias_silu", "wider_than_row"])
def test_forms_agree_in_fp32_without_documents(name: str) -> None:
    case = CASES[name]
    x = {n: jnp.asarray(a, jnp.float32) for n, a in inputs(case).items()}
    chunked, recurrent = (evaluator(case.activation, i)(x, None, cotangents(x)) for i in ("chunked", "recurrent"))
    for what, a, e in zip(("y", "state"), chunked, recurrent, strict=False):
        assert_close(what, a, e, TOLERANCE["fp32_op"])
    for what, dx in chunked[2].items():
        assert_close(f"d{what}", dx, recurrent[2][what], TOLERANCE["fp32_op"])


def test_bf16_accumulates_in_fp32() -> None:
    case = CASES["bias_silu"]
    x, ids = inputs(case), documents(case.B, case.T)
    rounded = {n: jnp.asarray(a, jnp.bfloat16) for n, a in x.items()}
    y, state, _ = evaluator(case.activation, "chunked")(rounded, ids, cotangents(x))
    assert y.dtype == state.dtype == jnp.bfloat16
    y_ref, state_ref = oracle({n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids, case.activation)
    assert_close("y", y, y_ref, TOLERANCE["bf16_output"])
    assert_equal("state", state, state_ref)


@pytest.mark.parametrize("name", ["plain", "apart"])
@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_a_row_continues_from_its_state(split: int, name: str) -> None:
    case = CASES[name]
    x = {n: jnp.asarray(a, jnp.float32) for n, a in inputs(case).items()}
    run = functools.partial(short_conv, dilation=case.dilation)
    y, state = run(**x)
    y_a, state_a = run(**x | {"x": x["x"][:, :split]})
    y_b, state_b = run(**x | {"x": x["x"][:, split:], "initial_state": state_a})
    assert_close("y", jnp.concatenate([y_a, y_b], axis=1), y, TOLERANCE["fp32_op"])
    assert_equal("state", state_b, state)


def test_no_token_reads_the_future_or_another_document() -> None:
    case = CASES["long"]
    x = {n: jnp.asarray(a, jnp.float32) for n, a in inputs(case).items()}
    ids = jnp.asarray([[1] * 10 + [2] * 23])
    run = jax.jit(lambda x: short_conv(**x, activation=case.activation, segment_ids=ids)[0])
    for changed, same in ((np.s_[:, 7:], np.s_[:, :7]), (np.s_[:, :10], np.s_[:, 10:])):
        after = run(x | {"x": x["x"].at[changed].set(jnp.nan)})
        assert_equal("y", after[same], run(x)[same])


def test_what_cannot_be_served_is_refused() -> None:
    x = {n: jnp.asarray(a, jnp.float32) for n, a in inputs(CASES["plain"]).items()}
    for change, message in (
        ({"activation": "gelu"}, "activation = 'gelu'"),
        ({"initial_state": x["initial_state"][:, 1:]}, "initial_state"),
        ({"impl": "magic"}, "impl = 'magic'"),
        ({"dilation": 2}, "initial_state"),
        ({"dilation": 2, "initial_state": None, "impl": "pallas_gpu"}, "expected one of recurrent, chunked"),
    ):
        with pytest.raises(ValueError, match=message):
            short_conv(**x | change)
