"""Megalodon and Gecko against their equations in numpy fp64, one token at a time, and what each part reduces to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.mixers.average import megalodon
from hydrax.mixers.base import Context
from hydrax.nn.cema import CEMA
from hydrax.nn.timestep_norm import BETAS
from hydrax.ops.ema import ema
from hydrax.ops.slots import slot_softmax
from hydrax.ops.slots.working_memory import working_memory
from tests.contract.cases import D, case, inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

LENGTHS = (1, 17, 5, 8)  # documents that start at every phase of chunks, and padding
T = 33
SEG = segments(LENGTHS, T)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def turned(x, position, theta):
    """Interleaved pairs of x [H,K], turned."""
    K = x.shape[-1]
    angles = position * theta ** (-np.arange(K // 2) / (K // 2))
    z = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def normed(p, x, groups, decayed):
    """n [T,D] of one document: statistics over all steps so far, or decayed averages of those of steps."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        past = x[: t + 1].reshape(t + 1, groups, -1)
        mean, var = past.mean((0, 2)), past.var((0, 2))
        if decayed:
            w, u = (beta ** np.arange(t + 1)[::-1, None] for beta in BETAS)
            mean, var = (w * past.mean(2)).sum(0) / w.sum(), (u * past.var(2)).sum(0) / u.sum()
        y[t] = ((past[t] - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]).reshape(-1)
    return y * (1 + p["norm/weight"]) + p["norm/bias"]


def averaged(p, n, modes):
    """CEMA of one document, with and without the parameter ω."""
    alpha, delta = sigmoid(p["ema/alpha"]), sigmoid(p["ema/delta"])
    theta = np.arange(1, modes + 1) * 2 * np.pi / modes * sigmoid(p["ema/theta"])[:, None]
    q, gamma = (1 - alpha * delta) * np.exp(1j * theta), p["ema/real"] + 1j * p["ema/imaginary"]
    omega, scale = (p["ema/omega"], modes**-0.5) if "ema/omega" in p else (1.0, 1.0)
    h, y = np.zeros_like(q), np.zeros_like(n)
    for t, x in enumerate(n):
        h = q * h + alpha * x[:, None]
        y[t] = scale * (gamma * h).sum(-1).real + omega * x
    return y


def remembered(q, k, v, C):
    """The working memory of one document [T,H,*], one head and chunk at a time."""
    o = np.zeros_like(v)
    for h in range(q.shape[1]):
        M, total = np.zeros((k.shape[-1], v.shape[-1])), np.zeros(k.shape[-1])
        for start in range(2 * C, len(q), C):
            k_j, v_j = k[start - 2 * C : start - C, h], v[start - 2 * C : start - C, h]
            share = np.exp(k_j).sum(0) / (total + np.exp(k_j).sum(0))
            total = total + np.exp(k_j).sum(0)
            M = M + share[:, None] * (softmax(k_j, 0).T @ (v_j - softmax(k_j) @ M) - M)
            o[start : start + C, h] = q[start : start + C, h] @ M
    return o


def expected(name, cfg, p, x):
    """y of one document."""
    H, C, own = cfg.heads, cfg.chunk, name == "megalodon"
    n = normed(p, x, cfg.groups, not own)
    m = rms(averaged(p, n, cfg.modes)) * (1 + p["ema_norm/weight"])
    z = rms(np.einsum("td,dhk->thk", m, p["z/kernel"]) + p["z/bias"]) / np.sqrt(cfg.key_dim)
    kinds = [z * (1 + p["gain"][i]) + p["shift"][i] for i in range(len(p["gain"]))]
    v = silu(np.einsum("td,dhv->thv", n, p["v/kernel"]) + p["v/bias"])
    r = silu(np.einsum("td,dhv->thv", m, p["gate/kernel"]) + p["gate/bias"])
    places = np.arange(len(x)) % C if own else np.arange(len(x))
    q, k = (np.stack([turned(a, t, cfg.rope.theta) for a, t in zip(kind, places, strict=True)]) for kind in kinds[:2])
    o = np.zeros_like(v)
    for t in range(len(x)):
        first = t // C * C if own else max(0, t // C * C - C)
        weights = softmax(np.einsum("hk,shk->hs", q[t], k[first : t + 1]))
        o[t] = np.einsum("hs,shv->hv", weights, v[first : t + 1])
    o = o * r
    if not own:
        o = o + remembered(softmax(kinds[2]), kinds[3], v, C)
    heads = np.concatenate([o, m.reshape(len(x), H, -1)], -1)
    return np.einsum("thv,hvd->td", heads, p["project/kernel"]) + p["project/bias"]


@pytest.mark.parametrize("name", ["megalodon", "gecko"])
def test_it_is_its_equations(name: str) -> None:
    """Packed documents, with parameters of which none is zero."""
    c, x = case(name), normal(0, 1, T, D)
    y, _ = jax.jit(lambda x: c(c.params, x, SEG[None]))(x)
    p = {path: np.asarray(a, np.float64) for path, a in c.params.items()}
    for i in range(1, len(LENGTHS) + 1):
        own = i == SEG
        assert_close(f"document {i}", y[0][own], expected(name, c.cfg, p, x[0, own].astype(np.float64)), 3e-5)


