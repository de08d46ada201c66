"""`ema`: both forms against the recurrence in complex128, with every gradient, and against SciPy's filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from hydrax.ops.ema import attention_matrix, ema, summarize
from hydrax.ops.ema.cases import CASES, Case, inputs
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

D, N = 3, 4
FORMS = {"recurrent": {"impl": "recurrent"}, "chunked": {"impl": "chunked", "chunk_size": 16}}


def problem(T: int, kind: str, B: int = 2) -> dict[str, np.ndarray]:
    return inputs(Case(B, T, D, N, complex=kind == "complex"))


def oracle(x, log_decay, write, read, initial_state, ids, angle=0.0):
    q = np.exp(np.maximum(log_decay, -50) + 1j * angle)
    y, last = np.zeros_like(x), initial_state.astype(complex)
    for b, row in enumerate(ids):
        h = last[b].copy()
        for t, document in enumerate(row):
            if document == 0:
                break
            if t and document != row[t - 1]:
                h = np.zeros_like(h)
            h = q * h + write * x[b, t][:, None]
            y[b, t] = (read * h).sum(-1).real
        last[b] = h
    return y, last


def low(x):
    return {k: jnp.asarray(v, jnp.complex64 if np.iscomplexobj(v) else jnp.float32) for k, v in x.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_forms_equal_the_recurrence(name, form):
    x, ids = inputs(CASES[name]), ms.documents(CASES[name].B, CASES[name].T)
    y, h = jax.jit(lambda **x: ema(**x, segment_ids=jnp.asarray(ids), **FORMS[form]))(**low(x))
    wanted, last = oracle(**x, ids=ids)
    assert_close("y", y, wanted, TOLERANCE["fp32_op"])
    assert_close("h", np.abs(np.asarray(h) - last), np.zeros(last.shape), TOLERANCE["fp32_op"], floor=1.0)


@pytest.mark.parametrize("form", FORMS)
def test_modes_are_filters(form):
    """y = Σ_n γ_n p_n / (1 - q_n z⁻¹) x, in fp64."""
    x = inputs(CASES["real"])
    del x["initial_state"]
    wanted = np.zeros_like(x["x"])
    for d, n in np.ndindex(*x["write"].shape):
        keep = np.exp(max(x["log_decay"][d, n], -50))
        wanted[:, :, d] += signal.lfilter([(x["read"] * x["write"])[d, n]], [1, -keep], x["x"][:, :, d], axis=1)
    with jax.enable_x64(True):
        y, _ = jax.jit(lambda **x: ema(**x, **FORMS[form]))(**{name: jnp.asarray(a) for name, a in x.items()})
    assert_close("y", y, wanted, TOLERANCE["fp64"])


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradients_equal_those_of_the_recurrence(kind):
    x, ids = low(problem(67, kind)), jnp.asarray(ms.documents(2, 67))
    rng = np.random.default_rng(1)
    dy, dh = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 67, D), (2, D, N)))

    def loss(x, **how):
        y, h = ema(**x, segment_ids=ids, **how)
        return (y * dy).sum() + (h * dh).sum().real + (h * dh[::-1]).sum().imag

    wanted, got = (jax.jit(jax.grad(lambda x, how=how: loss(x, **how)))(x) for how in FORMS.values())
    assert float(jnp.abs(wanted["log_decay"][0, 0])) == 0  # clamped
    for name in x:
        parts = (np.real, np.imag) if np.iscomplexobj(wanted[name]) else (np.real,)
        for part in parts:
            assert_close(f"d{name}", part(got[name]), part(wanted[name]), TOLERANCE["fp32_op"])


def test_packed_documents_equal_separate_ones():
    x = low(problem(67, "complex"))
    del x["initial_state"]
    ids = jnp.asarray([[1] * 20 + [2] * 5 + [3] * 42] * 2)
    run = jax.jit(lambda **x: ema(**x, impl="chunked", chunk_size=16)[0])
    y = run(**x, segment_ids=ids)
    for start, stop in ((0, 20), (20, 25), (25, 67)):
        alone = run(**{**x, "x": x["x"][:, start:stop]})
        assert_close("y", y[:, start:stop], alone, TOLERANCE["fp32_op"])
    edited = {**x, "x": x["x"].at[:, :25].set(jnp.nan)}
    assert_equal("y", run(**edited, segment_ids=ids)[:, 25:], y[:, 25:])


def test_summary_maps_the_state():
    x, ids = low(problem(67, "complex")), jnp.asarray(ms.documents(2, 67))
    _, h = jax.jit(lambda **x: ema(**x, impl="recurrent"))(**x, segment_ids=ids)
    start = x.pop("initial_state")
    del x["read"]
    M, U = jax.jit(summarize)(**x, segment_ids=ids)
    assert_close("h", np.abs(M * start + U - h), np.zeros(h.shape), TOLERANCE["fp32_op"], floor=1.0)
    x["x"] = x["x"][:, :9]
    M, _ = jax.jit(summarize)(**x)
    assert_close(
        "M",
        np.abs(M[0] - jnp.exp(9 * (jnp.maximum(x["log_decay"], -50) + 1j * x["angle"]))),
        np.zeros((D, N)),
        1e-5,
        floor=1.0,
    )


def test_matrix_makes_outputs():
    x = low(problem(20, "complex"))
    del x["initial_state"]
    A = jax.jit(attention_matrix)(x["x"], *(x[n] for n in ("log_decay", "write", "read", "angle")))
    assert_close("y", jnp.einsum("bdij,bjd->bid", A, x["x"]), jax.jit(ema)(**x)[0], TOLERANCE["fp32_op"])


def test_long_rows_do_not_drift():
    x = {k: v[:1] if k in ("x", "initial_state") else v for k, v in problem(20_000, "complex", B=1).items()}
    y, _ = jax.jit(lambda **x: ema(**x, impl="chunked"))(**low(x))
    wanted, _ = oracle(**x, ids=np.ones((1, 20_000), int))
    assert_close("early", y[:, :1000], wanted[:, :1000], TOLERANCE["fp32_op"])
    assert_close("late", y[:, -1000:], wanted[:, -1000:], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": np.ones((D, N + 1))}, "expected"),
        ({"read": np.ones((D, N)) * 1j}, "read is complex"),
        ({"initial_state": np.ones((2, D, N + 1))}, "initial_state"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        ema(**low({**problem(5, "real"), **change}))
