"""The chunked objective equals the dense one and never holds all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.train.loss import Sums, _in_one_pass, _in_passes, chunked_cross_entropy
from tests.tolerances import TOLERANCE, assert_close

B, T, D, V = 3, 23, 8, 37


def dense(x, table, targets, weights, z_loss):
    logits = (x.astype(jnp.float32) @ table.astype(jnp.float32).T).astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    return Sums(jnp.sum(weights * nll), z_loss * jnp.sum(weights * lse**2), jnp.sum(weights))


EXPECTED = jax.jit(dense, static_argnums=4)


def chunked(x, table, targets, weights, z_loss, chunk):
    def logits(y):
        return jnp.einsum("...d,vd->...v", y, table, preferred_element_type=jnp.float32)

    return chunked_cross_entropy(x, logits, targets, weights, z_loss=z_loss, chunk=chunk)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, D), (V, D)))
    return x, table, jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)


@pytest.mark.parametrize("chunk", [1, 5, 23, 64])
def test_equals_dense_with_gradients(chunk):
    x, table, targets, weights = inputs()

    def total(x, table):
        sums = dense(x, table, targets, weights, 0.1)
        return sums.nll + sums.z

    def objective(x, table):
        return chunked(x, table, targets, weights, 0.1, chunk)

    sums = jax.jit(objective)(x, table)[1]
    gradient = jax.value_and_grad(lambda *a: (3 * objective(*a)[0], objective(*a)[1]), (0, 1), has_aux=True)
    (value, beside), actual = jax.jit(gradient)(x, table)
    for name, a, b, e in zip(Sums._fields, sums, beside, EXPECTED(*inputs(), 0.1), strict=True):
        assert a.dtype == jnp.float32
        assert_close(name, a, e, TOLERANCE["fp32_op"])
        assert_close(f"{name} beside gradients", b, e, TOLERANCE["fp32_op"])
    assert_close("objective", value, 3 * (sums.nll + sums.z), TOLERANCE["fp32_op"])
    expected = jax.jit(jax.grad(lambda *a: 3 * total(*a), (0, 1)))(x, table)
    for name, a, e in zip(("hidden", "table"), actual, expected, strict=True):
        assert_close(name, a, e, TOLERANCE["fp32_op"])


def test_z_loss_is_the_weighted_square_of_lse():
    x, table, targets, weights = inputs()
    lse = np.log(np.exp(np.asarray(x @ table.T, np.float64)).sum(-1))
    assert_close("z", chunked(x, table, targets, weights, 0.5, 5)[1].z, 0.5 * (weights * lse**2).sum(), 1e-6)
    assert float(chunked(x, table, targets, weights, 0.0, 5)[1].z) == 0


def test_huge_logits_stay_finite():
    x, table, targets, weights = inputs()
    _, sums = chunked(1e4 * x, table, targets, weights, 1e-4, 5)
    assert_close("nll", sums.nll, EXPECTED(1e4 * x, table, targets, weights, 0.0).nll, TOLERANCE["fp32_op"])


def test_sums_are_fp32_for_bf16_hidden_states():
    x, table, targets, weights = inputs(jnp.bfloat16)
    _, sums = chunked(x, table, targets, weights, 0.1, 5)
    assert {s.dtype for s in sums} == {jnp.dtype("float32")}
    assert_close("nll", sums.nll, EXPECTED(x, table, targets, weights, 0.1).nll, TOLERANCE["fp32_op"])


def largest(f) -> int:
    """Elements of the largest array in the optimised program of the gradient."""
    x, table, targets, weights = inputs()
    gradient = jax.grad(lambda x, table: f(x, table, targets, weights), (0, 1))
    text = jax.jit(gradient).lower(x, table).compile().as_text()
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"\w+\[([\d,]+)\]", text))


def test_no_array_of_all_logits_exists():
    assert largest(lambda *a: chunked(*a, 0.1, 4)[0]) < B * T * V / 2
    assert largest(lambda *a: dense(*a, 0.1).nll) >= B * T * V  # the check sees what it looks for


@pytest.mark.parametrize("argument", ["x", "weights"])
def test_only_the_objective_has_a_gradient(argument):
    x, table, targets, weights = inputs()
    parts = {"x": lambda x: chunked(x, table, targets, weights, 0.1, 4)[1].nll}
    parts["weights"] = lambda weights: chunked(x, table, targets, weights, 0.1, 4)[0]
    with pytest.raises(TypeError, match="differentiated"):
        jax.grad(parts[argument])({"x": x, "weights": weights}[argument])


@pytest.mark.parametrize("low", [-1e4, -np.inf])
def test_one_pass_equals_several(low):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(20 * rng.normal(size=(2, 3, 300)), jnp.float32).at[..., 128:].set(low)
    others = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
    for name, a, e in zip(("lse", "sum"), _in_one_pass(logits, others), _in_passes(logits, others), strict=True):
        assert_close(name, a, e, TOLERANCE["fp32_op"])


def test_lowers_for_both_platforms():
    x, table, targets, weights = inputs()
    step = jax.jit(jax.grad(lambda *a: chunked(*a, targets, weights, 0.1, None)[0], (0, 1)))
    modules = {p: jax.export.export(step, platforms=[p])(x, table).mlir_module() for p in ("cpu", "cuda")}
    reduced = {p: max(line.count(" init: ") for line in text.splitlines()) for p, text in modules.items()}
    assert reduced == {"cpu": 1, "cuda": 3}  # arrays that one reduction reads
