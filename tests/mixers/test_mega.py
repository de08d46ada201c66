"""mega: an independent recurrence in fp64, what crosses chunks, the highway, both weights and biases of scores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, special

from hydrax.core.build import ConfigError, build
from hydrax.mixers.average.mega import Config
from hydrax.ops.softmax import attention
from hydrax.ops.softmax.relative import relative_attention
from tests.contract.cases import D, case, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

VARIANTS = (None, 0, 1)  # simple; rotary with one head; laplace


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def oracle(c, x, residual):
    """One document [T,D], token by token, from the parameters by name; averages by SciPy's filters."""
    P = {name: np.asarray(p, np.float64) for name, p in c.params.items()}
    cfg, T = c.cfg, len(x)

    def linear(name, a, dims=1):
        return np.tensordot(a, P[f"{name}/kernel"], dims) + P[f"{name}/bias"]

    p, a = (sigmoid(P[f"averages/{n}"]) for n in ("delta", "alpha"))
    e = np.zeros((T, D))
    for d in range(D):
        for n in range(cfg.modes):
            drive, keep = (p * P["averages/beta"])[d, n], (1 - p * a)[d, n]
            e[:, d] += P["averages/gamma"][d, n] / cfg.modes**0.5 * signal.lfilter([drive], [1, -keep], x[:, d])
    m = silu(e + P["averages/omega"] * x)
    z = silu(linear("z", m))
    q, k = (z * P["gain"][i] + P["shift"][i] for i in (0, 1))
    v, o = silu(linear("v", x)), np.zeros((T, cfg.heads, cfg.values))
    for t in range(T):
        seen = range(t - t % cfg.chunk, t + 1)
        for h in range(cfg.heads):
            scores = np.array([q[t, h] @ k[s, h] for s in seen])
            distances = np.array([bias(P, cfg, h, t - s) for s in seen])
            if cfg.weights == "laplace":
                scores = scores / len(seen) + distances
                w = (1 + special.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2)))) / 2
            else:
                w = special.softmax(scores / math.sqrt(cfg.key_dim) + distances)
            o[t, h] = sum(w[i] * v[s, h] for i, s in enumerate(seen))
    candidate = silu(linear("skip", m) + linear("h", o * silu(linear("read", m)), 2))
    return sigmoid(linear("update", m)) * (candidate - residual)


def bias(P, cfg, head, distance):
    if cfg.bias == "simple":
        return P["bias/table"][head, distance]
    a, b = (P[f"bias/{n}"][head].reshape(2, -1) for n in "ab")
    turns = distance * cfg.theta ** (-np.arange(a.shape[1]) / a.shape[1])
    return ((a[0] + 1j * a[1]) * np.exp(1j * turns) * (b[0] - 1j * b[1])).real.sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_mega_equals_an_independent_recurrence(variant):
    c, lengths = case("mega", variant), (15, 4, 9)
    seg, x, residual = segments(lengths, 30), normal(1, 30, D), normal(2, 30, D)
    y, _ = jax.jit(lambda p, x, r: c(p, x, seg[None], residual=r))(c.params, x[None], residual[None])
    start = 0
    for n in lengths:
        own = slice(start, start + n)
        wanted = oracle(c, x[own].astype(np.float64), residual[own].astype(np.float64))
        assert_close(f"document at {start}", y[0, own], wanted, TOLERANCE["fp32_op"])
        start += n


def test_only_the_averages_cross_chunks():
    """With decays of 0 the first tokens of a chunk know nothing of the chunk before; otherwise they do."""
    c = case("mega")
    x, other = normal(1, 1, 12, D), normal(2, 1, 12, D)
    changed = np.concatenate([other[:, :6], x[:, 6:]], axis=1)
    run = jax.jit(lambda p, x: c(p, x)[0])
    assert np.any(np.asarray(run(c.params, changed)[0, 6:] != run(c.params, x)[0, 6:]))
    dead = {**c.params, "averages/gamma": jnp.zeros_like(c.params["averages/gamma"])}
    assert_equal("chunk 1", run(dead, changed)[0, 6:], run(dead, x)[0, 6:])
    assert np.any(np.asarray(run(dead, changed)[0, :6] != run(dead, x)[0, :6]))


def test_a_shut_gate_keeps_the_stream():
    """u = 0: the stream stays as it is; u = 1: the candidate takes its place."""
    c, x, residual = case("mega"), normal(1, 1, 9, D), normal(2, 1, 9, D)
    run = jax.jit(lambda p, r: c(p, x, residual=r)[0])

    def gated(b):
        kernel = jnp.zeros_like(c.params["update/kernel"])
        return {**c.params, "update/kernel": kernel, "update/bias": jnp.full((D,), b)}

    assert_equal("shut", run(gated(-1e4), residual), np.zeros((1, 9, D)))
    opened = run(gated(1e4), residual) + residual
    assert_close("open", opened, run(gated(1e4), -residual) - residual, TOLERANCE["fp32_op"])


