"""The TPU kernels of `linear_attention` and `delta_rule` without one: run by interpreters, and lowered for TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.delta import delta_rule, tpu as delta
from hydrax.ops.linear import linear_attention, tpu as linear
from hydrax.ops.linear.cases import Case
from hydrax.ops.pallas.tpu import Tuning
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

OPS = {"linear": (linear_attention, linear), "delta": (delta_rule, delta)}
CASES = {
    ("linear", "none"): (Case(2, 63, 2, 2, 8, 16, "none"), Tuning(32)),
    ("linear", "one_token"): (Case(2, 1, 2, 2, 8, 8, "scalar"), Tuning(32)),
    ("linear", "whole_chunks"): (Case(1, 130, 1, 1, 8, 8, "vector"), linear.TUNING),
    ("delta", "constant"): (Case(2, 65, 1, 4, 8, 8, "constant"), Tuning(16)),
    ("delta", "whole_chunks"): (Case(1, 130, 1, 1, 8, 8, "vector"), delta.TUNING),
}
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", random_seed=0)
"""Simulates the memory of a TPU; the seed permutes the parallel axes of the grid."""


@functools.cache
def by_kernels(op: str, tuning: Tuning, interpret: Any = True) -> Callable:
    """The op by its kernels on any machine; one object for one set of arguments, as `ms.evaluator` wants."""
    function, kernels = OPS[op]

    def run(**x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "chunked", functools.partial(kernels.chunked, tuning=tuning, interpret=interpret))
            patch.setattr("hydrax.ops.pallas.tpu.require", lambda *_: None)
            return function(**x, impl="pallas_tpu")

    return run


def problem(op: str, case: Case) -> tuple[ms.Inputs, np.ndarray]:
    return ms.inputs(case, beta=op == "delta"), ms.documents(case.B, case.T)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_kernels_equal_the_recurrence(op: str, name: str) -> None:
    case, tuning = CASES[op, name]
    x, ids = problem(op, case)
    actual = ms.in_fp32(ms.evaluator(by_kernels(op, tuning)), x, ids)
    ms.assert_matches(actual, ms.in_fp64(OPS[op][0], x, ids))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_gates_of_all_sizes_and_a_row_of_padding(op: str, decay: str) -> None:
    """One row for random gates, one for each kind of saturated ones: each is compared by itself."""
    x, ids = problem(op, Case(2 + len(ms.SATURATED), 65, 1, 2, 8, 8, decay))
    for row, gate in enumerate(ms.SATURATED.values()):
        x["log_decay"][row] = gate(x["log_decay"].shape)[row]
    ids[-1] = 0
    actual, expected = ms.in_fp32(ms.evaluator(by_kernels(op, Tuning(32))), x, ids), ms.in_fp64(OPS[op][0], x, ids)
    for row in range(len(ids)):
        ms.assert_matches(*({what: value[row] for what, value in found.items()} for found in (actual, expected)))
    assert_equal("o", actual["o"][-1], np.zeros_like(x["v"][-1]))
    assert_equal("state", actual["state"][-1], x["initial_state"][-1].astype(np.float32))


def test_memory_and_order_of_a_tpu() -> None:
    """Nothing is read before it is written or out of bounds, and the order of parallel programs does not matter; by the
    op that keeps most for the backward pass."""
    x, ids = problem("delta", Case(2, 33, 1, 2, 8, 8, "scalar"))
    actual = ms.in_fp32(ms.evaluator(by_kernels("delta", Tuning(16), STRICT)), x, ids)
    ms.assert_matches(actual, ms.in_fp64(delta_rule, x, ids))


@pytest.mark.parametrize(("op", "decay"), [("linear", "constant"), ("delta", "vector")])
def test_bf16_keeps_fp32_states_and_gates(op: str, decay: str) -> None:
    x, ids = problem(op, Case(2, 65, 1, 2, 16, 16, decay))
    low = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(by_kernels(op, Tuning(32)))(low, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(OPS[op][0], {n: np.asarray(a, np.float64) for n, a in low.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


@pytest.mark.parametrize(("op", "decay"), [("linear", "vector"), ("delta", "scalar")])
def test_the_past_does_not_depend_on_the_future(op: str, decay: str) -> None:
    ms.assert_bit_causal(by_kernels(op, Tuning(32)), *problem(op, Case(2, 65, 2, 2, 8, 16, decay)))


@pytest.mark.parametrize("C", [16, 64])
def test_unit_lower_inverse_and_its_gradient(C: int) -> None:
    rng = np.random.default_rng(0)
    k = rng.normal(size=(C, 16)) + 1.0  # correlated
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    L, dX = np.tril(1.5 * k @ k.T, -1), rng.normal(size=(C, C))
    upper = np.triu(np.full((C, C), 1e30))  # never read
    X, pullback = jax.vjp(jax.jit(delta.unit_lower_inverse), jnp.asarray(L + upper, jnp.float32))
    expected = np.linalg.inv(np.eye(C) + L)
    assert_close("X", X, expected, TOLERANCE["fp32_op"])
    dL = -np.tril(expected.T @ dX @ expected.T, -1)
    assert_close("dL", pullback(jnp.asarray(dX, jnp.float32))[0], dL, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_lower_for_tpus(op: str, decay: str, dtype: jnp.dtype) -> None:
    x, ids = problem(op, Case(2, 300, 1, 2, 128, 128, decay))
    x = {n: jnp.asarray(a, dtype if n in "qkv" else jnp.float32) for n, a in x.items()}

    @jax.jit
    def run(x: dict) -> tuple:
        y, pullback = jax.vjp(
            lambda x: by_kernels(op, OPS[op][1].TUNING, interpret=False)(**x, segment_ids=jnp.asarray(ids)), x
        )
        return y, pullback(y)

    check = jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")
    exported = jax.export.export(run, platforms=["tpu"], disabled_checks=[check])(x)
    assert exported.mlir_module().count("@tpu_custom_call") == 2


@pytest.mark.parametrize("op", OPS)
def test_without_a_tpu_the_kernels_are_refused(op: str) -> None:
    x, _ = problem(op, Case(1, 16, 1, 1, 8, 8, "none"))
    with pytest.raises(ValueError, match="impl = 'pallas_tpu' cannot serve: the device is 'cpu': expected a TPU"):
        OPS[op][0](**ms.in_jax(x), impl="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": jnp.float16}, "q, k, v are float16, float16, float16"), ({"V": 1024}, "K, V = 256, 1024")],
    ids=["dtype", "state"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    how = {"dtype": jnp.bfloat16, "V": 256} | change
    q, v = (jnp.zeros((1, 16, 1, width), how["dtype"]) for width in (256, how["V"]))
    with pytest.raises(ValueError, match=message):
        linear_attention(q, q, v, impl="pallas_tpu")
