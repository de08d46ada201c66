"""`linear_scan` and `selective_scan`: both forms against the recurrence in fp64, with every gradient, and memory."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops import spans
from hydrax.ops.linear import linear_attention
from hydrax.ops.scan import linear_scan, selective_scan, summarize_linear, summarize_selective
from hydrax.ops.scan.cases import CASES, Linear, Selective
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

CHUNKED = {"impl": "chunked", "chunk_size": 32}
KINDS = pytest.mark.parametrize("name", ["linear", "linear_complex", "selective"])

# `matrix_state` calls what is read, k and v what is written, and leaves alone what has one axis. So A is flat here, and
# complex numbers are pairs in the last axis.


def real(decay, v, **x):
    return linear_scan(decay, v, **x)


def turning(decay, v, initial_state, **x):
    h, last = linear_scan(_complex(decay), _complex(v), initial_state=_complex(initial_state), **x)
    return _pairs(h), _pairs(last)


def selective(v, dt, rates, k, q, **x):
    return selective_scan(v, dt, rates.reshape(v.shape[-1], k.shape[-1]), k, q, **x)


def summarize(**x):
    if "decay" in x:
        return summarize_linear(x["decay"], x["v"], segment_ids=x["segment_ids"])
    v, k = x["v"], x["k"]
    A = x["rates"].reshape(v.shape[-1], k.shape[-1])
    return summarize_selective(v, x["dt"], A, k, segment_ids=x["segment_ids"])


def _complex(x):
    return x[..., 0] + 1j * x[..., 1]


def _pairs(z):
    return jnp.stack([z.real, z.imag], axis=-1)


def inputs(case: Linear | Selective) -> ms.Inputs:
    rng = np.random.default_rng(0)
    if isinstance(case, Linear):
        shape = (case.B, case.T, *case.C, *([2] if case.complex else []))
        decay = rng.uniform(-1, 1, size=shape) / (2**0.5 if case.complex else 1)
        return {"decay": decay, "v": rng.normal(size=shape), "initial_state": rng.normal(size=(case.B, *shape[2:]))}
    B, T, D, N = case.B, case.T, case.D, case.N
    x = {"v": rng.normal(size=(B, T, D)), "dt": np.logaddexp(0, rng.normal(size=(B, T, D)))}
    x |= {name: rng.normal(size=(B, T, N)) for name in "kq"}
    return x | {"rates": -rng.uniform(0.1, 4, size=D * N), "initial_state": rng.normal(size=(B, D, N))}


def problem(name: str) -> tuple[Callable, ms.Inputs, np.ndarray]:
    case = CASES[name]
    op = selective if isinstance(case, Selective) else turning if case.complex else real
    return op, inputs(case), ms.documents(case.B, case.T)


def oracle(x: ms.Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Output and final state, token by token."""
    o, states = np.zeros_like(x["v"]), x["initial_state"].copy()
    for b in range(len(ids)):
        h = states[b]
        for t in range(ids.shape[1]):
            if ids[b, t] == 0:
                break
            if t and ids[b, t] != ids[b, t - 1]:
                h = np.zeros_like(h)
            if "decay" in x:
                h = x["decay"][b, t] * h + x["v"][b, t]
                o[b, t] = h
            else:
                decay = np.exp(x["dt"][b, t][:, None] * x["rates"].reshape(h.shape))
                h = decay * h + np.outer(x["dt"][b, t] * x["v"][b, t], x["k"][b, t])
                o[b, t] = h @ x["q"][b, t]
        states[b] = h
    return {"o": o, "state": states}


def turning_oracle(x: ms.Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    found = oracle({name: np.ascontiguousarray(a).view(complex)[..., 0] for name, a in x.items()}, ids)
    return {name: np.stack([z.real, z.imag], axis=-1) for name, z in found.items()}


ORACLES = {real: oracle, turning: turning_oracle, selective: oracle}


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_recurrence(name: str) -> None:
    op, x, ids = problem(name)
    expected = ms.in_fp64(op, x, ids)
    for what, value in ORACLES[op](x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(op, **CHUNKED), x, ids), expected)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@KINDS
def test_gradients_match_finite_differences(name: str, impl: str) -> None:
    op, x, ids = problem(name)
    actual = ms.in_fp64(op, x, ids, impl)
    for what, (direction, value) in ms.directional_derivatives(x, ids, ORACLES[op]).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


@pytest.mark.parametrize("chunk_size", [16, 37, 64, 256])
@pytest.mark.parametrize("case", [Linear(2, 150, (4,)), Selective(2, 150, 4, 2)], ids=["linear", "selective"])
def test_results_do_not_depend_on_the_chunk_size(case: Linear | Selective, chunk_size: int) -> None:
    op, x, ids = real if isinstance(case, Linear) else selective, inputs(case), ms.documents(case.B, case.T)
    actual = ms.in_fp32(ms.evaluator(op, impl="chunked", chunk_size=chunk_size), x, ids)
    ms.assert_matches(actual, ms.in_fp64(op, x, ids))


