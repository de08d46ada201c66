"""infllm2: the formula in fp64, what it is where all is read, and what does not fit."""

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

D, T, H, G, K = 16, 61, 4, 2, 4
SEG = np.stack([segments((10, 51), T), segments((58,), T)])
SIZES = {"block": 4, "kernel": 4, "stride": 2, "topk": 4, "local": 2, "dense_len": 13}


def made(**options: Any) -> Mixer:
    cls = mixers.get("infllm2")
    options = {"heads": H, "kv_heads": G, "key_dim": K, **SIZES, **options}
    return cls(D, build(cls.Config, options).fill(D), rngs=nnx.Rngs(0))


def softmax(z: np.ndarray) -> np.ndarray:
    w = np.exp(z - z.max())
    return w / w.sum()


def read(q: np.ndarray, k: np.ndarray, t: int, c: Any) -> set[int]:
    """The blocks that query t of a document reads, by the heads of one group [R,K] and its keys [T,K]."""
    own = t // c.block
    if t < c.dense_len:
        return set(range(own + 1))
    starts = [s for s in range(0, t + 1, c.stride) if s + c.kernel - 1 <= t]
    means = np.array([k[s : s + c.kernel].mean(0) for s in starts]).reshape(-1, K)
    p = sum(softmax(means @ head / np.sqrt(K)) for head in q) if starts else []
    score = {
        j: max(x for x, s in zip(p, starts, strict=True) if s < (j + 1) * c.block and s + c.kernel > j * c.block)
        for j in range(own)
    }
    always = {*range(c.init_blocks), *range(own - c.local, own + 1)} & set(range(own + 1))
    best = sorted(set(score) - always, key=lambda j: (-score[j], j))
    return always | set(best[: c.topk + c.local - len(always)])


def by_formula(mixer: Mixer, x: np.ndarray) -> tuple[np.ndarray, int]:
    """y [B,T,D] in fp64, and how many queries, by groups of heads, leave blocks out."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    y, chosen = np.zeros_like(x, np.float64), 0
    for b, doc in {(int(b), int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        e, index = x[b, rows].astype(np.float64), np.arange(len(rows))
        q, k, v = (np.einsum("td,dhk->thk", e, p[f"qkv/{n}/kernel"]) for n in "qkv")
        bare = q, k
        q, k = turned(q, index), turned(k, index)
        chosen_by = bare if mixer.cfg.use_nope else (q, k)
        for t in index:
            o = np.zeros((H, K))
            for g in range(G):
                blocks = read(chosen_by[0][t, 2 * g : 2 * g + 2], chosen_by[1][:, g], t, mixer.cfg)
                chosen += len(blocks) <= t // mixer.cfg.block
                seen = [s for s in range(t + 1) if s // mixer.cfg.block in blocks]
                for h in (2 * g, 2 * g + 1):
                    o[h] = softmax(k[seen, g] @ q[t, h] / np.sqrt(K)) @ v[seen, g]
            y[b, rows[t]] = np.einsum("hv,hvd->d", o, p["project/kernel"])
    return y, chosen


@pytest.mark.parametrize(
    "options", [{}, {"use_nope": True}, {"block": 6, "kernel": 6, "init_blocks": 2, "local": 0, "dense_len": 0}]
)
def test_the_formula(options: dict[str, int]) -> None:
    mixer, x = made(**options), normal(0, 2, T, D)
    y, chosen = by_formula(mixer, x)
    assert chosen > T // 4, "hardly a choice"
    got = jax.jit(lambda m, x: m(x, Context.of(x, jnp.asarray(SEG)))[0])(mixer, x)
    assert_close("y", got[SEG != 0], y[SEG != 0], TOLERANCE["fp32_op"])
    if mixer.cfg.use_nope:
        assert not np.allclose(y, by_formula(made(**{**options, "use_nope": False}), x)[0]), (
            "positions make no difference"
        )


@pytest.mark.parametrize("options", [{"dense_len": T}, {"topk": 15}])
def test_where_all_is_read_it_is_attention(options: dict[str, int]) -> None:
    """Equal outputs and gradients."""
    graph, state = nnx.split(made(**options))
    x, do, ids = normal(0, 2, T, D), normal(1, 2, T, D), jnp.asarray(SEG)

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(inside(SEG)[0]))
        return mixer.out(attention(q, k, v, segment_ids=ids, impl="xla"))

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
        ({"topk": 2, "init_blocks": 2}, "topk = 2: expected more than init_blocks = 2"),
        ({"kv": "shared"}, "kv = 'shared': expected own: the sums are of the layer's own keys"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(mixers.get("infllm2").Config, {**SIZES, **options})
    assert str(refused.value) == message
