"""Problems for the ops with a matrix state: inputs, awkward documents, the recurrence in numpy fp64, all gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.eval.tolerances import op_tolerance
from hydrax.ops.linear.cases import documents as documents, inputs as inputs
from tests.tolerances import TOLERANCE, assert_close, assert_equal

Inputs = dict[str, np.ndarray]


def _choice(*values: float) -> Callable[[tuple], np.ndarray]:
    return lambda shape: np.random.default_rng(3).choice(values, size=shape)


def _bursts(shape: tuple) -> np.ndarray:
    """24 of 32 tokens forget everything: sums over a chunk must keep the digits of the small decays after them."""
    t = np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    return np.where(t % 32 < 24, -50.0, -0.0512345) + np.zeros(shape)


SATURATED = {
    "0": _choice(0.0),
    "-5": _choice(-5.0),
    "-10": _choice(-10.0),  # gradients of 5e-5, in which the rounding of terms of size 1 that cancel would show
    "-50": _choice(-50.0),
    "-1e4": _choice(-1e4),
    "mixed": _choice(0.0, -5.0, -50.0, -1e4),
    "rare": _choice(-1e4, *[-0.05] * 9),
    "bursts": _bursts,
}
"""Log-decays of a given shape by name."""


def oracle(x: Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Output and final state, token by token, queries and keys repeated for their value heads."""
    B, T, Hv, V = x["v"].shape
    q, k = (np.repeat(x[name], Hv // x[name].shape[2], axis=2) for name in "qk")
    K = q.shape[-1]
    g = x.get("log_decay", np.zeros(Hv))
    if g.ndim == 4:
        g = np.repeat(g, Hv // g.shape[2], axis=2)
    g = np.broadcast_to(g if g.ndim == 4 else g[..., None], q.shape)
    o, states = np.zeros((B, T, Hv, V)), x["initial_state"].copy()
    for b in range(B):
        S = states[b]
        for t in range(T):
            if ids[b, t] == 0:
                break
            if t and ids[b, t] != ids[b, t - 1]:
                S = np.zeros_like(S)
            S = np.exp(g[b, t])[..., None] * S
            u = x["v"][b, t]
            if "beta" in x:
                u = x["beta"][b, t][:, None] * (u - np.einsum("hk,hkv->hv", k[b, t], S))
            S = S + k[b, t][..., None] * u[:, None]
            o[b, t] = np.einsum("hk,hkv->hv", q[b, t], S) / np.sqrt(K)
        states[b] = S
    return {"o": o, "state": states}


@functools.cache
def evaluator(op: Callable, **how: object) -> Callable[[Inputs, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, ids) -> o, state and d<input> for random cotangents, compiled once per shape."""

    @jax.jit
    def run(x: dict, ids: jax.Array, do: jax.Array, dS: jax.Array) -> tuple:
        (o, S), pullback = jax.vjp(lambda x: op(**x, segment_ids=ids, **how), x)
        return o, S, pullback((do.astype(o.dtype), dS.astype(S.dtype)))[0]

    def evaluate(x: Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
        o, S, gradients = run(x, ids, *cotangents(x))
        return {"o": o, "state": S} | {f"d{name}": dx for name, dx in gradients.items()}

    return evaluate


def cotangents(x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    # Representable in bf16, so that every precision is given the same problem.
    return tuple(
        np.asarray(jnp.asarray(rng.normal(size=x[name].shape), jnp.bfloat16), np.float64)
        for name in ("v", "initial_state")
    )


def in_jax(x: Inputs) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a, jnp.float32) for name, a in x.items()}


def in_fp32(evaluate: Callable, x: Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    return evaluate(in_jax(x), ids)


def in_fp64(op: Callable, x: Inputs, ids: np.ndarray, impl: str = "recurrent") -> dict[str, np.ndarray]:
    """The recurrence, of which the numpy loop confirms the outputs and finite differences the gradients."""
    with jax.enable_x64():
        return jax.tree.map(np.asarray, evaluator(op, impl=impl)({n: a.astype(np.float64) for n, a in x.items()}, ids))


def assert_matches(actual: dict, expected: dict, tolerance: float = TOLERANCE["fp32_op"]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, actual[name], value, tolerance)


def summaries(summarize: Callable, x: Inputs, ids: np.ndarray, split: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(M, U) of the tokens before `split`, of those after, entered from before, and of all."""
    x = {n: a for n, a in in_jax(x).items() if n not in ("q", "initial_state")}
    run = jax.jit(summarize)
    found = []
    for tokens in (np.s_[:split], np.s_[split:], np.s_[:]):
        part = {n: a if a.ndim == 1 else a[:, tokens] for n, a in x.items()}
        M, U = run(**part, segment_ids=ids[:, tokens])
        found.append((np.asarray(M), np.asarray(U)))
    continues = ids[:, split] == ids[:, split - 1]  # else the second part starts from zero
    M, U = found[1]
    found[1] = np.where(continues.reshape(-1, *[1] * (M.ndim - 1)), M, 0), U
    return found


def bf16_tolerance(what: str) -> float:
    return op_tolerance(what, "bfloat16")


def assert_bit_causal(op: Callable, x: Inputs, ids: np.ndarray, **how: object) -> None:
    """Outputs before token t stay bit-equal when everything from t on changes, and something after it does change."""
    run = jax.jit(lambda x: op(**x, segment_ids=jnp.asarray(ids), **how)[0])
    x = in_jax(x)
    before = run(x)
    for t in (1, 15, 16, 20, 31, 36, 45):
        late = np.arange(ids.shape[1]) >= t
        changed = {
            n: jnp.where(late.reshape(-1, *[1] * (a.ndim - 2)), 3 * a, a) for n, a in x.items() if n != "initial_state"
        }
        after = run(changed | {"initial_state": x["initial_state"]})
        assert_equal(f"o before token {t}", after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


def directional_derivatives(
    x: Inputs, ids: np.ndarray, oracle: Callable = oracle
) -> dict[str, tuple[np.ndarray, float]]:
    """For every input a direction, and the central difference of <cotangents, oracle> along it."""
    do, dS = cotangents(x)
    rng = np.random.default_rng(2)

    def loss(name: str, a: np.ndarray) -> float:
        result = oracle(x | {name: a}, ids)
        return float((do * result["o"]).sum() + (dS * result["state"]).sum())

    found = {}
    for name, a in x.items():
        d = rng.normal(size=a.shape) * 1e-5
        found[f"d{name}"] = d, (loss(name, a + d) - loss(name, a - d)) / 2
    return found
