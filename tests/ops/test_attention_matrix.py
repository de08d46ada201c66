"""`attention_matrix` of every op: its entries by their formula in fp64, and its product with the values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops import delta, linear, scan, slots, softmax
from hydrax.ops.identity import LONGEST
from hydrax.ops.linear.cases import CASES as STATE
from hydrax.ops.softmax.cases import CASES as SOFTMAX, Case
from tests.ops import matrix_state as ms, test_scan, test_slots, test_softmax
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.thorough


SCALE = 0.7


class Problem(NamedTuple):
    """An op with its arguments but for the values, and its matrix [B,*heads,T,T] by a formula in fp64."""

    matrix: Callable[..., jax.Array]
    op: Callable[..., Any]
    x: ms.Inputs
    v: np.ndarray  # [B,T,heads,...]
    ids: np.ndarray
    formula: Callable[..., np.ndarray]


def carried(ids: np.ndarray, write: Callable, decay: Callable, read: Callable) -> np.ndarray:
    """[B,*heads,T,T]: what token j writes, carried by every later token to i in its document, and read there."""
    B, T = ids.shape
    first = read(0, 0, write(0, 0))
    found = np.zeros((B, *first.shape, T, T), first.dtype)
    for b in range(B):
        for j in range(T):
            s = write(b, j)
            for i in range(j, T):
                if ids[b, i] != ids[b, j] or ids[b, j] == 0:
                    break
                s = s if i == j else decay(b, i, s)
                found[b, ..., i, j] = read(b, i, s)
    return found


def state_formula(x: ms.Inputs, ids: np.ndarray, heads: int) -> np.ndarray:
    """k_j β_j, carried by (I - β k kᵀ) diag(e^g), read by q_i; β = 1 and the diagonal alone without the delta rule."""
    q, k = (np.repeat(x[n], heads // x[n].shape[2], axis=2) for n in "qk")
    g = x.get("log_decay", np.zeros(heads))
    g = np.repeat(g, heads // g.shape[2], axis=2) if g.ndim == 4 else g[..., None]
    keep = np.broadcast_to(np.exp(g), k.shape)
    beta = x.get("beta", np.ones(k.shape[:3]))[..., None]

    def decay(b: int, i: int, s: np.ndarray) -> np.ndarray:
        s = keep[b, i] * s
        return s - beta[b, i] * k[b, i] * (k[b, i] * s).sum(-1, keepdims=True) if "beta" in x else s

    return carried(ids, lambda b, j: beta[b, j] * k[b, j], decay, lambda b, i, s: SCALE * (q[b, i] * s).sum(-1))


def slots_formula(x: ms.Inputs, ids: np.ndarray) -> np.ndarray:
    """What is left of each token in each slot, read by the softmax over the keys that the slots hold."""
    write, keep = x["write"], np.exp(x["log_decay"])
    left = carried(ids, lambda b, j: write[b, j], lambda b, i, s: keep[b, i] * s, lambda b, i, s: s)
    y = np.einsum("bhmij,bihk,bjhk->bihm", left, x["q"], x["k"]) * SCALE
    p = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    return np.einsum("bihm,bhmij->bhij", p, left)


def selective_formula(x: ms.Inputs, ids: np.ndarray) -> np.ndarray:
    """arXiv 2403.01590: one exponential of the steps summed between two tokens."""
    steps = np.cumsum(x["dt"], axis=1)
    pairs = (ids[:, :, None] == ids[:, None]) & (ids[:, None] != 0) & np.tri(ids.shape[1], dtype=bool)
    between = np.where(pairs[..., None], steps[:, :, None] - steps[:, None], 0)
    found = np.einsum("bin,bijdn,bjd,bjn->bdij", x["c"], np.exp(between[..., None] * x["A"]), x["dt"], x["b"])
    return np.where(pairs[:, None], found, 0)


def softmax_formula(x: ms.Inputs, ids: np.ndarray, case: Case) -> np.ndarray:
    z = np.einsum("bthk,bshk->bhts", x["q"], np.repeat(x["k"], case.H // case.Hk, axis=2)) * case.K**-0.5
    z = z + x.get("bias", 0)
    if case.key_bias:
        z = z + np.moveaxis(np.repeat(x["key_bias"], case.H // case.Hk, axis=2), 1, 2)[:, :, None]
    z = z if case.softcap is None else case.softcap * np.tanh(z / case.softcap)
    e = np.where(test_softmax.mask_of(case, ids), np.exp(z), 0)
    total = e.sum(-1) + (np.exp(x["sinks"])[:, None] if case.sinks else 0)
    return e / np.where(total > 0, total, 1)[..., None]


def matrix_state(op: Callable, module: Any, name: str) -> Problem:
    case = STATE[name]
    x = ms.inputs(case, beta=module is delta)
    v, _ = x.pop("v"), x.pop("initial_state")
    heads = {} if module is delta else {"value_heads": case.Hv}
    matrix = functools.partial(module.attention_matrix, scale=SCALE, **heads)
    formula = functools.partial(state_formula, heads=case.Hv)
    return Problem(matrix, lambda **x: op(**x, scale=SCALE)[0], x, v, ms.documents(case.B, case.T), formula)


def slot(name: str) -> Problem:
    x, ids = test_slots.problem(name)
    v, _ = x.pop("v"), x.pop("initial_state")
    matrix = functools.partial(slots.attention_matrix, scale=SCALE)
    return Problem(matrix, lambda **x: slots.slot_attention(**x, scale=SCALE)[0], x, v, ids, slots_formula)


def linear_scan(name: str) -> Problem:
    _, x, ids = test_scan.problem(name)
    a, b = (x[n][..., 0] + 1j * x[n][..., 1] if "complex" in name else x[n] for n in ("decay", "v"))

    def formula(x: ms.Inputs, ids: np.ndarray) -> np.ndarray:
        one = np.ones_like(a[0, 0])
        return carried(ids, lambda b, j: one, lambda b, i, s: a[b, i] * s, lambda b, i, s: s)

    return Problem(
        scan.attention_matrix_linear, lambda v, **x: scan.linear_scan(b=v, **x)[0], {"a": a}, b, ids, formula
    )


def selective_scan(name: str) -> Problem:
    _, x, ids = test_scan.problem(name)
    A = x["rates"].reshape(x["v"].shape[-1], x["k"].shape[-1])
    op = lambda v, **x: scan.selective_scan(v, **x)[0]  # noqa: E731
    x, v = {"dt": x["dt"], "A": A, "b": x["k"], "c": x["q"]}, x["v"]
    return Problem(scan.attention_matrix_selective, op, x, v, ids, selective_formula)


def attention(name: str) -> Problem:
    case = SOFTMAX[name]
    x, ids = test_softmax.inputs(case)
    x = {n: np.asarray(a, np.float64) for n, a in x.items()}
    ids = np.ones((case.B, case.T), np.int32) if ids is None else np.asarray(ids)
    options = test_softmax.options_of(case)
    matrix = functools.partial(softmax.attention_matrix, **options)
    formula = functools.partial(softmax_formula, case=case)
    return Problem(matrix, functools.partial(softmax.attention, **options), x, x.pop("v"), ids, formula)


PROBLEMS = {
    **{f"linear-{n}": functools.partial(matrix_state, linear.linear_attention, linear, n) for n in STATE},
    **{f"delta-{n}": functools.partial(matrix_state, delta.delta_rule, delta, n) for n in STATE},
    **{f"slots-{n}": functools.partial(slot, n) for n in ("odd", "one_token")},
    **{f"scan-{n}": functools.partial(linear_scan, n) for n in ("linear", "linear_heads", "linear_complex")},
    **{f"scan-{n}": functools.partial(selective_scan, n) for n in ("selective", "selective_one_state")},
    **{f"softmax-{n}": functools.partial(attention, n) for n in SOFTMAX},
}


@functools.cache
def solved(name: str) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem, its matrix and the output of the op, in fp32."""
    p = PROBLEMS[name]()
    x, v = jax.tree.map(lambda a: jnp.asarray(a, jnp.complex64 if np.iscomplexobj(a) else jnp.float32), (p.x, p.v))
    run = jax.jit(lambda x, v, ids: (p.matrix(**x, segment_ids=ids), p.op(v=v, **x, segment_ids=ids)))
    return p, *map(np.asarray, run(x, v, p.ids))


