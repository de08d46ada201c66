"""aaren is softmax attention whose queries are parameters: values, gradients and what it cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers.average.slots import Aaren
from hydrax.mixers.base import Context
from hydrax.ops.softmax import attention
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T = 32, 37
X = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)


def made(**options: object) -> Aaren:
    cfg = build(Aaren.Config, {"heads": 2, "key_dim": 8, "value_dim": 16, "chunk_size": 16} | options).fill(D)
    return Aaren(D, cfg, rngs=nnx.Rngs(0))


@nnx.jit
def heads(m: Aaren, x: jax.Array) -> jax.Array:
    return m.mix(x, Context.of(x), None)[0]


def by_attention(m: Aaren, x: jax.Array) -> jax.Array:
    """Softmax attention to the past by a query that is the same at all times."""
    q = jnp.broadcast_to(m.query[...][:, 0], m.k(x).shape)
    return attention(q, m.k(x), m.v(x))


def test_it_is_attention_with_a_constant_query() -> None:
    """The heads, and the gradients of the input and of all parameters."""
    m = made()
    graph, params = nnx.split(m)
    weights = np.random.default_rng(1).standard_normal((1, T, 2, 16)).astype(np.float32)

    def run(f):
        def loss(params, x):
            z = f(nnx.merge(graph, params), x)
            return (z * weights).sum(), z

        (_, z), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, jnp.asarray(X))
        return z, grads

    got, want = run(lambda m, x: m.mix(x, Context.of(x), None)[0]), run(by_attention)
    assert_trees_close("aaren", got, want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("slots", [1, 3])
def test_it_is_its_definition(slots: int) -> None:
    """In numpy fp64, as cumulative sums."""
    m, x = made(slots=slots), X[0].astype(np.float64)
    y = {n: np.einsum("td,dhk->thk", x, np.asarray(getattr(m, n).kernel[...], np.float64)) for n in ("k", "v")}
    w = np.exp(np.einsum("hmk,thk->thm", np.asarray(m.query[...], np.float64), y["k"]) / np.sqrt(8))
    averages = np.cumsum(w[..., None] * y["v"][:, :, None], 0) / np.cumsum(w, 0)[..., None]
    p = np.ones_like(w)
    if m.read is not None:
        p = np.exp(np.einsum("td,dhm->thm", x, np.asarray(m.read.kernel[...], np.float64)))
    want = np.einsum("thm,thmv->thv", p / p.sum(-1, keepdims=True), averages)
    assert_close("heads", heads(m, X)[0], want, TOLERANCE["fp32_op"])


def test_it_does_not_see_the_order_of_the_past() -> None:
    m = made(slots=3)
    turned = np.concatenate([X[:, T - 2 :: -1], X[:, -1:]], axis=1)
    got, want = heads(m, turned), heads(m, X)
    assert_close("last token", got[:, -1], want[:, -1], TOLERANCE["fp32_op"])
    assert not np.allclose(got[:, 5], want[:, 5], atol=1e-2)
