"""based, fastmax, flow and inline against their definitions in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers.base import Context
from hydrax.mixers.linear.flow import Flow
from hydrax.mixers.linear.inline import InLine
from hydrax.mixers.linear.taylor import LONGEST, Based, Fastmax, Taylor
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T, H, K, V = 32, 37, 2, 6, 16
X = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)


def made(mixer, **options):
    cfg = build(mixer.Config, {"heads": H, "key_dim": K, "value_dim": V, "chunk_size": 16} | options).fill(D)
    return mixer(D, cfg, rngs=nnx.Rngs(0))


@nnx.jit
def heads(m, x):
    return m.mix(x, Context.of(x), None)[0]


def projected(linear):
    y = np.einsum("td,dhk->thk", X[0].astype(np.float64), np.asarray(linear.kernel[...], np.float64))
    return y if linear.bias is None else y + np.asarray(linear.bias[...], np.float64)


def averaged(s, v, degree=2):
    """Of values under the polynomial of the scores [H,T,T]."""
    w = np.tril(1 + s + (s**2 / 2 if degree == 2 else 0))
    return np.einsum("hts,shv->thv", w / w.sum(-1, keepdims=True), v)


def test_based_is_its_definition():
    m = made(Based)
    q, k, v = (projected(y) for y in (m.q, m.k, m.v))
    assert_close("heads", heads(m, X)[0], averaged(np.einsum("thk,shk->hts", q, k) / K**0.5, v), TOLERANCE["fp32_op"])


def test_based_is_taylor_without_positions():
    assert build(Based.Config, {"rope": {"theta": 5.0}}).rope.fraction == 0
    m, other = made(Based), made(Taylor, rope={"fraction": 0.0})
    assert_equal("heads", heads(m, X), heads(other, X))
    assert np.any(np.asarray(heads(m, X) != heads(made(Taylor), X)))


@pytest.mark.parametrize(("degree", "length"), [(1, 0.7), (1, 3.0), (2, 1.5)])
def test_fastmax_is_its_definition(degree: int, length: float):
    m = made(Fastmax, degree=degree)
    m.length[...] = jnp.asarray([length, 0.5])
    q, k = (y - y.mean(-1, keepdims=True) for y in (projected(m.q), projected(m.k)))
    q, k = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
    c = np.minimum([length, 0.5], LONGEST if degree == 1 else np.inf)
    want = averaged(np.einsum("h,thk,shk->hts", c**2, q, k), projected(m.v), degree)
    assert_close("heads", heads(m, X)[0], want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("mixer", [Taylor, Fastmax])
def test_rotary_positions_matter_by_distance_alone(mixer):
    m = made(mixer, rope={"fraction": 1.0})
    run = nnx.jit(lambda m, positions: m.mix(jnp.asarray(X), Context(positions=positions), None)[0])
    z, places = heads(m, X), jnp.arange(T)[None]
    assert_close("heads at later positions", run(m, places + 9), z, TOLERANCE["fp32_op"])
    assert np.any(np.abs(np.asarray(run(m, 2 * places) - z)) > 1e-2)


def flow_formula(q, k, v, clip=5.0, eps=1e-6):
    """Token by token, with the sums of the paper."""
    q, k = 1 / (1 + np.exp(-q)), 1 / (1 + np.exp(-k))
    o = np.zeros_like(v)
    for h in range(H):
        into, out, source = np.zeros(T), np.zeros(T), np.zeros(T)
        for t in range(T):
            n, past = t + 1, slice(0, t + 1)
            into[t] = (q[t, h] + eps) @ (k[past, h].sum(0) + eps)
            out[t] = (k[t, h] + eps) @ (q[past, h].sum(0) + eps)
            places = np.arange(1, n + 1)[:, None]
            sink = (q[t, h] + eps) @ ((k[past, h] * places / out[past, None]).sum(0) + eps) / n
            found = (k[t, h] + eps) @ ((q[past, h] * places / into[past, None]).sum(0) + eps) / n
            source[t] = np.clip(found, -clip, clip)
            c = [(j + 1) * np.exp(source[j]) / np.exp(source[: j + 1]).sum() for j in range(n)]
            o[t, h] = sum((q[t, h] @ k[j, h]) / into[t] * c[j] * v[j, h] for j in range(n)) / (1 + np.exp(-sink))
    return o


@pytest.mark.parametrize("clip", [5.0, 0.9])
def test_flow_is_its_definition(clip: float):
    m = made(Flow, clip=clip)
    for linear in (m.q, m.k):
        linear.kernel[...] = 3 * linear.kernel[...]
    want = flow_formula(projected(m.q), projected(m.k), projected(m.v), clip)
    assert_close("heads", heads(m, X)[0], want, TOLERANCE["fp32_op"])


def inline_formula(q, k, v):
    """By the matrix of weights, which the paper gives for the whole input: here for every prefix of it."""
    o = np.zeros_like(v)
    for t in range(T):
        s = np.einsum("hk,shk->hs", q[t], k[: t + 1]) / K**0.5 / (t + 1)
        o[t] = np.einsum("hs,shv->hv", s - s.mean(-1, keepdims=True) + 1 / (t + 1), v[: t + 1])
    return o


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_inline_is_its_definition_wherever_the_keys_lie(shift: float):
    m = made(InLine, conv_width=0)
    q, k, v = (projected(y) for y in (m.q, m.k, m.v))
    keys = m.k
    m.k = lambda x: keys(x) + shift
    got = m.mix(X, Context.of(X), None)[0]
    # Keys of 100 and something have lost two digits before they come here.
    assert_close("heads", got[0], inline_formula(q, k, v), TOLERANCE["fp32_op"] * (1 + shift))


@pytest.mark.parametrize("mixer", [Based, Fastmax, InLine])
def test_weights_sum_to_one(mixer):
    m = made(mixer, **({"conv_width": 0} if mixer is InLine else {}))
    m.v = lambda x: jnp.ones((*x.shape[:2], H, V))
    assert_close("heads", m.mix(X, Context.of(X), None)[0], np.ones((1, T, H, V)), 1e-5)


def test_long_documents_stay_finite():
    """The sums of flow grow with the row."""
    m = made(Flow)
    x = jax.random.normal(jax.random.key(0), (1, 16_384, D), jnp.bfloat16)
    z = np.asarray(heads(m, x), np.float32)
    assert np.isfinite(z).all() and 0.1 < np.abs(z[:, -1000:]).mean() / np.abs(z[:, 1000:2000]).mean() < 10
