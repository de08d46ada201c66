"""routing: the formula in fp64, what one cluster reduces to, what its cache holds, and how centroids move."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.mixers import Context, Mixer
from hydrax.models.lm import ParamMeta
from hydrax.train.optim import OptimConfig, make_optimizer
from tests.contract.cases import D, inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

T, H, G, C, W = 24, 4, 2, 3, 3
SEG = np.stack([segments([9, 1, 12], T), segments([24], T)])
TINY = {"heads": H, "kv_heads": G, "key_dim": 8, "clusters": C, "window": W}


def made(name: str = "routing", **options: Any) -> Any:
    cls = mixers.get(name)
    return cls(D, build(cls.Config, options).fill(D), rngs=nnx.Rngs(0))


def routing(**options: Any) -> Any:
    return made(**TINY | options)


def projected(layer: Any, x: np.ndarray) -> list[np.ndarray]:
    """q, k and v before any rotation."""
    w = {n: np.asarray(getattr(layer.qkv, n).kernel[...], np.float64) for n in "qkv"}
    return [np.einsum("btd,dhk->bthk", x, w[n]) for n in "qkv"]


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Channels i and i + K/2 are a complex number that turns by p · 10000^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearness(layer: Any, x: np.ndarray) -> np.ndarray:
    """û·μ̂ of keys [B,T,G,C] or queries [B,T,H,C]."""
    mu = unit(np.asarray(layer.centroids[...], np.float64)[..., :-1])
    return np.einsum("bthk,hck->bthc", unit(x), np.repeat(mu, x.shape[2] // G, axis=0))


def softmax_mean(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    s = k @ q * 8**-0.5
    p = np.exp(s - s.max())
    return (p / p.sum()) @ v


def reference(layer: Any, x: np.ndarray) -> np.ndarray:
    """z by loops over rows, heads and tokens."""
    (q, k, v), positions = projected(layer, x), inside(SEG)[0]
    of_keys = nearness(layer, k)
    of_queries = nearness(layer, q) if layer.cfg.route == "query" else np.repeat(of_keys, H // G, axis=2)
    q, k = (turned(a, positions) for a in (q, k))
    z = np.zeros((2, T, H, v.shape[-1]))
    for b, h in np.ndindex(2, H):
        near, far = of_keys[b, :, h // (H // G)], of_queries[b, :, h]
        for document in set(SEG[b]) - {0}:
            places = np.flatnonzero(SEG[b] == document)
            members: list[list[int]] = [[] for _ in range(C)]
            keys, queries = ([sorted(places, key=lambda t: (-a[t, c], t))[:W] for c in range(C)] for a in (near, far))
            for t in places:
                members[int(np.argmax(near[t]))].append(t)
                read = [members[int(np.argmax(far[t]))][-W:]]
                if layer.cfg.mode == "balanced":
                    read = [[s for s in keys[c] if s <= t] for c in range(C) if t in queries[c]]
                for s in filter(len, read):
                    z[b, t, h] += softmax_mean(q[b, t, h], k[b, s, h // (H // G)], v[b, s, h // (H // G)]) / len(read)
    return z


@pytest.mark.parametrize("route", ["query", "token"])
@pytest.mark.parametrize("mode", ["causal", "balanced"])
def test_formula(mode: str, route: str) -> None:
    layer, x = routing(mode=mode, route=route), normal(0, 2, T, D)
    z = jax.jit(lambda x: layer.mix(x, Context.of(x, jnp.asarray(SEG)), None)[0])(x)
    want = reference(layer, x.astype(np.float64))
    read = np.any(want != 0, -1)[SEG != 0]
    assert np.all(read) if (mode, route) == ("causal", "token") else 0.3 < np.mean(read) < 1
    assert_close("z", z * (SEG != 0)[..., None, None], want, TOLERANCE["fp32_op"])


def outputs_and_gradients(layer: Any) -> Any:
    graph, params = nnx.split(layer)
    x, dy = normal(0, 2, T, D), normal(1, 2, T, D) * (SEG != 0)[..., None]

    def run(params: nnx.State, x: Array) -> tuple[Array, Array]:
        mixer: Mixer = nnx.merge(graph, params)
        y = mixer(x, Context.of(x, jnp.asarray(SEG)))[0]
        return jnp.sum(dy * y), y

    grads, y = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(params, x)
    flat = {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(grads[0]) if path[0] != "centroids"}
    return {"y": y * (SEG != 0)[..., None], "x": grads[1], "parameters": flat}


@pytest.mark.parametrize(
    ("window", "other", "options"), [(5, "swa", {"window": 5, "sinks": False}), (T, "attn", {})], ids=["swa", "attn"]
)
def test_one_cluster_is_a_window_over_the_document(window: int, other: str, options: dict[str, Any]) -> None:
    """With the same parameters, outputs and all gradients are equal."""
    one = routing(clusters=1, window=window)
    like = made(other, heads=H, kv_heads=G, key_dim=8, **options)
    nnx.update(like, nnx.from_flat_state([x for x in nnx.to_flat_state(nnx.state(one)) if x[0][0] != "centroids"]))
    assert_trees_close(other, outputs_and_gradients(one), outputs_and_gradients(like), TOLERANCE["fp32_op"])


def test_balanced_is_not_causal_and_says_so() -> None:
    layer, x = routing(mode="balanced"), normal(0, 1, T, D)
    run = jax.jit(lambda x: layer(x, Context.of(x))[0])
    other = np.where((np.arange(T) < 12)[:, None], x, normal(1, 1, T, D))
    past, changed = (np.asarray(run(a))[:, :12] for a in (x, other))
    assert not np.array_equal(past, changed)
    with pytest.raises(ConfigError, match="mode = 'balanced': expected causal to generate"):
        layer.init_state(1, 8, jnp.float32)


def test_the_state_holds_the_last_keys_of_every_cluster() -> None:
    """After two calls and a step, those of the last document, and how many tokens each cluster has had."""
    layer, x = routing(), normal(0, 1, T, D)
    seg, cuts = segments([5, 19], T)[None], (0, 9, 23, T)
    clusters = np.argmax(nearness(layer, projected(layer, x.astype(np.float64))[1]), -1)[0]
    state, positions = layer.init_state(1, T, jnp.float32), inside(seg)[0]
    for a, b in itertools.pairwise(cuts):
        run = jax.jit(lambda x, at, ids, state: layer(x, Context(at, ids), state)[1])
        state = run(x[:, a:b], positions[:, a:b], seg[:, a:b], state)
    assert state["cache"]["k"].shape[1] == C * W < T
    v = projected(layer, x.astype(np.float64))[2][0]
    for g in range(G):
        own = [5 + np.flatnonzero(clusters[5:, g] == c) for c in range(C)]
        assert_equal("count", state["count"][0, g], [len(places) for places in own])
        kept = sorted(np.concatenate([places[-W:] for places in own]))
        there = np.flatnonzero(np.asarray(state["cache"]["segment_ids"])[0, :, g])
        order = there[np.argsort(np.asarray(state["cache"]["positions"])[0, there, g])]
        assert_equal("positions", state["cache"]["positions"][0, order, g], np.array(kept) - 5)
        assert_close("values", state["cache"]["v"][0, order, g], v[kept, g], TOLERANCE["fp32_op"])


def test_centroids_move_to_the_mean_of_their_tokens() -> None:
    """By a gradient that adds up over parts; a centroid without tokens stays."""
    layer, x, rate = routing(clusters=40, rate=0.25), normal(0, 2, T, D), 0.25
    graph, params = nnx.split(layer)

    def told(x: Array, seg: Array) -> np.ndarray:
        loss = lambda p: jnp.sum(nnx.merge(graph, p)(x, Context.of(x, seg))[0])  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(params)["centroids"][...])

    whole = told(x, jnp.asarray(SEG))
    parts = sum(told(x[i : i + 1], jnp.asarray(SEG[i : i + 1])) for i in range(2))
    assert_close("parts", parts, whole, TOLERANCE["fp32_op"])
    tx = make_optimizer(build(OptimConfig, {}), 10, {"mu": ParamMeta((), False, None, False, rule="average")})
    before = {"mu": layer.centroids[...]}
    update = np.asarray(tx.update({"mu": jnp.asarray(whole / 7)}, tx.init(before), before)[0]["mu"])
    want, empty, (q, k, _) = np.zeros(update.shape), 0, projected(layer, x.astype(np.float64))
    for g, c in np.ndindex(G, 40):
        both = np.concatenate([k[:, :, g : g + 1], q[:, :, g * H // G : (g + 1) * H // G]], axis=2)[SEG != 0]
        own = np.einsum("nhk,ck->nhc", unit(both), unit(np.asarray(layer.centroids[...])[g, :, :-1])).argmax(-1)
        mine = unit(both)[own == c]
        empty += len(mine) == 0
        if len(mine):
            want[g, c, :-1] = rate * (mine.mean(0) - np.asarray(layer.centroids[...])[g, c, :-1])
    assert 0 < empty < 2 * 40
    assert_close("moves", update, want, TOLERANCE["fp32_op"])


def test_keys_and_queries_are_drawn_to_their_centroids_in_training_alone() -> None:
    """The loss is 1e-4 of the mean square distance of real tokens; its gradient is that of queries and keys."""
    layer, x = routing(), normal(0, 2, T, D)
    graph, params = nnx.split(layer)

    def told(params: nnx.State, noise: Any) -> Any:
        ctx = dataclasses.replace(Context.of(x, jnp.asarray(SEG)), noise=noise, records={})
        nnx.merge(graph, params)(x, ctx)
        return ctx.records

    assert "routing_commitment" not in told(params, None)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: told(p, jax.random.key(0))["routing_commitment"]))(params)
    near = np.concatenate([nearness(layer, a).max(-1)[SEG != 0] for a in projected(layer, x.astype(float))[:2]], axis=1)
    assert_close("loss", loss, 1e-4 * np.mean((2 - 2 * near) / 8), TOLERANCE["fp32_op"])
    moved = {path[:2] for path, g in nnx.to_flat_state(grads) if np.any(np.asarray(g[...]))}
    assert moved == {("qkv", "k"), ("qkv", "q")}


def test_the_first_steps_may_be_dense() -> None:
    """As attention with the same parameters; then, and outside of training, as without a warmup."""
    layer, x = routing(warmup=0.5), normal(0, 2, T, D)
    run = jax.jit(lambda layer, progress: layer(x, dataclasses.replace(Context.of(x), progress=progress))[0])
    early, late, never = (run(layer, p) for p in (jnp.float32(0.4), jnp.float32(0.5), None))
    like = made("attn", heads=H, kv_heads=G, key_dim=8)
    nnx.update(like, nnx.from_flat_state([p for p in nnx.to_flat_state(nnx.state(layer)) if p[0][0] != "centroids"]))
    assert_close("dense", early, like(x, Context.of(x))[0], TOLERANCE["fp32_op"])
    assert_equal("routed", late, never)
    assert np.any(np.asarray(early != late))
