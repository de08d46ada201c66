"""Ops on a real GPU against their definition: `JAX_PLATFORMS=cuda python -m pytest -m gpu tests/gpu`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.nn.norm import l2_norm
from hydrax.ops.conv.cases import KERNELS as CONVOLUTIONS
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.rowwise.cases import NORMS, PRODUCTS, Case as Rows
from hydrax.ops.scan import linear_scan, selective_scan
from hydrax.ops.slots import slot_attention
from hydrax.ops.softmax import attention
from hydrax.ops.softmax.cases import KERNELS as ATTENTIONS, Case as Attention
from tests.ops import (
    matrix_state as ms,
    test_conv_gpu as conv_kernels,
    test_delta_gpu as delta_kernels,
    test_linear_gpu as hopper,
    test_rowwise_gpu as rowwise_kernels,
    test_scan_gpu as scan_kernels,
    test_sharded_kernels as sharded_kernels,
    test_softmax_gpu as softmax_kernels,
    test_sparse_gpu as sparse_kernels,
    test_step_gpu as step_kernels,
    test_vector_gpu as vector_kernels,
)
from tests.tolerances import TOLERANCE, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

B, T, H, K, V = 2, 1025, 4, 64, 128
DECAYS = {"none": None, "scalar": (B, T, H), "vector": (B, T, H, K)}
SEGMENTS = np.repeat([[1, 2, 3, 4]], B, 0).repeat([500, 1, 11, T - 512], axis=1)


def _linear(decay: str, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    g = None if DECAYS[decay] is None else g
    return linear_attention(q, k, v, g, segment_ids=jnp.asarray(SEGMENTS), impl=impl)[0]


def _delta(decay: str, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    g = None if DECAYS[decay] is None else g
    return delta_rule(q, l2_norm(k), v, beta, g, segment_ids=jnp.asarray(SEGMENTS), impl=impl)[0]


def _attention(window: int | None, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    segments = None if impl == "cudnn" else jnp.asarray(SEGMENTS)
    return attention(q, k, v[..., :K], window=window, segment_ids=segments, impl=impl)


def _slots(decay: str, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    q, k = (x.astype(jnp.float32) / K**0.25 for x in (q, k))
    q, k = q.astype(v.dtype), k.astype(v.dtype)
    return slot_attention(q, k, v, -jnp.expm1(g), g, segment_ids=jnp.asarray(SEGMENTS), impl=impl)[0]


def _scan(decay: str, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    return linear_scan(jnp.exp(g), q * k, segment_ids=jnp.asarray(SEGMENTS), impl=impl)[0]


def _selective(decay: str, impl: str, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Array:
    rates = -jnp.exp(jnp.linspace(0, 2, H * 16)).reshape(H, 16)
    x, b, c = v[:, :, :, 0], k[:, :, 0, :16], q[:, :, 0, :16]
    return selective_scan(x, beta, rates, b, c, segment_ids=jnp.asarray(SEGMENTS), impl=impl)[0]


OPS: dict[str, tuple[Callable, str]] = {
    **{f"linear-{d}": (functools.partial(_linear, d), d) for d in DECAYS},
    **{f"delta-{d}": (functools.partial(_delta, d), d) for d in DECAYS},
    "slots": (functools.partial(_slots, "vector"), "vector"),
    "linear_scan": (functools.partial(_scan, "vector"), "vector"),
    "selective_scan": (functools.partial(_selective, "scalar"), "scalar"),
    "attention": (functools.partial(_attention, None), "none"),
    "attention-window": (functools.partial(_attention, 100), "none"),
}


def _inputs(decay: str, dtype: jnp.dtype) -> tuple[Array, ...]:
    rng = np.random.default_rng(0)
    shape = DECAYS[decay] or (B, T, H)
    q, k = (jnp.asarray(rng.normal(size=(B, T, H, K)), dtype) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(B, T, H, V)), dtype)
    g = jnp.asarray(-rng.exponential(size=shape), jnp.float32)
    return q, k, v, g, jnp.asarray(rng.uniform(size=(B, T, H)), jnp.float32)


def _outputs_and_gradients(f: Callable, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
    def loss(*inputs: Array) -> tuple[Array, Array]:
        o = f(*inputs)
        return jnp.sum(o.astype(jnp.float32) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    gradients, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*inputs)
    return o, *gradients


@pytest.mark.parametrize("op", OPS)
def test_fp32_equals_definition(op: str) -> None:
    f, decay = OPS[op]
    inputs = _inputs(decay, jnp.float32)
    expected = _outputs_and_gradients(functools.partial(f, "recurrent"), inputs)
    actual = _outputs_and_gradients(functools.partial(f, "chunked"), inputs)
    for name, a, e in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), actual, expected, strict=True):
        assert_close(f"{op} {name}", a, e, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("op", OPS)
def test_bf16_equals_fp32_definition(op: str) -> None:
    f, decay = OPS[op]
    inputs = _inputs(decay, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    expected = _outputs_and_gradients(functools.partial(f, "recurrent"), exact)
    actual = _outputs_and_gradients(functools.partial(f, "chunked"), inputs)
    limits = ("bf16_output", *("bf16_gradient",) * 3, *("bf16_gate_gradient",) * 2)
    for name, limit, a, e in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), limits, actual, expected, strict=True):
        assert_close(f"{op} {name}", a, e, TOLERANCE[limit])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_equals_definition(window: int | None, packed: bool) -> None:
    inputs = tuple(x[:, :1024] for x in _inputs("none", jnp.bfloat16))
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    segments = jnp.asarray(SEGMENTS[:, :1024]).at[:, 1000:].set(0) if packed else None

    def form(impl: str) -> Callable:
        return lambda q, k, v, *_: attention(q, k, v[..., :K], window=window, segment_ids=segments, impl=impl)

    expected = _outputs_and_gradients(form("xla"), exact)
    actual = _outputs_and_gradients(form("cudnn"), inputs)
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, expected, strict=False):
        assert_close(f"cudnn {name}", a, e, TOLERANCE["bf16_output" if name == "o" else "bf16_gradient"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", hopper.CASES)
def test_linear_kernels_equal_the_recurrence(name: str, packed: bool) -> None:
    hopper.check_case(*hopper.CASES[name], packed)


@pytest.mark.parametrize("gate", ms.SATURATED)
def test_linear_kernels_with_saturated_gates(gate: str) -> None:
    hopper.check_gates(ms.SATURATED[gate], *hopper.CASES["grouped"])


@pytest.mark.parametrize("decay", DECAYS)
def test_pallas_linear_equals_definition(decay: str) -> None:
    inputs = _inputs(decay, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    expected = _outputs_and_gradients(functools.partial(_linear, decay, "recurrent"), exact)
    actual = _outputs_and_gradients(functools.partial(_linear, decay, "pallas_gpu"), inputs)
    limits = ("bf16_output", *("bf16_gradient",) * 3, "bf16_gate_gradient")
    for name, limit, a, e in zip(("o", "dq", "dk", "dv", "dg"), limits, actual, expected, strict=False):
        assert_close(f"pallas linear {decay} {name}", a, e, TOLERANCE[limit])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "dtype"), scan_kernels.RUNS)
def test_scan_kernels_equal_the_recurrence(
    name: str, dtype: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_kernels.check_case(name, dtype, packed, monkeypatch)


@pytest.mark.parametrize("decay", scan_kernels.DECAYS)
def test_scan_kernels_with_decays_of_nothing_and_everything(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_kernels.check_decays(decay, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", delta_kernels.CASES)
def test_delta_kernels_equal_the_recurrence(name: str, packed: bool) -> None:
    delta_kernels.check_case(*delta_kernels.CASES[name], packed)


@pytest.mark.parametrize("gate", ms.SATURATED)
def test_delta_kernels_with_saturated_gates(gate: str) -> None:
    delta_kernels.check_gates(ms.SATURATED[gate], *delta_kernels.CASES["scalar"])


@pytest.mark.parametrize("op", vector_kernels.OPS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", vector_kernels.CASES)
def test_vector_kernels_equal_the_recurrence(op: str, name: str, packed: bool) -> None:
    vector_kernels.OPS[op].check_case(*vector_kernels.CASES[name], packed)


@pytest.mark.parametrize("op", vector_kernels.OPS)
@pytest.mark.parametrize("gate", vector_kernels.GATES)
def test_vector_kernels_with_other_gates(op: str, gate: str) -> None:
    vector_kernels.OPS[op].check_gates(vector_kernels.GATES[gate], *vector_kernels.CASES["wide"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("op", "decay", "shape", "dtype"), step_kernels.RUNS)
def test_step_kernels_equal_the_recurrence(op: str, decay: str, shape: str, dtype: str, packed: bool) -> None:
    step_kernels.check_case(op, decay, shape, dtype, packed)


@pytest.mark.parametrize("correlation", delta_kernels.CORRELATED)
def test_delta_kernels_with_correlated_keys(correlation: float) -> None:
    delta_kernels.check_correlated(correlation)


@pytest.mark.parametrize("decay", DECAYS)
def test_pallas_delta_equals_definition(decay: str) -> None:
    inputs = _inputs(decay, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    expected = _outputs_and_gradients(functools.partial(_delta, decay, "recurrent"), exact)
    actual = _outputs_and_gradients(functools.partial(_delta, decay, "pallas_gpu"), inputs)
    limits = ("bf16_output", *("bf16_gradient",) * 3, *("bf16_gate_gradient",) * 2)
    for name, limit, a, e in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), limits, actual, expected, strict=True):
        assert_close(f"pallas delta {decay} {name}", a, e, TOLERANCE[limit])


@pytest.mark.parametrize("op", sharded_kernels.OPS)
def test_kernels_inside_shard_map_equal_those_outside(op: str) -> None:
    sharded_kernels.check_equals_unsharded(op, sharded_kernels.mesh_of(1, 1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*conv_kernels.CASES.values(), *CONVOLUTIONS.values()], ids=str)
def test_conv_kernels_equal_the_recurrence(case: conv_kernels.Case, dtype: str, packed: bool) -> None:
    conv_kernels.check_case(case, dtype, ms.documents(case.B, case.T) if packed else None)


@pytest.mark.parametrize("case", [*rowwise_kernels.CASES.values(), *NORMS.values()], ids=str)
def test_norm_kernels_equal_the_definition(case: Rows) -> None:
    rowwise_kernels.check_norm(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
def test_glu_kernels_equal_the_definition(case: Rows, dtype: str) -> None:
    rowwise_kernels.check_glu(case, dtype)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("case", [*softmax_kernels.CASES.values(), *ATTENTIONS.values()], ids=str)
def test_softmax_kernels_equal_the_definition(case: Attention, documents: bool) -> None:
    softmax_kernels.check_case(dataclasses.replace(case, documents=documents))


@pytest.mark.parametrize("order", sparse_kernels.ORDERS)
@pytest.mark.parametrize("name", [*sparse_kernels.CASES, *sparse_kernels.LARGE])
def test_kernels_of_chosen_blocks_equal_the_definition(name: str, order: str) -> None:
    sparse_kernels.check_case(name, order)


@pytest.mark.parametrize("tokens", [140, 3000])
def test_kernels_of_spans_equal_the_definition(tokens: int) -> None:
    sparse_kernels.check_spans(tokens)
