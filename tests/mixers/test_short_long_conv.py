"""short_long_conv: an independent recurrence in fp64 with its slopes, merged kernels, and what its parts reduce to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.mixers import Context
from hydrax.mixers.average.mega import ShortLongConfig, ShortLongConv
from hydrax.nn.long_conv import NO_RESTART
from hydrax.ops.conv.long import fft_conv
from tests.contract.cases import D, case, normal, segments
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.thorough

IMPLICIT: dict[str, Any] = {"heads": 2, "key_dim": 8, "inner_dim": 32, "filter": "implicit", "horizon": 7}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def kernel(P, cfg, T):
    """Of the long convolution, the branch in it: [T,D]."""
    tau = np.arange(T)[:, None]
    if cfg.filter == "ema":
        p, a = (sigmoid(P[f"filter/{n}"]) for n in ("delta", "alpha"))
        k = np.stack([(P["filter/gamma"] * p * P["filter/beta"] * (1 - p * a) ** t).sum(-1) for t in range(T)])
        k /= cfg.modes**0.5
    else:
        time = tau / cfg.horizon
        angles = 2 * np.pi * time * np.arange(1, 9)
        hidden = np.concatenate([time, np.cos(angles), np.sin(angles)], -1) @ P["filter/first"] + P["filter/offset"]
        k = np.maximum(hidden, 0) @ P["filter/second"] + P["filter/level"]
        k = k * np.exp(-np.log1p(np.exp(P["filter/rate"])) * time)
    taps = P["branch/weight"][::-1][:T]
    k[: len(taps)] += taps
    return k


def oracle(P, cfg, x, residual):
    """One document [T,D], token by token; one long convolution with the kernel that holds both branches."""
    T = len(x)

    def linear(name, a, dims=1):
        return np.tensordot(a, P[f"{name}/kernel"], dims) + P[f"{name}/bias"]

    padded = np.concatenate([np.zeros((cfg.conv_width - 1, D)), x])
    s = silu(np.stack([(padded[t : t + cfg.conv_width] * P["short/weight"]).sum(0) for t in range(T)]))
    k = kernel(P, cfg, T)
    m = rms_norm(
        s + np.stack([np.convolve(s[:, d], k[:, d])[:T] for d in range(D)], -1), P["norm/weight"], cfg.norm_eps
    )
    z, v, y = silu(linear("z", m)), silu(linear("v", x)), np.zeros((T, D))
    queries, keys = (elu1(z * P["gain"][i] + P["shift"][i]) for i in (0, 1))
    S = np.zeros((cfg.heads, cfg.key_dim, cfg.values))
    for t in range(T):
        S = S + keys[t][..., None] * v[t][:, None]
        o = rms_norm(np.einsum("hkv,hk->hv", S, queries[t]) / cfg.key_dim**0.5, P["o_norm/weight"], cfg.norm_eps)
        candidate = silu(linear("skip", m[t]) + linear("h", o * silu(linear("read", m[t])), 2))
        y[t] = sigmoid(linear("update", m[t])) * (candidate - residual[t])
    return y


def built(options: dict[str, Any]) -> tuple[ShortLongConfig, Any, dict[str, np.ndarray]]:
    """Options, the mixer as a function of parameters by name, and these, moved off zeros and ones."""
    cfg = build(ShortLongConfig, options).fill(D)
    graph, state = nnx.split(ShortLongConv(D, cfg, rngs=nnx.Rngs(0)))
    paths = {"/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
    P = {n: np.asarray(v[...], np.float64) + 0.1 * normal(i, *v.shape) for i, (n, (_, v)) in enumerate(paths.items())}

    def call(P: dict[str, Array], x: Array, **facts: Any) -> Array:
        module = nnx.merge(graph, nnx.from_flat_state([(path, v.replace(P[n])) for n, (path, v) in paths.items()]))
        return module(x, Context.of(x, **facts))[0]

    return cfg, call, P


@pytest.mark.parametrize("options", [{**IMPLICIT, "filter": "ema", "modes": 3}, IMPLICIT], ids=["ema", "implicit"])
def test_both_filters_are_the_recurrence(options):
    """Outputs, and the slopes of a weighted sum along a random direction of every parameter and input."""
    cfg, call, P = built(options)
    x, residual, dy = (normal(i, 13, D).astype(np.float64) for i in range(3))
    with jax.enable_x64(True):
        run = jax.jit(lambda P, x, r: call(P, x, residual=r))
        y, pullback = jax.vjp(run, P, jnp.asarray(x)[None], jnp.asarray(residual)[None])
        assert_close("fp64", y[0], oracle(P, cfg, x, residual), TOLERANCE["fp64"])
        dP, dx, dr = jax.tree.map(np.asarray, pullback(jnp.asarray(dy)[None]))
    given = P | {"x": x, "residual": residual}
    for i, (what, gradient) in enumerate((dP | {"x": dx[0], "residual": dr[0]}).items()):
        d = 1e-5 * normal(200 + i, *gradient.shape)

        def loss(sign: int, what: str = what, d: np.ndarray = d) -> float:
            moved = given | {what: given[what] + sign * d}
            return float((dy * oracle(moved, cfg, moved["x"], moved["residual"])).sum())

        assert_close(f"d{what}", (gradient * d).sum(), (loss(1) - loss(-1)) / 2, 1e-6)


@pytest.mark.slow
def test_packed_documents_are_the_recurrence_of_each():
    c, lengths = case("short_long_conv"), (1, 9, 2)
    x, residual = normal(0, 14, D), normal(1, 14, D)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(a, jnp.float64) for name, a in c.params.items()}
        args = (jnp.asarray(a, jnp.float64)[None] for a in (x, residual))
        y = jax.jit(lambda p, x, r: c(p, x, segments(lengths, 14)[None], residual=r)[0])(wide, *args)
    P, start = {name: np.asarray(a, np.float64) for name, a in c.params.items()}, 0
    for n in lengths:
        here = slice(start, start + n)
        assert_close("y", y[0, here], oracle(P, c.cfg, x[here], residual[here]), TOLERANCE["fp64"])
        start += n


def test_merged_kernels_are_both_branches():
    """Outputs and gradients: convolutions of the same tokens add up."""
    module = ShortLongConv(D, build(ShortLongConfig, IMPLICIT).fill(D), rngs=nnx.Rngs(0))
    x, dy = jnp.asarray(normal(0, 2, 15, D)), jnp.asarray(normal(1, 2, 15, D))
    taps, k = module.branch.weight[...], module.filter.kernel(15)

    def apart(taps: Array, k: Array, x: Array) -> Array:
        return fft_conv(x, k) + sum(taps[2 - i] * jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :15] for i in range(3))

    def merged(taps: Array, k: Array, x: Array) -> Array:
        return fft_conv(x, k.at[:3].add(taps[::-1]))

    (a, da), (b, db) = (jax.vjp(jax.jit(f), taps, k, x) for f in (merged, apart))
    assert_close("y", a, b, TOLERANCE["fp32_op"])
    for name, got, want in zip(("taps", "kernel", "x"), da(dy), db(dy), strict=True):
        assert_close(name, got, want, TOLERANCE["fp32_op"])


def test_an_implicit_filter_is_for_whole_rows():
    module = ShortLongConv(D, build(ShortLongConfig, IMPLICIT).fill(D), rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(0, 1, 6, D))
    for refused in (
        lambda: module(x, Context.of(x, segment_ids=jnp.ones((1, 6), jnp.int32))),
        lambda: module.init_state(1, 6, jnp.float32),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == f"filter = 'implicit': {NO_RESTART}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "fft"}, "filter = 'fft': expected one of ema, implicit"),
        ({"heads": 3}, "heads = 3: expected a divisor of inner_dim = 64"),
        ({"conv_width": 0}, "conv_width = 0: expected an integer >= 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        build(ShortLongConfig, options).fill(D)
    assert message in str(error.value)
