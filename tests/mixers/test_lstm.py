"""lstm and sha_rnn against their equations in fp64, their gradients, and what training keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers.average.lstm import LSTM, Config, ShaConfig, ShaRNN
from hydrax.mixers.base import Context
from hydrax.ops.lstm import lstm
from tests.contract.cases import segments
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


# ------------------------------------------------------------------------------------------------------------- sha_rnn

N, EPS = 13, 1e-5
SEG = np.stack([segments((6, 1, 5), N), segments((N,), N)])


def sha(**options):
    """A mixer of which no parameter is at its first value, and its parameters."""
    mixer = ShaRNN(D, build(ShaConfig, {"heads": H, "value_dim": V, **options}).fill(D), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for _, p in nnx.to_flat_state(nnx.state(mixer)):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.3 * rng.normal(size=p.shape), jnp.float32)
    return mixer, parameters(mixer)


def parameters(mixer):
    return {"/".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(nnx.state(mixer))}


def layer_norm(p, name, h):
    h = h - h.mean()
    return h / np.sqrt((h**2).mean() + EPS) * p[f"{name}/weight"] + p[f"{name}/bias"]


def by_tokens(p, x, window):
    """y [B,T,D], one token at a time; keys are scaled, and the values are not folded."""
    y = np.zeros(x.shape)
    a, c, e = sigmoid(p["gains"])
    both = np.einsum("hv,hvzij->zij", e, p["value_gain/kernel"]) + p["value_gain/bias"]
    gain = sigmoid(both[1]) * np.tanh(both[0])
    for row, t in zip(*np.nonzero(SEG), strict=True):
        if t == 0 or SEG[row, t] != SEG[row, t - 1]:
            h, cell, past = np.zeros((H, V)), np.zeros((H, V)), []
        x_t = np.einsum("d,dhgv->hgv", x[row, t], p["cell/input"]) + p["cell/bias"]
        i, f, g, o = np.moveaxis(x_t + np.einsum("hv,hvgw->hgw", h, p["cell/recurrent"]), 1, 0)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        past.append(layer_norm(p, "key_norm", h))
        n = layer_norm(p, "query_norm", h)
        q = a * layer_norm(p, "q_norm", np.einsum("hv,hvij->ij", n, p["q/kernel"]) + p["q/bias"])
        seen = np.stack(past if window is None else past[-window:])
        z = np.einsum("hv,shv->hs", q, c * seen) / np.sqrt(V)
        w = np.exp(z - z.max(1, keepdims=True))
        read = np.einsum("hs,shv->hv", w / w.sum(1, keepdims=True), gain * seen)
        y[row, t] = np.einsum("hv,hvd->d", n + read, p["project/kernel"])
    return y


@pytest.mark.parametrize("window", [4, None])
def test_sha_rnn_equals_its_equations_and_its_gradients_their_slopes(window: int | None):
    mixer, p = sha(window=window)
    rng = np.random.default_rng(4)
    x, weights = rng.normal(size=(2, 2, N, D))
    graph = nnx.graphdef(mixer)

    def loss(p, x):
        flat = [(path, v.replace(p["/".join(map(str, path))])) for path, v in nnx.to_flat_state(nnx.state(mixer))]
        y, _ = nnx.merge(graph, nnx.from_flat_state(flat))(x, Context.of(x, jnp.asarray(SEG)))
        return jnp.sum(jnp.where(SEG[..., None] != 0, y * weights, 0)), y

    with jax.enable_x64(True):
        (dp, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(p, jnp.asarray(x))
    want = by_tokens(p, x, window)
    assert_close("y", y[SEG != 0], want[SEG != 0], TOLERANCE["fp64"])
    for name, value, gradient in [*((name, p[name], dp[name]) for name in p), ("x", x, dx)]:
        along = 1e-5 * rng.normal(size=value.shape)
        ends = [
            (
                by_tokens(p, x + s * along, window)
                if name == "x"
                else by_tokens({**p, name: value + s * along}, x, window)
            )
            for s in (1, -1)
        ]
        slope = np.sum(weights * (ends[0] - ends[1])) / 2
        assert_close(f"slope along {name}", np.sum(np.asarray(gradient) * along), slope, 1e-6)


def run(mixer, x):
    """y, and the gradients of Σ sin y with respect to parameters and x."""
    graph, state = nnx.split(mixer)

    def loss(state, x):
        y, _ = nnx.merge(graph, state)(x, Context.of(x, jnp.asarray(SEG)))
        y = jnp.where(SEG[..., None] != 0, y, 0)
        return jnp.sum(jnp.sin(y)), y

    (params, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return {"y": y, "x": dx, **nnx.to_pure_dict(params)}


def test_a_window_as_long_as_the_row_is_none():
    x = np.random.default_rng(5).normal(size=(2, N, D)).astype(np.float32)
    assert_trees_close("window", run(sha(window=N)[0], x), run(sha(window=None)[0], x), TOLERANCE["fp32_op"])


def test_without_what_is_read_it_is_a_normed_lstm():
    """u = 0: the outputs of an LSTM with the same weights, normed, and its gradients."""
    x = np.random.default_rng(6).normal(size=(2, N, D)).astype(np.float32)
    mixer, _ = sha()
    mixer.value_gain.kernel[...], mixer.value_gain.bias[...] = jnp.zeros((H, V, 2, H, V)), jnp.zeros((2, H, V))

    class Normed(LSTM):
        def mix(self, x, ctx, state):
            h, new = super().mix(x, ctx, state)
            return self.query_norm(h), new

    plain = Normed(D, build(Config, {"heads": H, "value_dim": V}).fill(D), rngs=nnx.Rngs(1))
    plain.query_norm = mixer.query_norm
    nnx.update(plain, {name: nnx.state(mixer)[name] for name in ("cell", "project")})
    got, want = run(mixer, x), run(plain, x)
    assert_trees_close("normed", {name: got[name] for name in want}, want, TOLERANCE["fp32_op"])


def test_decoding_keeps_the_window_and_nothing_twice():
    mixer, _ = sha(window=4)
    state = mixer.init_state(2, 100, jnp.bfloat16)
    assert set(state["cache"]) == {"k", "positions", "segment_ids"}
    assert state["cache"]["k"].shape == (2, 4, H, V)


def test_it_starts_as_an_lstm_that_hardly_reads():
    """Gains of the values are products of a half and of weights of a tenth of the usual size."""
    mixer = ShaRNN(D, build(ShaConfig, {"heads": H, "value_dim": V}).fill(D), rngs=nnx.Rngs(0))
    g, f = mixer.value_gain(jax.nn.sigmoid(mixer.gains[...][2]))
    gain = np.asarray(jax.nn.sigmoid(f) * jnp.tanh(g))
    assert 0 < np.abs(gain).max() < 0.1
