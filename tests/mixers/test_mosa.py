"""mosa: the choice by threshold is causal and the same in steps, the formula in fp64, and how θ moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from hydrax.models.lm import ParamMeta
from hydrax.train.optim import OptimConfig, make_optimizer
from tests.contract.cases import D, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T = 24
SEG = np.stack([segments([9, 1, 12], T), segments([24], T)])


def made(**options):
    cls = mixers.get("mosa")
    options = {"heads": 4, "key_dim": 8, "sparsity": 3, "rope": {"fraction": 0.0}} | options
    return cls(D, build(cls.Config, options).fill(D), rngs=nnx.Rngs(0))


def reference(layer, x, seg):
    """z by loops over rows, heads and tokens."""
    w = {n: np.asarray(getattr(layer.qkv, n).kernel[...], np.float64) for n in "qkv"}
    r = 1 / (1 + np.exp(-x @ np.asarray(layer.router[...], np.float64)))
    q, k, v = (np.einsum("btd,dhk->bthk", x, w[n]) for n in "qkv")
    z = np.zeros(v.shape)
    for b, h in np.ndindex(len(x), 4):
        for document in set(seg[b]) - {0}:
            places, chosen = np.flatnonzero(seg[b] == document), []
            n = max(1, len(places) // 3)
            best = sorted(places, key=lambda t: (-r[b, t, h], t))[:n]
            for p, t in enumerate(places):
                first_come = r[b, t, h] >= 0.5 and len(chosen) < (p + 1) * 5 // 12
                if t in best if layer.cfg.mode == "ec" else first_come:
                    chosen.append(t)
                    s = np.array([q[b, t, h] @ k[b, j, h] for j in chosen]) * 8**-0.5
                    p_ = np.exp(s - s.max())
                    z[b, t, h] = r[b, t, h] * (p_ / p_.sum()) @ v[b, chosen, h]
    return z


@pytest.mark.parametrize("mode", ["threshold", "ec"])
def test_formula(mode):
    layer, x = made(mode=mode), normal(0, 2, T, D)
    z = layer.mix(jnp.asarray(x), Context.of(x, jnp.asarray(SEG)), None)[0]
    want = reference(layer, x.astype(np.float64), SEG)
    assert 0.1 < np.mean(np.any(want != 0, -1)) < 0.5
    assert_close("z", z, want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("mode", ["threshold", "ec"])
def test_only_the_threshold_is_causal(mode):
    layer, x = made(mode=mode), normal(0, 1, T, D)
    run = jax.jit(lambda x: layer(x, Context.of(x))[0])
    other = np.where((np.arange(T) < 12)[:, None], x, normal(1, 1, T, D))
    past, changed = (np.asarray(run(a))[:, :12] for a in (x, other))
    assert np.array_equal(past, changed) == (mode == "threshold")


def test_ec_does_not_generate():
    with pytest.raises(ConfigError, match="mode = 'ec': expected threshold"):
        made(mode="ec").init_state(1, 8, jnp.float32)


def theta_gradient(layer, x, seg):
    graph, params = nnx.split(layer)
    loss = lambda p: jnp.sum(nnx.merge(graph, p)(x, Context.of(x, seg))[0])  # noqa: E731
    return np.asarray(jax.grad(loss)(params)["theta"][...])


def test_statistics_add_up_and_the_optimiser_takes_their_mean():
    """In parts of unequal numbers of real tokens, divided by whatever the step divides by."""
    layer, x, seg = made(), jnp.asarray(normal(0, 2, T, D)), jnp.asarray(SEG)
    whole = theta_gradient(layer, x, seg)
    parts = sum(theta_gradient(layer, x[i : i + 1], seg[i : i + 1]) for i in range(2))
    assert_close("parts", parts, whole, TOLERANCE["fp32_op"])
    tx = make_optimizer(build(OptimConfig, {}), 10, {"theta": ParamMeta((), False, None, False, rule="average")})
    params = {"theta": layer.theta[...]}
    update = tx.update({"theta": jnp.asarray(whole / 7)}, tx.init(params), params)[0]["theta"]
    r = jax.nn.sigmoid(x @ layer.router[...])
    share = np.asarray(r >= 0.5)[SEG != 0].mean(0)
    assert_close("move", update[:, 0], 0.01 * (share - 1 / 3), TOLERANCE["fp32_op"])
    assert_equal("place of the number", update[:, 1], np.zeros(4))
    nothing = tx.update({"theta": jnp.zeros((4, 2))}, tx.init(params), params)[0]["theta"]
    assert_equal("without tokens", nothing, np.zeros((4, 2)))


@pytest.mark.parametrize("options", [{"sparsity": 8}, {"sparsity": 8, "slack": 0.5, "start": 0.3}])
@pytest.mark.parametrize("split", [1, 40])
def test_prefill_and_steps_where_most_tokens_are_dropped(options, split):
    """A document of 64 tokens of which a head keeps a few, of the others each for another reason: θ, or no room."""
    n = 64
    layer, x = made(**options), jnp.asarray(normal(0, 2, n, D))
    ids = jnp.ones((2, n), jnp.int32)

    @jax.jit
    def run(x, position, starts, state):
        positions = position + jnp.arange(x.shape[1])[None].repeat(2, 0)
        ctx = Context(positions=positions, segment_ids=ids[:, : x.shape[1]], starts=jnp.full(2, starts))
        return layer.mix(x, ctx, state)

    whole = jax.jit(lambda x: layer.mix(x, Context.of(x, ids), None)[0])(x)
    parts, state = [], layer.init_state(2, n, jnp.float32)
    for first, last in [(0, split), *((t, t + 1) for t in range(split, n))]:
        y, state = run(x[:, first:last], first, first == 0, state)
        parts.append(y)
    assert_close("z", jnp.concatenate(parts, 1), whole, TOLERANCE["fp32_op"])
    kept = np.any(np.asarray(whole) != 0, -1)
    high = np.asarray(jax.nn.sigmoid(x @ layer.router[...])) >= layer.cfg.start
    assert state["cache"]["k"].shape[1] == layer.cfg.slots(n) < n // 4
    assert 0 < kept.mean() < 1 / 6 and (high & ~kept).any() and (~high).any() and not (kept & ~high).any()
