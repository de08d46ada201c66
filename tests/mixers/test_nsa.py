"""nsa: the formula in fp64, what it is where all blocks are read, and what does not fit."""

import math
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

D, T, H, G, K = 16, 45, 4, 2, 4
SEG = np.stack([segments((10, 35), T), segments((42,), T)])
SIZES = {"block": 4, "kernel": 4, "stride": 2, "top": 4, "window": 5}


def made(**options: Any) -> Mixer:
    cls = mixers.get("nsa")
    options = {"heads": H, "kv_heads": G, "key_dim": K, **SIZES, **options}
    return cls(D, build(cls.Config, options).fill(D), rngs=nnx.Rngs(0))


def softmax(z: np.ndarray) -> np.ndarray:
    w = np.exp(z - z.max())
    return w / w.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def one_token(x: np.ndarray, c: Any, p: dict[str, np.ndarray], side: str, g: int) -> np.ndarray:
    """φ of the tokens [l,K] of one span, head g."""
    if c.compress == "mean":
        return x.mean(0)
    if f"{side}_spans/places" in p:
        x = x + p[f"{side}_spans/places"].reshape(c.kernel, G, K)[:, g]
    w = p[f"{side}_spans/w"].reshape(c.kernel, G, *((K, K) if c.compress in ("linear", "mlp") else ()))[:, g]
    u = sum(a @ b if b.ndim else a * b for a, b in zip(x, w, strict=True))
    return gelu(u) @ p[f"{side}_spans/last"][g] if c.compress == "mlp" else u


def far(q: np.ndarray, k: np.ndarray, v: np.ndarray, starts: list[int], t: int, c: Any) -> tuple[np.ndarray, set[int]]:
    """The first view [R,V] of query t by the heads of a group [R,K], and the blocks it reads; k, v are of spans."""
    own, weights = t // c.block, np.zeros(len(starts))
    o = np.zeros_like(q)
    for r, head in enumerate(q if starts else []):
        p = softmax(k @ head / np.sqrt(K))
        o[r], weights = p @ v, weights + p
    score = dict.fromkeys(range(own), 0.0)
    for j in score:
        for s, p in zip(starts, weights, strict=True):
            shared = min(s + c.kernel, (j + 1) * c.block) - max(s, j * c.block)
            score[j] += max(0, shared) // c.stride * p
    always = ({*range(c.init_blocks)} | {*range(own - c.local, own + 1)}) & {*range(own + 1)}
    best = sorted(set(score) - always, key=lambda j: (-score[j], j))
    return o, always | set(best[: c.top - len(always)])