def test_without_angles_the_averages_are_real() -> None:
    """θ = 0 and real γ: values and the gradients of all other parameters are those of real averages."""
    made = CEMA(D, 3, skip=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(made)
    params["theta"][...] = jnp.full((D,), -1e4)
    x, weights = jnp.asarray(normal(1, 2, T, D)), normal(2, 2, T, D)

    def by_angles(params, x):
        return nnx.merge(graph, params)(x, Context.of(x), None)[0]

    def by_real(params, x):
        m = nnx.merge(graph, params)
        alpha, delta = jax.nn.sigmoid(m.alpha[...]), jax.nn.sigmoid(m.delta[...])
        return ema(x, jnp.log1p(-alpha * delta), alpha, 3**-0.5 * m.real[...])[0] + m.omega[...] * x

    def run(f):
        loss = lambda params, x: (jnp.sum(f(params, x) * weights), f(params, x))  # noqa: E731
        (_, y), (dparams, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return y, dx, {name: dparams[name][...] for name in ("alpha", "delta", "real", "omega")}

    assert_trees_close("averages", run(by_angles), run(by_real), TOLERANCE["fp32_op"])


C, H, K, V = 3, 2, 4, 5
Q, KEYS, VALUES = (normal(i, 1, T, H, n) for i, n in ((3, K), (4, K), (5, V)))
POSITIONS = jnp.asarray(inside(SEG[None])[0])


def recalled(q, k, v, positions=None, **facts):
    positions = jnp.arange(q.shape[1])[None] if positions is None else positions
    return working_memory(*map(jnp.asarray, (q, k, v)), positions, chunk=C, **facts)[0]


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_the_memory_is_its_equations(impl: str) -> None:
    o = jax.jit(lambda *x: recalled(*x, POSITIONS, segment_ids=jnp.asarray(SEG[None]), impl=impl))(Q, KEYS, VALUES)
    for i in range(1, len(LENGTHS) + 1):
        own = i == SEG
        want = remembered(*(a[0, own].astype(np.float64) for a in (Q, KEYS, VALUES)), C)
        assert_close(f"document {i}", o[0, own], want, TOLERANCE["fp32_op"])
        assert_equal(f"first chunks of document {i}", o[0, own][: 2 * C], np.zeros_like(want[: 2 * C]))


def test_the_first_chunk_is_averaged_by_the_softmax_of_its_keys() -> None:
    """What chunk 2 reads is what `slot_softmax` holds after chunk 0, with equal gradients."""

    def by_memory(q, k, v):
        return recalled(q, k, v)[:, 2 * C :]

    def by_slots(q, k, v):
        read = jnp.concatenate([jnp.zeros_like(q[:, : C - 1]), q[:, 2 * C :]], axis=1)
        k = jnp.concatenate([k[:, :C], jnp.full_like(k[:, :C], -1e5)], axis=1)[:, : read.shape[1]]
        return slot_softmax(read, k, jnp.pad(v[:, :C], [(0, 0), (0, C - 1), (0, 0), (0, 0)]))[0][:, C - 1 :]

    weights = normal(6, 1, C, H, V)

    def run(f):
        loss = lambda *x: (jnp.sum(f(*x) * weights), f(*x))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*short)

    short = tuple(jnp.asarray(a[:, : 3 * C]) for a in (Q, KEYS, VALUES))
    assert_trees_close("memory", run(by_memory), run(by_slots), TOLERANCE["fp32_op"])


def test_the_memory_sees_what_attention_cannot() -> None:
    """∂o_t / ∂v_s is zero for s in the chunk of t, the one before it, and the future; and not for earlier s."""
    J = jax.jit(jax.jacobian(lambda v: recalled(Q[:, :15], KEYS[:, :15], v)[0, :, 0, 0]))(jnp.asarray(VALUES[:, :15]))
    seen = np.abs(np.asarray(J)[:, 0, :, 0, 0]) > 0
    t, s = np.indices(seen.shape)
    assert_equal("seen", seen, s // C < t // C - 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"groups": 32}, "groups = 32: expected a divisor of d_model = 32 below it"),
        ({"heads": 4, "groups": 2}, "groups = 2: expected a multiple of heads = 4"),
        ({"heads": 2, "inner_dim": 33}, "inner_dim = 33: expected a multiple of heads = 2"),
        ({"heads": 2, "groups": 8, "width": 16}, "width = 16: expected d_model = 32, or nothing"),
        ({"heads": 2, "groups": 8, "rope_heads": 3}, "rope_heads = 3: expected at most heads = 2"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, line: str) -> None:
    Config = megalodon.GeckoConfig if "rope_heads" in options else megalodon.Config
    with pytest.raises(ConfigError) as refused:
        build(Config, options).fill(D)
    assert str(refused.value) == line
