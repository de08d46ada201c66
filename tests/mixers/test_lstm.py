"""lstm against its equations in fp64, its gradients, and what training keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers.average.lstm import LSTM, Config
from hydrax.mixers.base import Context
from hydrax.ops.lstm import lstm
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

B, T, H, V, D = 2, 67, 2, 5, 32


def problem():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(B, T, H, 4, V)), rng.normal(size=(H, V, 4, V))
    return x, w, (rng.normal(size=(B, H, V)), rng.normal(size=(B, H, V)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(x, w, state, ids):
    y, (last_h, last_c) = np.zeros((B, T, H, V)), (a.copy() for a in state)
    for b in range(B):
        h, c = last_h[b], last_c[b]
        for t in range(T):
            if ids[b, t] == 0:
                break
            if t and ids[b, t] != ids[b, t - 1]:
                h, c = np.zeros_like(h), np.zeros_like(c)
            i, f, g, o = (x[b, t, :, n] + np.einsum("hv,hvw->hw", h, w[:, :, n]) for n in range(4))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = y[b, t] = sigmoid(o) * np.tanh(c)
        last_h[b], last_c[b] = h, c
    return y, (last_h, last_c)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_forms_equal_the_equations(impl: str):
    x, w, state = problem()
    ids = ms.documents(B, T)
    how = {"chunk_size": 16} if impl == "chunked" else {}
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, w, state))
    got = jax.jit(lambda x, w, s: lstm(x, w, initial_state=s, segment_ids=jnp.asarray(ids), impl=impl, **how))(*low)
    assert_trees_close("lstm", got, oracle(x, w, state, ids), TOLERANCE["fp32_op"])


def test_gradients_of_segments_are_those_of_the_whole():
    x, w, state = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem())
    ids = jnp.asarray(ms.documents(B, T))

    def grads(**how):
        def loss(*args):
            h, (last, c) = lstm(args[0], args[1], initial_state=args[2], segment_ids=ids, **how)
            return (h**2).sum() + (last * c).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, state)

    got, want = grads(impl="chunked", chunk_size=16), grads(impl="recurrent")
    assert_trees_close("gradient", got, want, TOLERANCE["fp32_op"])


def test_training_keeps_the_states_between_segments():
    """The gates of all tokens take 16 times what the inputs of a segment do."""

    def temporary(**how):
        def loss(x, w):
            return lstm(x, w, **how)[0].sum()

        x, w = jnp.zeros((1, 4096, 1, 4, 64)), jnp.zeros((1, 64, 4, 64))
        return jax.jit(jax.grad(loss)).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    assert temporary(impl="chunked") < 0.5 * temporary(impl="recurrent")


def test_the_mixer_is_its_cell_and_a_projection():
    cfg = build(Config, {"heads": H, "value_dim": V}).fill(D)
    m = LSTM(D, cfg, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(B, T, D))
    into = np.einsum("btd,dhgv->bthgv", x, np.asarray(m.cell.input[...], np.float64)) + np.asarray(m.cell.bias[...])
    zeros = np.zeros((B, H, V))
    want, _ = oracle(into, np.asarray(m.cell.recurrent[...], np.float64), (zeros, zeros), np.ones((B, T), int))
    low = jnp.asarray(x, jnp.float32)
    y, _ = jax.jit(lambda x: m(x, Context.of(x)))(low)
    kernel = np.asarray(m.project.kernel[...], np.float64)
    assert_close("y", y, np.einsum("bthv,hvd->btd", want, kernel), TOLERANCE["fp32_op"])