def document(e: np.ndarray, p: dict[str, np.ndarray], c: Any) -> tuple[np.ndarray, int]:
    """o [T,H,V] of one document, and how many choices leave blocks out."""
    n, chosen = len(e), 0
    bare_q, bare_k, v = (np.einsum("td,dhk->thk", e, p[f"qkv/{x}/kernel"]) for x in "qkv")
    q, k = turned(bare_q, np.arange(n)), turned(bare_k, np.arange(n))
    gates, o = sigmoid(np.einsum("td,dhi->thi", e, p["mixture/kernel"])), np.zeros((n, H, K))
    apart = c.kv_sharing == "separate"
    for g in range(G):
        g1, g2, g3 = (g, G + g, 2 * G + g) if apart else (g, g, g)
        every = list(range(0, n - c.kernel + 1, c.stride))
        source = k if c.rotate == "keys" else bare_k
        ks = np.array([one_token(source[s : s + c.kernel, g1], c, p, "k", g) for s in every])
        vs = np.array([one_token(v[s : s + c.kernel, g1], c, p, "v", g) for s in every])
        if c.rotate != "keys":
            ks = turned(ks[:, None], np.array(every) + (c.rotate == "centre") * (c.kernel - 1) / 2)[:, 0]
        for t in range(n):
            heads = slice(2 * g, 2 * g + 2)
            m = sum(s + c.kernel - 1 <= t for s in every)
            first, blocks = far(q[t, heads], ks[:m], vs[:m], every[:m], t, c)
            chosen += len(blocks) <= t // c.block
            seen = [s for s in range(t + 1) if s // c.block in blocks]
            near = range(max(0, t - c.window + 1), t + 1)
            for r, h in enumerate(range(2 * g, 2 * g + 2)):
                o[t, h] = gates[t, h, 0] * first[r]
                for i, (keys, at) in enumerate(((seen, g2), (near, g3)), 1):
                    keys = list(keys)
                    o[t, h] += gates[t, h, i] * (softmax(k[keys, at] @ q[t, h] / np.sqrt(K)) @ v[keys, at])
    return o, chosen


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "mean", "rotate": "keys"},
        {"compress": "mlp", "kv_sharing": "separate", "block": 6, "kernel": 4, "local": 0, "init_blocks": 2},
        pytest.param({"compress": "weighted", "kernel": 8, "rotate": "centre"}, marks=pytest.mark.slow),
        pytest.param({"compress": "linear", "kernel": 2, "kv_sharing": "separate"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: options["compress"],
)
def test_the_formula(options: dict[str, Any]) -> None:
    mixer, x = made(**options), normal(0, 2, T, D)
    if mixer.k_spans.places is not None:
        mixer.k_spans.places[...] = jnp.asarray(normal(3, *mixer.k_spans.places[...].shape))
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    y, chosen = np.zeros_like(x, np.float64), 0
    for b, doc in {(int(b), int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        o, some = document(x[b, SEG[b] == doc].astype(np.float64), p, mixer.cfg)
        y[b, SEG[b] == doc], chosen = np.einsum("thv,hvd->td", o, p["project/kernel"]), chosen + some
    assert chosen > T // 4, "hardly a choice"
    got = jax.jit(lambda m, x: m(x, Context.of(x, jnp.asarray(SEG)))[0])(mixer, x)
    assert_close("y", got[SEG != 0], y[SEG != 0], TOLERANCE["fp32_op"])


def test_where_all_is_read_it_is_attention() -> None:
    """With one view open, every block and no span: equal outputs and gradients."""
    graph, state = nnx.split(made(top=T, kernel=2 * T, stride=2))
    x, do, ids = normal(0, 2, T, D), normal(1, 2, T, D), jnp.asarray(SEG)

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(inside(SEG)[0]))
        q, k = (mixer.cfg.rope.turn(a, jnp.asarray(inside(SEG)[0])) for a in (q, k))
        gates = jax.nn.sigmoid(jnp.einsum("btd,dhi->bthi", x, mixer.mixture.kernel[...], precision="highest"))
        parts = [attention(q, k, v, segment_ids=ids, window=w, impl="xla") for w in (None, mixer.cfg.window)]
        return mixer.out(sum(gates[..., i, None] * o for i, o in enumerate(parts, 1)))

    def loss(state: Any, x: jax.Array, f: Any) -> jax.Array:
        return jnp.sum(f(nnx.merge(graph, state), x) * do * (SEG != 0)[..., None])

    sparse = lambda m, x: m(x, Context.of(x, ids))[0]  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    got, want = (run(state, x, f) for f in (sparse, dense))
    assert_close("loss", got[0], want[0], TOLERANCE["fp32_op"])
    assert_trees_close(
        "gradients", *((nnx.to_pure_dict(params), dx) for _, (params, dx) in (got, want)), TOLERANCE["fp32_op"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "block = 5: expected a multiple of stride = 2"),
        ({"kernel": 3}, "kernel = 3: expected a multiple of stride = 2"),
        ({"top": 2}, "top = 2: expected more than init_blocks + local = 2"),
        ({"kv": "shared"}, "kv = 'shared': expected own: the sums over strides are of the layer's own keys"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(mixers.get("nsa").Config, {**SIZES, **options})
    assert str(refused.value) == message
