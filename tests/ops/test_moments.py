"""Running moments against numpy over all that came: documents, padding, carried states, gradients, and cancellation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.mixers.base import Context
from hydrax.nn.timestep_norm import BETAS, MOMENTS, TimestepNorm
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, D, G = 37, 12, 3
SEG = np.stack([segments([T], T), segments([1, 9, 1, 16, 6], T)])
POSITIONS = inside(SEG)[0]
REAL = SEG != 0
X = normal(0, 2, T, D) + 3

KINDS = pytest.mark.parametrize("kind", MOMENTS)
IMPLS = pytest.mark.parametrize("impl", ["recurrent", "chunked"])


def oracle(kind: str, x: np.ndarray, seg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments [T,G] of one row, from all tokens of the document so far, in fp64."""
    x = x.astype(np.float64).reshape(T, G, -1)
    positions = inside(seg[None])[0][0]
    mean, var = np.zeros((T, G)), np.zeros((T, G))
    for t in range(T):
        past = x[t - positions[t] : t + 1]
        if kind == "timestep_norm":
            mean[t], var[t] = past.mean((0, 2)), past.var((0, 2))
            continue
        for out, own, beta in ((mean, past.mean(2), BETAS[0]), (var, past.var(2), BETAS[1])):
            weights = beta ** np.arange(len(past))[::-1]
            out[t] = (weights[:, None] * own).sum(0) / weights.sum()
    return mean, var


def moments(kind: str, x: np.ndarray, impl: str | None = None, **facts):
    facts = jax.tree.map(jnp.asarray, facts)
    groups = jnp.asarray(x).reshape(*x.shape[:2], G, -1)
    return MOMENTS[kind](groups.mean(-1), groups.var(-1), impl=impl, **facts)


@KINDS
@IMPLS
def test_moments_are_those_of_all_that_came(kind: str, impl: str) -> None:
    got, last = jax.jit(functools.partial(moments, kind, impl=impl))(X, positions=POSITIONS, segment_ids=SEG)
    for i, seg in enumerate(SEG):
        want = oracle(kind, X[i], seg)
        n = REAL[i].sum()
        for name, g, w, end in zip(("mean", "variance"), got, want, last, strict=True):
            assert_close(f"{name} of row {i}", g[i, :n], w[:n], TOLERANCE["fp32_op"])
            assert_close(f"last {name} of row {i}", end[i], w[n - 1], TOLERANCE["fp32_op"])
            assert_equal("padding", g[i, n:], np.zeros_like(w[n:]))


@KINDS
def test_forms_have_the_same_gradients(kind: str) -> None:
    """Of inputs and of the state before, for outputs and for the state after."""
    before = (normal(1, 2, G), np.abs(normal(2, 2, G)))
    positions = POSITIONS + np.where(SEG[:, :1] == SEG, 5, 0)  # both first documents go on
    cotangents = normal(3, 4, 2, T, G)

    def loss(x, state, impl):
        out, end = moments(kind, x, impl, positions=positions, segment_ids=SEG, initial_state=state)
        parts = [*out, *(jnp.broadcast_to(e[:, None], (2, T, G)) for e in end)]
        return sum((w * p).sum() for w, p in zip(cotangents, parts, strict=True)), (out, end)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    assert_trees_close(kind, run(X, before, "chunked"), run(X, before, "recurrent"), TOLERANCE["fp32_op"])


@KINDS
@pytest.mark.parametrize("cut", [1, 16])
def test_a_carried_state_continues(kind: str, cut: int) -> None:
    full, end = moments(kind, X, positions=POSITIONS)
    first, state = moments(kind, X[:, :cut], positions=POSITIONS[:, :cut])
    rest, last = moments(kind, X[:, cut:], positions=POSITIONS[:, cut:], initial_state=state)
    parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, rest)
    assert_trees_close("moments", parts, full, TOLERANCE["fp32_op"])
    assert_trees_close("state", last, end, TOLERANCE["fp32_op"])


@IMPLS
def test_large_means_do_not_cancel(impl: str) -> None:
    """Sums of squares in fp32 would leave nothing of a variance of 1 beside a mean of 3000, and no step restarts it."""
    x = (normal(4, 1, 4096, D) + 3000).astype(np.float32)
    positions = np.arange(4096)[None]
    (_, var), _ = jax.jit(functools.partial(moments, "timestep_norm", impl=impl))(x, positions=positions)
    want = x[0].astype(np.float64).reshape(4096, G, -1).var((0, 2))
    assert_close("variance", var[0, -1], want, 1e-3)  # what the rounding of m_t itself leaves


@KINDS
def test_the_norm(kind: str) -> None:
    """At first y has mean 0 and variance 1 in the first token's groups; constant rows give the bias."""
    norm = TimestepNorm(D, G, kind, rngs=nnx.Rngs(0))
    run = jax.jit(lambda x: norm(x, Context.of(x), None)[0])
    y = np.asarray(run(X)).reshape(2, T, G, -1)
    assert_close("mean", y[:, 0].mean(-1), np.zeros((2, G)), TOLERANCE["fp32_op"], floor=1.0)
    assert_close("variance", y[:, 0].var(-1), np.ones((2, G)), 1e-3)
    mean, var = (m[:, :, None] for m in oracle(kind, X[0], SEG[0]))
    want = (X[0].reshape(T, G, -1) - mean) / np.sqrt(var + 1e-5)
    assert_close("y", y[0], want, TOLERANCE["fp32_op"])
    norm.bias[...] = jnp.arange(D) / D
    assert_close("constant rows", run(jnp.full((1, T, D), 2.0))[0], np.tile(np.arange(D) / D, (T, 1)), 1e-3)


@KINDS
def test_weights_sum_to_1_far_into_a_row(kind: str) -> None:
    """The moments of what never changes, from token 150,000 on, where 1 - 1/n has lost most digits of 1/n."""
    x, positions = jnp.ones((1, 20_000, 1)), 150_000 + jnp.arange(20_000, dtype=jnp.int32)[None]
    var = jnp.zeros_like(x) if kind == "timestep_norm" else x
    start = (x[:, 0], x[:, 0])
    found, last = jax.jit(lambda: MOMENTS[kind](x, var, positions, initial_state=start, impl="chunked"))()
    assert_close("means", found[0], x, 1e-6)
    assert_close("mean", last[0], x[:, 0], 1e-6)
    left = 150_000 / (positions[..., None] + 1.0) if kind == "timestep_norm" else x  # Σ of squares over n
    assert_close("variances", found[1], left, 1e-5)
