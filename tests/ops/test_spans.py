"""Long rows: what lives between the passes, and what several spans give, for every op that runs span by span."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops import spans
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.linear.cases import Case
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close

OPS: dict[str, tuple[Callable, str]] = {
    "linear-none": (linear_attention, "none"),
    "linear-scalar": (linear_attention, "scalar"),
    "linear-vector": (linear_attention, "vector"),
    "delta-scalar": (delta_rule, "scalar"),
    "delta-vector": (delta_rule, "vector"),
}


def problem(op: str, T: int, K: int) -> tuple[Callable, ms.Inputs]:
    f, decay = OPS[op]
    return f, ms.inputs(Case(1, T, 1, 1, K, K, decay), beta=f is delta_rule)


@pytest.mark.parametrize("op", OPS)
def test_several_spans_equal_one(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents and an initial state across spans of 32 tokens; the last span is not full."""
    f, x = problem(op, 150, 8)
    ids = ms.documents(1, 150)
    ids[:, 64:110] = 50  # starts with a span, ends within another
    expected = ms.in_fp64(f, x, ids)
    monkeypatch.setitem(spans.SPANS, "cpu", 32)
    ms.assert_matches(ms.in_fp32(ms.evaluator.__wrapped__(f, impl="chunked", chunk_size=16), x, ids), expected)


@pytest.mark.parametrize("op", OPS)
def test_memory_grows_with_the_inputs_not_with_a_state_per_token(op: str) -> None:
    """Doubling T may add what the inputs, outputs and their gradients need, a few times over."""
    K = 64

    def compiled_bytes(T: int) -> int:
        f, x = problem(op, T, K)
        shapes = {n: jax.ShapeDtypeStruct(a.shape, jnp.float32) for n, a in x.items()}
        grad = jax.grad(lambda x: f(**x)[0].sum() + f(**x)[1].sum())
        return jax.jit(grad).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    T = 2 * spans.SPANS["cpu"]
    growth = (compiled_bytes(2 * T) - compiled_bytes(T)) / T
    inputs = sum(a.nbytes for a in problem(op, T, K)[1].values()) / 2 / T  # fp64 -> fp32
    assert growth < 4 * inputs < 4 * K * K / 2, f"{growth:.0f} bytes per token for inputs of {inputs:.0f}"


def test_a_long_row_in_fp32_keeps_its_accuracy() -> None:
    """The error of outputs does not grow along 16 spans: fp32 states against the recurrence in fp64."""
    f, x = problem("delta-scalar", 16 * spans.SPANS["cpu"], 8)
    x["log_decay"] *= 0.01
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(f, impl="recurrent"))(**{n: jnp.asarray(a) for n, a in x.items()})[0]
    got = jax.jit(functools.partial(f, impl="chunked"))(**ms.in_jax(x))[0]
    assert_close("first tokens", got[:, :512], want[:, :512], TOLERANCE["fp32_op"])
    assert_close("last tokens", got[:, -512:], np.asarray(want)[:, -512:], TOLERANCE["fp32_op"])
