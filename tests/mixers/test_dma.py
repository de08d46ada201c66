"""dma: the formula in fp64, what it is where every key is kept, ties, and a cache of a bounded size."""

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
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, G, K = 16, 21, 4, 2, 4
SEG = np.stack([segments((6, 15), T), segments((18,), T)])


def made(**options: Any) -> Mixer:
    """A mixer of which no parameter is zero."""
    cls = mixers.get("dma")
    cfg = build(cls.Config, {"heads": H, "kv_heads": G, "key_dim": K, "keep": 5, **options}).fill(D)
    mixer = cls(D, cfg, rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(mixer))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.2 * normal(i, *p.shape))
    return mixer


def by_formula(mixer: Mixer, x: np.ndarray) -> np.ndarray:
    """y [B,T,D] in fp64, query by query; the keys are chosen by sorting."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    c, y = mixer.cfg, np.zeros_like(x, np.float64)
    for b, doc in {(b, int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        index = np.arange(len(rows))
        q, k, v = (np.einsum("td,dhk->thk", x[b, rows], p[f"qkv/{n}/kernel"]) for n in "qkv")
        q, k = (
            turned(a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * p[f"qkv/{n}_norm/weight"], index)
            for n, a in (("q", q), ("k", k))
        )
        score = p["a"] * np.log1p(np.exp(np.einsum("tgv,gvh->th", v, p["w"])))
        bias = np.exp(score) if c.bias_form == "exp" else score
        for t, h in np.ndindex(len(rows), H):
            g = h // (H // G)
            chosen = sorted(range(t + 1), key=lambda j, g=g: (-score[j, g], j))[: c.keep]
            chosen = sorted({*chosen, *range(max(t + 1 - c.keep_last, 0), t + 1)})
            z = np.array([q[t, h] @ k[j, g] / np.sqrt(K) + bias[j, g] for j in chosen])
            w = np.exp(z - z.max())
            o = np.einsum("s,sv->v", w / w.sum(), v[chosen, g])
            y[b, rows[t]] += o @ p["project/kernel"][h]
    return y


@pytest.mark.parametrize("options", [{}, {"keep_last": 3}, {"bias_form": "linear", "keep": 1}], ids=str)
def test_the_formula(options: dict[str, Any]) -> None:
    mixer, x = made(**options), normal(0, 2, T, D)
    y = jax.jit(lambda x: mixer(x, Context.of(x, jnp.asarray(SEG)))[0])(x)
    assert_close("y", y[SEG != 0], by_formula(mixer, x)[SEG != 0], TOLERANCE["fp32_op"])


def test_where_all_keys_are_kept_it_is_attention_with_a_bias() -> None:
    """Equal outputs and gradients of all parameters: those of β are those of a bias."""
    mixer, x, do = made(keep=T), normal(0, 2, T, D), normal(1, 2, T, D)
    graph, state = nnx.split(mixer)
    ids = jnp.asarray(SEG)

    def sparse(mixer: Mixer, x: jax.Array) -> jax.Array:
        return mixer(x, Context.of(x, ids))[0]

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(inside(SEG)[0]))
        beta = jnp.exp(mixer.a[...] * jax.nn.softplus(jnp.einsum("btgv,gvh->bth", v, mixer.w[...])))
        bias = jnp.repeat(jnp.moveaxis(beta, 1, 2), H // G, axis=1)[:, :, None]
        return mixer.out(attention(q, k, v, bias=jnp.broadcast_to(bias, (2, H, T, T)), segment_ids=ids, impl="xla"))

    def loss(state: Any, x: jax.Array, f: Any) -> jax.Array:
        return jnp.sum(f(nnx.merge(graph, state), x) * do * (SEG != 0)[..., None])

    got, want = (jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(state, x, f) for f in (sparse, dense))
    assert_trees_close("gradients", nnx.to_pure_dict(got[0]), nnx.to_pure_dict(want[0]), TOLERANCE["fp32_op"])
    assert_close("dx", got[1], want[1], TOLERANCE["fp32_op"])


def test_equal_scores_keep_the_earliest_keys() -> None:
    """The trap of A = 0, the published initialisation: what is near is lost. `keep_last` brings it back."""
    x = normal(0, 1, T, D)
    for options, sees_itself in (({}, False), ({"keep_last": 1}, True)):
        mixer = made(**options)
        mixer.a[...] = jnp.zeros(G)
        heads = {"values": lambda v: jnp.zeros_like(v).at[:, -1].set(1.0)}
        y, _ = jax.jit(lambda m, x, h=heads: m(x, Context.of(x, taps=h)))(mixer, x)
        assert bool(jnp.any(y[:, -1] != 0)) == sees_itself
    assert float(jnp.abs(mixers.get("dma")(D, made().cfg, rngs=nnx.Rngs(0)).a[...]).min()) > 0


def test_padding_alone_takes_no_keys_of_the_open_block() -> None:
    """Wherever the positions of padding begin: a key that was beaten in the query's own block is still seen there."""
    mixer, x = made(keep=1, granularity=8), normal(5, 1, 6, D)
    run = jax.jit(lambda x, ids, s: mixer(x, Context.of(x, ids), s)[1])
    state = run(x, jnp.ones((1, 6), jnp.int32), mixer.init_state(1, 20, jnp.float32))
    after = run(x, jnp.zeros((1, 6), jnp.int32), state)
    assert np.count_nonzero(state["segment_ids"]) == 6 * G
    jax.tree.map(lambda a, b: assert_equal("state", a, b), after, state)


def test_the_cache_does_not_grow() -> None:
    mixer = made(keep=5, keep_last=2)
    sizes = [jax.eval_shape(lambda n=n: mixer.init_state(1, n, jnp.bfloat16))["k"].shape[1] for n in (3, 7, 100)]
    assert sizes == [3, 7, 7]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kv": "shared"}, "kv = 'shared': expected own"),
        ({"keep_last": 1, "granularity": 8}, "keep_last = 1: expected 0 with granularity"),
    ],
)
def test_refusals(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        build(mixers.get("dma").Config, options)


def test_long_rows_meet_the_kept_keys_alone() -> None:
    """Chunks of queries with the few living keys give what all scores at once give, with all gradients."""
    mixer, x = made(), normal(0, 1, 300, D)
    graph, state = nnx.split(mixer)

    def loss(state: Any, x: jax.Array, impl: str) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, Context.of(x, impl=impl))[0]))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    got, want = (jax.tree.leaves(run(state, x, f"attention={form}")) for form in ("chunked", "xla"))
    assert_trees_close("loss and gradients", got, want, TOLERANCE["fp32_op"])
