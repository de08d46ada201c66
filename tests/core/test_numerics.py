"""Numbers as sums of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.numerics import bf16_factors, einsum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_factors_in_bf16_are_those_in_fp32(dtype: str) -> None:
    """Also under jit, where XLA might drop roundings that are undone."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(50, 64)), jnp.float32) for _ in range(2))
    x = x.astype(dtype)
    left, right = jax.jit(bf16_factors)(x, y)
    assert left.dtype == right.dtype == jnp.bfloat16
    assert left.shape[-1] == right.shape[-1] == 64 * (6 if dtype == "float32" else 3)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(y, np.float64)).T
    assert np.max(np.abs(einsum("ik,jk->ij", left, right) - exact) / sizes) < 2**-22