def test_blocks_tell_mixers_the_stream(monkeypatch):
    """The stream is what the layer reads before its norm."""
    from hydrax.mixers.average import mega
    from hydrax.models import lm
    from tests.models.small import config, tokens

    seen = []
    original = mega.Mega.mix

    def mix(self, x, ctx, state):
        seen.append((x, ctx.residual))
        return original(self, x, ctx, state)

    monkeypatch.setattr(mega.Mega, "mix", mix)
    options = {"heads": 2, "key_dim": 4, "inner_dim": 8, "chunk": 3, "modes": 2}
    plan = lm.blueprint(config("mega", mixers={"mega": options}))
    plan.merge(plan.init(jax.random.key(0)))(tokens(1, 5))
    (x, residual), *_ = seen
    assert x.shape == residual.shape and x is not residual


class TestRelativeAttention:
    """The op by itself."""

    H, K, V, CHUNK = 2, 8, 4, 40

    def inputs(self, T):
        shapes = {"q": (2, T, self.H, self.K), "k": (2, T, self.H, self.K), "v": (2, T, self.H, self.V)}
        x = {name: jnp.asarray(normal(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
        return {**x, "table": jnp.asarray(normal(9, self.H, self.CHUNK))}

    def test_it_is_attention_with_a_mask_and_gradients_are_equal(self):
        """Rows of several blocks of queries, chunks and documents that begin anywhere."""
        T = 300
        x, seg = self.inputs(T), np.stack([segments((7, 201, 92), T), segments((290,), T)])
        dy = jnp.asarray(normal(5, 2, T, self.H, self.V))
        places = np.concatenate([np.arange(n) for n in (7, 201, 92)]), np.arange(T)
        positions = np.stack(places)
        same = (seg[:, :, None] == seg[:, None]) & (seg[:, None] != 0)
        same &= positions[:, :, None] // self.CHUNK == positions[:, None] // self.CHUNK
        distance = np.clip(np.arange(T)[:, None] - np.arange(T), 0, self.CHUNK - 1)

        def dense(q, k, v, table):
            bias = jnp.where(same[:, None], table[:, distance][None], -1e30)
            o = attention(q, k, v, bias=bias, impl="xla")
            return jnp.sum(o * dy * (seg != 0)[..., None, None])

        def ours(q, k, v, table):
            return jnp.sum(relative_attention(q, k, v, table, chunk=self.CHUNK, segment_ids=jnp.asarray(seg)) * dy)

        wanted, got = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*x.values()) for f in (dense, ours))
        assert_trees_close("value and gradients", got, wanted, TOLERANCE["fp32_op"])

    def test_memory_is_that_of_blocks(self):
        """Not of T² scores."""
        T = 8192
        x = jax.eval_shape(lambda: self.inputs(T))
        loss = jax.grad(lambda x: relative_attention(**x, chunk=self.CHUNK).sum())
        found = jax.jit(loss).lower(x).compile().memory_analysis()
        assert found.temp_size_in_bytes < T * T * 4 / 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"table": jnp.zeros((2, 3))}, r"table \(2, 3\): expected \[H,chunk\]"),
            ({"k": jnp.zeros((2, 5, 2, 8)), "v": jnp.zeros((2, 5, 2, 4))}, "as many keys as queries"),
            ({"impl": "cudnn"}, "relative_attention: impl = 'cudnn'"),
        ],
    )
    def test_refusals(self, change, message):
        with pytest.raises(ValueError, match=message):
            relative_attention(**{**self.inputs(9), "chunk": self.CHUNK, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads = 3: expected a divisor of inner_dim = 64"),
        ({"width": 16}, "width = 16: expected d_model = 32"),
        ({"bias": "alibi"}, "bias = 'alibi'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Config, options).fill(D)


def test_parameters_are_as_many_as_published():
    """D E + E + D (Z + E + 2 D) + (Z + E + 2 D) + E D + D + 4 Z + D (4 N + 1), and the biases by distance."""
    c = case("mega", 0)
    E, Z, N = c.cfg.inner_dim, c.cfg.key_dim, c.cfg.modes
    wide = Z + E + 2 * D
    assert sum(p.size for p in c.params.values()) == (
        D * E + E + D * wide + wide + E * D + D + 4 * Z + D * (4 * N + 1) + 2 * Z
    )


def test_decays_at_first():
    """Within (0, 1), around 3/4; signs of writes alternate."""
    from flax import nnx

    from hydrax.nn.long_conv import EMA

    averages = EMA(256, 16, skip=True, rngs=nnx.Rngs(0))
    q = 1 - jax.nn.sigmoid(averages.delta[...]) * jax.nn.sigmoid(averages.alpha[...])
    assert float(q.min()) > 0.5 and float(q.max()) < 1 and abs(float(q.mean()) - 0.75) < 0.01
    assert_equal("signs", jnp.sign(averages.beta[...][0]), np.tile([1.0, -1.0], 8))