def parts(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag])


@pytest.mark.parametrize("name", PROBLEMS)
def test_entries_are_those_of_the_formula(name: str) -> None:
    p, A, _ = solved(name)
    assert A.dtype in (np.float32, np.complex64)
    expected = p.formula(p.x, p.ids)
    assert expected.any()
    assert_close("A", parts(A), parts(expected), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", PROBLEMS)
def test_its_product_with_the_values_is_the_output(name: str) -> None:
    p, A, o = solved(name)
    B, T = p.ids.shape
    A = A.reshape(B, -1, T, T)
    v = p.v if name.startswith("scan") else np.repeat(p.v, A.shape[1] // p.v.shape[2], axis=2)
    product = np.einsum("bhij,bjhv->bihv", A, v.reshape(B, T, A.shape[1], -1)).reshape(o.shape)
    assert_close("A v", parts(product), parts(o), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("gate", ms.SATURATED)
@pytest.mark.parametrize("rule", [linear, delta])
def test_saturated_gates(rule: Any, gate: str) -> None:
    p = matrix_state(None, rule, "scalar_grouped")
    x = p.x | {"log_decay": ms.SATURATED[gate](p.x["log_decay"].shape)}
    A = jax.jit(p.matrix)(**ms.in_jax(x), segment_ids=p.ids)
    assert_close("A", A, p.formula(x, p.ids), TOLERANCE["fp32_op"])


def test_rounded_inputs_give_an_unrounded_matrix() -> None:
    p = matrix_state(None, linear, "scalar")
    low = {n: jnp.asarray(a, jnp.bfloat16 if n in "qk" else jnp.float32) for n, a in p.x.items()}
    A = jax.jit(p.matrix)(**low, segment_ids=p.ids)
    rounded = {n: np.asarray(a, np.float64) for n, a in low.items()}
    assert_close("A", A, p.formula(rounded, p.ids), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["linear-none", "delta-none", "slots-odd", "scan-linear", "scan-selective"])
def test_long_rows_are_refused(name: str) -> None:
    p = PROBLEMS[name]()
    long = {n: jnp.zeros((1, LONGEST + 1, *a.shape[2:])) if a.ndim > 2 else jnp.asarray(a) for n, a in p.x.items()}
    with pytest.raises(ValueError, match="attention_matrix: T = 4097: expected at most 4096"):
        p.matrix(**long)
