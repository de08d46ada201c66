"""moba: the formula in fp64, what it is where every block is read, and the two ways to decode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context, Mixer
from hydrax.ops.softmax import attention
from tests.contract.cases import inside, normal, segments
from tests.mixers.test_softmax import turned
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, G, K, BLOCK, TOP = 16, 31, 4, 2, 4, 3, 3
SEG = np.stack([segments((10, 21), T), segments((28,), T)])
ONE = np.ones((2, T), np.int32)


def made(**options: Any) -> Mixer:
    cls = mixers.get("moba")
    sizes = {"heads": H, "kv_heads": G, "key_dim": K, "block": BLOCK, "top": TOP}
    return cls(D, build(cls.Config, sizes | options).fill(D), rngs=nnx.Rngs(0))


def run(mixer: Mixer, x: Any, seg: np.ndarray = SEG) -> jax.Array:
    return jax.jit(lambda m, x: m(x, Context.of(x, jnp.asarray(seg)))[0])(mixer, x)


def by_formula(mixer: Mixer, x: np.ndarray, route: str) -> tuple[np.ndarray, int]:
    """y [B,T,D] in fp64, query by query, and how many of the choices differ between the heads of a group."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    y, apart = np.zeros_like(x, np.float64), 0
    for b, doc in {(int(b), int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        e, index = x[b, rows].astype(np.float64), np.arange(len(rows))
        q, k, v = (np.einsum("td,dhk->thk", e, p[f"qkv/{n}/kernel"]) for n in "qkv")
        q, k = turned(q, index), turned(k, index)
        means = [k[n * BLOCK : (n + 1) * BLOCK].mean(0) for n in range(len(rows) // BLOCK)]
        for t in index:
            o, past = np.zeros((H, K)), range(t // BLOCK)
            score = np.array([[q[t, h] @ means[n][h // 2] for n in past] for h in range(H)])
            shared = score.reshape(G, 2, -1).mean(1).repeat(2, axis=0)
            best = [[sorted(past, key=lambda n, z=z: (-z[n], n))[: TOP - 1] for z in by] for by in (score, shared)]
            apart += best[0] != best[1]
            for h in range(H):
                chosen = {*best[route == "kv"][h], t // BLOCK}
                seen = [s for s in range(t + 1) if s // BLOCK in chosen]
                z = k[seen, h // 2] @ q[t, h] / np.sqrt(K)
                w = np.exp(z - z.max())
                o[h] = w / w.sum() @ v[seen, h // 2]
            y[b, rows[t]] = np.einsum("hv,hvd->d", o, p["project/kernel"])
    return y, apart


@pytest.mark.parametrize("route", ["query", "kv"])
def test_the_formula(route: str) -> None:
    mixer, x = made(route=route), normal(0, 2, T, D)
    y, apart = by_formula(mixer, x, route)
    assert apart > T // 2, "the heads of a group choose alike"
    assert_close("y", run(mixer, x)[SEG != 0], y[SEG != 0], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("sizes", [{"top": 11}, {"block": T, "top": 1}])
def test_where_all_blocks_are_read_it_is_attention(sizes: dict[str, int]) -> None:
    """Equal outputs and gradients."""
    graph, state = nnx.split(made(**sizes))
    x, do, ids = normal(0, 2, T, D), normal(1, 2, T, D), jnp.asarray(SEG)

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(inside(SEG)[0]))
        return mixer.out(attention(q, k, v, segment_ids=ids, impl="xla"))

    def loss(state: Any, x: jax.Array, f: Any) -> jax.Array:
        return jnp.sum(f(nnx.merge(graph, state), x) * do * (SEG != 0)[..., None])

    sparse = lambda m, x: m(x, Context.of(x, ids))[0]  # noqa: E731
    got, want = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(state, x, f) for f in (sparse, dense)
    )
    assert_close("loss", got[0], want[0], TOLERANCE["fp32_op"])
    grads = [(nnx.to_pure_dict(params), dx) for _, (params, dx) in (got, want)]
    assert_trees_close("gradients", *grads, TOLERANCE["fp32_op"])


def test_decode_over_all_keys() -> None:
    """Of the same parameters: a long prompt is read sparsely in either case, single tokens as the option says."""
    x, n = normal(0, 2, T, D), T - 2

    def decoded(mixer: Mixer) -> jax.Array:
        @jax.jit
        def run(mixer: Mixer, x: jax.Array) -> jax.Array:
            state, parts = mixer.init_state(2, T, jnp.float32), []
            for i, j in ((0, n), (n, n + 1), (n + 1, T)):
                at = jnp.broadcast_to(jnp.arange(i, j), (2, j - i))
                y, state = mixer(x[:, i:j], Context(positions=at), state)
                parts.append(y)
            return jnp.concatenate(parts, axis=1)

        return run(mixer, x)

    sparse, full, dense = decoded(made()), decoded(made(decode="full")), run(made(top=11), x, ONE)
    assert_close("sparse", sparse, run(made(), x, ONE), TOLERANCE["fp32_op"])
    assert_close("prompt", full[:, :n], sparse[:, :n], TOLERANCE["fp32_op"])
    assert_close("full", full[:, n:], dense[:, n:], TOLERANCE["fp32_op"])
    assert float(jnp.abs(full - sparse)[:, n:].max()) > 1e-3


def test_keys_of_another_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv = 'shared': expected own"):
        build(mixers.get("moba").Config, {"kv": "shared"})
