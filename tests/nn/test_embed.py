"""The gradient of an embedding table, as every backend computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.nn.embed import FEW_ROWS, Embedding


@pytest.mark.parametrize("vocabulary", [67, FEW_ROWS + 1])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_gradient_adds_up_the_rows_of_each_token(
    vocabulary: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (3, 50))
    tokens[0] = 5  # all of a row collide
    dx = rng.normal(size=(3, 50, 8))
    graphdef, weights = nnx.split(Embedding(vocabulary, 8, rngs=nnx.Rngs(0)))

    def loss(weights):
        return (nnx.merge(graphdef, weights)(jnp.asarray(tokens)) * dx).sum()

    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        (got,) = jax.tree.leaves(jax.grad(loss)(weights))
    wanted = np.zeros(got.shape)
    np.add.at(wanted, tokens, dx)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-5)
