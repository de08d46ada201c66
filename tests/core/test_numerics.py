"""Numbers as sums of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.numerics import bf16_factors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_factors_in_bf16_are_those_in_fp32(dtype: str) -> None:
    """Also under jit, where XLA might drop roundings that are undone."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(50, 64)), jnp.float32) for _ in range(2))
    x = x.astype(dtype)
    left, right = jax.jit(bf16_factors)(x, y)
    assert left.dtype == right.dtype == jnp.bfloat16
    assert left.shape[-1] == right.shape[-1] == 64 * (6 if dtype == "float32" else 3)
    left, right, x, y = (np.asarray(a, np.float64) for a in (left, right, x, y))
    assert np.max(np.abs(left @ right.T - x @ y.T) / (np.abs(x) @ np.abs(y).T)) < 2**-24
