"""Feature maps against their formulas, and what the table says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.nn.features import TABLE
from tests.tolerances import TOLERANCE, assert_close, assert_equal

K = 3
X = np.random.default_rng(0).normal(size=(2, 5, 4, K)).astype(np.float32)


def affine(map: nnx.Module, x: np.ndarray) -> np.ndarray:
    """x W + b with the learned values, one output at a time."""
    y = np.stack([(x * np.asarray(map.weight[:, j], np.float64)).sum(-1) for j in range(K)], axis=-1)
    return y if map.bias is None else y + np.asarray(map.bias[...])


def elu1(x: np.ndarray, phi: object) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def dpfp(x: np.ndarray, phi: object) -> np.ndarray:
    x = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    return np.stack([x[..., i] * x[..., i - j] for j in (1, 2, 3, 4) for i in range(2 * K)], axis=-1)


def hedgehog(x: np.ndarray, phi: nnx.Module) -> np.ndarray:
    y = affine(phi.map, x)
    e = np.exp(np.concatenate([2 * y, -2 * y], axis=-1))
    return e / e.sum(-1, keepdims=True)


def taylor2(x: np.ndarray, phi: object) -> np.ndarray:
    of_pairs = [x[..., i] * x[..., j] * (0.5**0.5 if i == j else 1) for i in range(K) for j in range(i, K)]
    pairs = np.stack(of_pairs, axis=-1) / np.sqrt(K)
    return np.concatenate([np.ones_like(x[..., :1]), x / K**0.25, pairs], axis=-1)


FORMULAS = {
    "dpfp": dpfp,
    "elu1": elu1,
    "hadamard": lambda x, phi: affine(phi.left, x) * affine(phi.right, x),
    "hedgehog": hedgehog,
    "identity": lambda x, phi: x,
    "relu": lambda x, phi: np.maximum(x, 0),
    "t2r": lambda x, phi: np.maximum(affine(phi.map, x), 0),
    "taylor2": taylor2,
}


def learned(name: str) -> object:
    """The map of that name, its parameters moved off their initial values."""
    phi = TABLE[name].make(K, nnx.Rngs(0))
    if isinstance(phi, nnx.Module):
        for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(phi, nnx.Param))):
            p[...] = p[...] + 0.3 * jax.random.normal(jax.random.key(i), p.shape)
    return phi


@pytest.mark.parametrize("name", TABLE)
def test_values_are_those_of_the_formula(name: str) -> None:
    phi, row = learned(name), TABLE[name]
    assert_close("features", phi(X), FORMULAS[name](X.astype(np.float64), phi), TOLERANCE["fp32_op"])
    low = phi(X.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16 and low.shape == (*X.shape[:-1], row.width(K))
    assert_close("bf16", low, phi(low.astype(jnp.float32) if name == "identity" else X), TOLERANCE["bf16_gradient"])


@pytest.mark.parametrize("name", TABLE)
def test_the_table_says_what_is_negative_and_what_is_learned(name: str) -> None:
    phi, row = learned(name), TABLE[name]
    y = np.asarray(phi(10 * X)).reshape(-1, row.width(K))
    assert bool(np.all(y @ y.T >= 0)) == row.nonnegative
    params = [p for _, p in nnx.to_flat_state(nnx.state(phi, nnx.Param))] if isinstance(phi, nnx.Module) else []
    assert sum(p.ndim == 2 for p in params) == row.matrices
    assert all(p.shape == (K,) * p.ndim for p in params)


def test_taylor2_is_the_polynomial_of_scaled_scores() -> None:
    phi = TABLE["taylor2"].make(K, nnx.Rngs(0))
    q, k = X.astype(np.float64)
    s = (q * k).sum(-1) / np.sqrt(K)
    assert_close("φ(q)·φ(k)", (phi(X[0]) * phi(X[1])).sum(-1), 1 + s + s**2 / 2, TOLERANCE["fp32_op"])


def test_elu1_stays_positive_and_smooth() -> None:
    phi = TABLE["elu1"].make(K, nnx.Rngs(0))
    x = jnp.asarray([-80.0, -20.0, -1e-3, 0.0, 1e-3, 30.0])
    value, slope = jax.vmap(jax.value_and_grad(phi))(x)
    assert_close("below zero", value[:3] / np.exp([-80.0, -20.0, -1e-3]), np.ones(3), 1e-5)
    assert_close("slope", slope, np.exp(np.minimum(x, 0)), 1e-5)


def test_hedgehog_starts_as_the_identity_and_is_bounded() -> None:
    phi = TABLE["hedgehog"].make(K, nnx.Rngs(0))
    e = np.exp(2 * np.concatenate([X, -X], axis=-1))
    assert_close("at first", phi(X), e / e.sum(-1, keepdims=True), TOLERANCE["fp32_op"])
    assert_equal("saturated", phi(1e4 * jnp.asarray([1.0, 0.5, -0.5])), [1.0, 0, 0, 0, 0, 0])
