"""agent and efficient against their definitions in fp64, and how they are related to aaren."""

import jax
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers.average.slots import Aaren, Agent, Efficient
from hydrax.mixers.base import Context
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, K, V = 32, 37, 2, 8, 16
X = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)


def made(mixer, **options):
    cfg = build(mixer.Config, {"heads": H, "key_dim": K, "value_dim": V, "chunk_size": 16} | options).fill(D)
    return mixer(D, cfg, rngs=nnx.Rngs(0))


@nnx.jit
def heads(m, x):
    return m.mix(x, Context.of(x), None)[0]


def projected(linear, x):
    y = np.einsum("td,dhk->thk", x, np.asarray(linear.kernel[...], np.float64))
    return y if linear.bias is None else y + np.asarray(linear.bias[...], np.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def running(s, v):
    """The average of the values so far under e^s, for every slot: [T,H,M,V]."""
    w = np.exp(s)
    return np.cumsum(w[..., None] * v[:, :, None], 0) / np.cumsum(w, 0)[..., None]


def test_agent_is_its_definition():
    m, x = made(Agent, agents=5), X[0].astype(np.float64)
    a = np.asarray(m.agents[...], np.float64) / np.sqrt(K)
    v, w = projected(m.v, x), np.asarray(m.v_conv.weight[...], np.float64)
    p, s = (np.einsum("hmk,thk->thm", a, projected(y, x)) for y in (m.q, m.k))
    near = sum(w[2 - i] * np.pad(v, ((i, 0), (0, 0), (0, 0)))[:T] for i in range(3))
    want = np.einsum("thm,thmv->thv", softmax(p), running(s, v)) + near
    assert_close("heads", heads(m, X)[0], want, TOLERANCE["fp32_op"])


def test_one_agent_is_aaren():
    """With gradients of all that they share; nothing reaches the queries of a single agent."""
    one, other = made(Agent, agents=1, conv_width=0), made(Aaren)
    other.query[...], other.k.kernel[...] = one.agents[...], one.k.kernel[...]
    other.v.kernel[...], other.project.kernel[...] = one.v.kernel[...], one.project.kernel[...]
    dz = np.random.default_rng(1).standard_normal((1, T, H, V)).astype(np.float32)

    def loss(m):
        z = heads(m, X)
        return (z * dz).sum(), z

    def run(m):
        (_, z), grads = nnx.value_and_grad(loss, has_aux=True)(m)
        return z, grads

    (z, grads), (z_other, grads_other) = run(one), run(other)
    assert_close("heads", z, z_other, TOLERANCE["fp32_op"])
    shared = lambda g, query: {"query": g[query], "k": g["k"], "v": g["v"]}  # noqa: E731
    assert_trees_close("gradient", shared(grads, "agents"), shared(grads_other, "query"), TOLERANCE["fp32_op"])
    assert not np.any(np.asarray(jax.tree.leaves(grads["q"])[0]))


@pytest.mark.parametrize("key_norm", [True, False])
def test_efficient_is_its_definition(key_norm: bool):
    m, x = made(Efficient, key_norm=key_norm), X[0].astype(np.float64)
    k, v = projected(m.k, x), projected(m.v, x)
    s = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) if key_norm else k
    want = np.einsum("thm,thmv->thv", softmax(projected(m.q, x)), running(s, v))
    assert_close("heads", heads(m, X)[0], want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("mixer", [Agent, Efficient])
def test_weights_sum_to_one(mixer):
    m = made(mixer)
    m.v = lambda x: jax.numpy.ones((*x.shape[:2], H, V))
    m.v_conv = None
    assert_close("heads", m.mix(X, Context.of(X), None)[0], np.ones((1, T, H, V)), 1e-6)