@KINDS
def test_nor_on_the_spans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three spans, cut inside of documents and at their edges: states, and what all tokens share, pass through."""
    monkeypatch.setitem(spans.SPANS, "cpu", 32)
    op, x, ids = problem(name)

    def own_op(**x):  # `evaluator` keeps what it compiled by the function it is given
        return op(**x)

    ms.assert_matches(ms.in_fp32(ms.evaluator(own_op, impl="chunked", chunk_size=16), x, ids), ms.in_fp64(op, x, ids))


@pytest.mark.parametrize("decays", [(0.0,), (1.0,), (0.0, 1.0), (-1.0, 1.0), (1 - 1e-7, 1e-30, 0.0, 0.5)], ids=str)
def test_decays_of_nothing_and_everything(decays: tuple[float, ...]) -> None:
    _, x, ids = problem("linear")
    x["decay"] = np.random.default_rng(3).choice(decays, size=x["decay"].shape)
    ms.assert_matches(ms.in_fp32(ms.evaluator(real, **CHUNKED), x, ids), ms.in_fp64(real, x, ids))


@pytest.mark.parametrize("steps", [(0.0,), (50.0,), (1e4,), (0.0, 1e-3, 5.0, 1e4)], ids=str)
def test_saturated_steps(steps: tuple[float, ...]) -> None:
    _, x, ids = problem("selective")
    x["dt"] = np.random.default_rng(3).choice(steps, size=x["dt"].shape)
    ms.assert_matches(ms.in_fp32(ms.evaluator(selective, **CHUNKED), x, ids), ms.in_fp64(selective, x, ids))


def test_bf16_keeps_fp32_states_and_steps() -> None:
    _, x, ids = problem("selective")
    rounded = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(selective, **CHUNKED)(rounded, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(selective, {n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


@pytest.mark.parametrize("chunk_size", [16, 37, 64])
@KINDS
def test_the_past_does_not_depend_on_the_future(name: str, chunk_size: int) -> None:
    op, x, ids = problem(name)
    rates = {n: jnp.asarray(x.pop(n), jnp.float32) for n in ("rates",) if n in x}
    ms.assert_bit_causal(lambda **x: op(**x, **rates), x, ids, impl="chunked", chunk_size=chunk_size)


@KINDS
def test_a_row_of_padding_keeps_its_state(name: str) -> None:
    op, x, ids = problem(name)
    actual = ms.in_fp32(ms.evaluator(op, **CHUNKED), x, 0 * ids)
    assert_equal("o", actual["o"], np.zeros_like(x["v"]))
    assert_equal("state", actual["state"], x["initial_state"].astype(np.float32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["linear", "selective"])
def test_summaries_compose_to_the_whole(name: str, packed: bool) -> None:
    op, x, ids = problem(name)
    ids = ids if packed else np.ones_like(ids)
    (Ma, Ua), (Mb, Ub), (M, U) = ms.summaries(summarize, x, ids, 32)
    assert_close("M", Mb * Ma, M, TOLERANCE["fp32_op"])
    assert_close("U", Mb * Ua + Ub, U, TOLERANCE["fp32_op"])
    state = ms.in_fp32(ms.evaluator(op, **CHUNKED), x, ids)["state"]
    assert_close("state", M * x["initial_state"] + U, state, TOLERANCE["fp32_op"])


def test_selective_scan_is_linear_attention_with_a_head_for_every_channel() -> None:
    _, x, ids = problem("selective")

    def attend(v, dt, rates, k, q, **x):
        q, k = (jnp.broadcast_to(a[:, :, None], (*v.shape, a.shape[-1])) for a in (q, k))
        g = dt[..., None] * rates.reshape(k.shape[2:])
        x["initial_state"] = x["initial_state"][..., None]
        o, state = linear_attention(q, k, (dt * v)[..., None], g, scale=1.0, **x)
        return o[..., 0], state[..., 0]

    ms.assert_matches(ms.in_fp64(attend, x, ids), ms.in_fp64(selective, x, ids), 1e-12)


def test_memory_grows_with_the_inputs_and_not_with_the_states() -> None:
    B, T, D, N = 1, 16384, 32, 64
    shapes = {"v": (B, T, D), "dt": (B, T, D), "rates": (D * N,), "k": (B, T, N), "q": (B, T, N)}
    x = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    grad = jax.grad(lambda x: selective(**x, impl="chunked")[0].sum())
    held = jax.jit(grad).lower(x).compile().memory_analysis().temp_size_in_bytes
    inputs = sum(a.size * 4 for a in x.values())
    assert held < 3 * inputs < 4 * B * T * D * N / 3, f"{held / inputs:.2f} times the inputs"


SHAPES = {"v": (2, 9, 3), "dt": (2, 9, 3), "A": (3, 4), "b": (2, 9, 4), "c": (2, 9, 4)}


@pytest.mark.parametrize("wrong", ["dt", "A", "b", "c", "initial_state"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    unchecked = inspect.unwrap(selective_scan)  # without the annotations that only tests check
    x = {name: jnp.ones(shape) for name, shape in SHAPES.items()} | {wrong: jnp.ones((2, 9, 5))}
    with pytest.raises(ValueError, match=wrong):
        unchecked(x.pop("v"), x.pop("dt"), x.pop("A"), x.pop("b"), x.pop("c"), **x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "magic"}, "impl = 'magic'"),
        ({"b": jnp.ones((2, 9, 4))}, r"b \(2, 9, 4\)"),
        ({"initial_state": jnp.ones((2, 4))}, "initial_state"),
    ],
    ids=["impl", "b", "initial_state"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_scan(**{"a": jnp.ones((2, 9, 3)), "b": jnp.ones((2, 9, 3))} | change)
