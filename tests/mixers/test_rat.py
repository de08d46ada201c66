"""rat against its definition in fp64, and its two limits: attention and a recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.mixers.average.rat import Config, Rat
from hydrax.mixers.base import Context
from hydrax.ops.softmax import attention
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, W = 32, 37, 4, 8
X = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)


def made(**options):
    return Rat(D, build(Config, {"heads": H, "width": W, "chunk": 5} | options).fill(D), rngs=nnx.Rngs(0))


@nnx.jit
def heads(m, x):
    return m.mix(x, Context.of(x), None)[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, number):
    angle = number * 10000.0 ** (-np.arange(W // 2) / (W // 2))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def formula(m, L):
    """Token by token, head by head."""
    project = lambda y: np.einsum("td,dhk->thk", X[0].astype(np.float64), np.asarray(y.kernel[...], np.float64))  # noqa: E731
    q, k, u, z = (project(y) for y in (m.q, m.k, m.v, m.gate))
    f = sigmoid(project(m.forget) + np.asarray(m.forget_bias[...], np.float64))
    o = np.zeros_like(u)
    for h in range(H):
        ended, s, kappa = [], 0.0, 0.0
        for t in range(T):
            if t % L == 0:
                s, kappa = np.zeros(W), np.zeros(W)
            s, kappa = f[t, h] * s + (1 - f[t, h]) * u[t, h], f[t, h] * kappa + (1 - f[t, h]) * k[t, h % 2]
            entries = [*ended, (turned(kappa, t // L), s)]
            w = np.exp([turned(q[t, h % 2], t // L) @ key / W**0.5 for key, _ in entries])
            o[t, h] = sum(a * value for a, (_, value) in zip(w / w.sum(), entries, strict=True))
            if t % L == L - 1:
                ended.append(entries[-1])
    return sigmoid(z) * o


@pytest.mark.parametrize("chunk", [1, 5, 37, 64])
def test_it_is_its_definition(chunk: int):
    m = made(chunk=chunk)
    assert_close("heads", heads(m, X)[0], formula(m, chunk), TOLERANCE["fp32_op"])


def test_chunks_of_one_token_are_attention():
    """With the gradients of the input."""
    m = made(chunk=1)
    dz = np.random.default_rng(1).standard_normal((1, T, H, W)).astype(np.float32)

    def by_attention(x):
        open_ = 1 - jax.nn.sigmoid(m.forget(x) + m.forget_bias[...])
        positions = jnp.arange(T)[None]
        q, k = (jnp.tile(y(x), (1, 1, 2, 1)) for y in (m.q, m.k))
        o = attention(m.cfg.rope.turn(q, positions), m.cfg.rope.turn(open_ * k, positions), open_ * m.v(x))
        return o * jax.nn.sigmoid(m.gate(x))

    run = lambda f: jax.jit(jax.value_and_grad(lambda x: (f(x) * dz).sum()))(jnp.asarray(X))  # noqa: E731
    assert_trees_close("rat", run(lambda x: m.mix(x, Context.of(x), None)[0]), run(by_attention), TOLERANCE["fp32_op"])


def test_the_end_of_a_chunk_is_seen_from_the_next_one_on():
    m = made(chunk=8)
    x = jnp.asarray(X)
    jacobian = jax.jit(jax.jacobian(lambda x: m.mix(x, Context.of(x), None)[0][0].sum((1, 2))))(x)[:, 0]
    reach = np.asarray(jnp.abs(jacobian).max(-1) > 0)
    assert np.array_equal(reach, np.tril(np.ones((T, T), bool)))


def test_short_calls_may_end_more_chunks_than_fit_into_them():
    """Tokens 4 to 10, in chunks of 5: seven tokens, two ends of chunks, and one token that reads both."""
    m, x = made(), jnp.asarray(X)
    want, state = heads(m, X), m.init_state(1, T, jnp.float32)
    run = nnx.jit(lambda m, x, positions, state: m.mix(x, Context(positions=positions), state))
    for a, b in ((0, 4), (4, 11), (11, 13)):
        z, state = run(m, x[:, a:b], jnp.arange(a, b)[None], state)
        assert_close(f"tokens {a} to {b - 1}", z, want[:, a:b], TOLERANCE["fp32_op"])


def test_groups_must_divide_heads():
    with pytest.raises(ConfigError, match="groups = 3: expected a divisor of heads = 4"):
        build(Config, {"heads": 4, "groups": 3})
