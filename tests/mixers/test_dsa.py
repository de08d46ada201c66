"""dsa: the formula in fp64, what it is where every token is kept, who teaches the indexer, and its first steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context, Mixer
from hydrax.models.lm import blueprint
from hydrax.models.spec import ModelConfig
from hydrax.ops.softmax import attention
from hydrax.train.optim import OptimConfig, factors, make_optimizer
from hydrax.train.state import init_state
from hydrax.train.step import make_train_step
from tests.contract.cases import inside, normal, segments
from tests.mixers.test_softmax import turned
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, G, K, HI, DI = 16, 21, 4, 2, 4, 3, 4
SEG = np.stack([segments((6, 15), T), segments((18,), T)])


def made(**options: Any) -> Mixer:
    """A mixer of which no parameter is zero."""
    cls = mixers.get("dsa")
    sizes = {"heads": H, "kv_heads": G, "key_dim": K, "index_heads": HI, "index_dim": DI, "keep": 5}
    mixer = cls(D, build(cls.Config, sizes | options).fill(D), rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(mixer))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.2 * normal(i, *p.shape))
    return mixer


def softmax(z: np.ndarray) -> np.ndarray:
    w = np.exp(z - z.max())
    return w / w.sum()


def by_formula(mixer: Mixer, x: np.ndarray) -> tuple[np.ndarray, float, float]:
    """y [B,T,D] in fp64, query by query, and the mean losses over chosen and over all visible tokens."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    y, losses = np.zeros_like(x, np.float64), []
    for b, doc in {(b, int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        e, index = x[b, rows].astype(np.float64), np.arange(len(rows))
        q, k, v = (np.einsum("td,dhk->thk", e, p[f"qkv/{n}/kernel"]) for n in "qkv")
        q, k = turned(q, index), turned(k, index)
        iq, ik = np.einsum("td,dik->tik", e, p["indexer/q"]), e @ p["indexer/k"]
        ik = (ik - ik.mean(-1, keepdims=True)) / np.sqrt(ik.var(-1, keepdims=True) + 1e-6)
        ik = ik * p["indexer/weight"] + p["indexer/bias"]
        turn = np.exp(1j * index)[:, None]  # of the first two channels
        z = [(a[..., 0] + 1j * a[..., 1]) * turn for a in (iq, ik[:, None])]
        rest = (iq[..., 2:], ik[:, None, 2:])
        iq, ik = (np.concatenate([np.stack([a.real, a.imag], -1), b], -1) for a, b in zip(z, rest, strict=True))
        w = e @ p["indexer/w"] / np.sqrt(HI)
        for t in index:
            scores = w[t] @ np.maximum(np.einsum("ik,sk->is", iq[t], ik[: t + 1, 0]) / np.sqrt(DI), 0)
            best = sorted(sorted(range(t + 1), key=lambda s, z=scores: (-z[s], s))[: mixer.cfg.keep])
            pair = []
            for seen in (best, list(range(t + 1))):
                weights = np.stack([softmax(k[seen, h // 2] @ q[t, h] / np.sqrt(K)) for h in range(H)])
                target = weights.mean(0)
                pair.append(np.sum(target * np.log(target / softmax(scores[seen]))))
                if seen is best:
                    o = np.stack([weights[h] @ v[best, h // 2] for h in range(H)])
                    y[b, rows[t]] = np.einsum("hv,hvd->d", o, p["project/kernel"])
            losses.append(pair)
    return y, *np.mean(losses, axis=0)


def run(mixer: Mixer, x: Any, **facts: Any) -> tuple[jax.Array, jax.Array]:
    """y and the loss of the indexer in a training step."""
    ctx = Context.of(x, jnp.asarray(SEG), records={}, noise=jax.random.key(0), **facts)
    y, _ = mixer(x, ctx)
    return y, ctx.records["index"]


def test_the_formula() -> None:
    mixer, x = made(), normal(0, 2, T, D)
    y, sparse, dense = by_formula(mixer, x)
    got, loss = jax.jit(run)(mixer, x)
    assert_close("y", got[SEG != 0], y[SEG != 0], TOLERANCE["fp32_op"])
    assert_close("loss", loss, sparse, TOLERANCE["fp32_op"])
    late, loss = jax.jit(lambda m, x: run(m, x, progress=jnp.float32(0.5)))(mixer, x)
    assert_close("y", late, got, TOLERANCE["fp32_op"])
    assert_close("loss after the first steps", loss, sparse, TOLERANCE["fp32_op"])
    early, loss = jax.jit(lambda m, x: run(m, x, progress=jnp.float32(0.05)))(mixer, x)
    assert_close("loss in the first steps", loss, dense, TOLERANCE["fp32_op"])
    every, _ = jax.jit(run)(made(keep=T), x)
    assert_close("y in the first steps", early, every, TOLERANCE["fp32_op"])


def test_where_all_tokens_are_kept_it_is_attention() -> None:
    """Equal outputs and gradients."""
    mixer, x, do = made(keep=T), normal(0, 2, T, D), normal(1, 2, T, D)
    graph, state = nnx.split(mixer)
    ids = jnp.asarray(SEG)

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(inside(SEG)[0]))
        return mixer.out(attention(q, k, v, segment_ids=ids, impl="xla"))

    def loss(state: Any, x: jax.Array, f: Any) -> jax.Array:
        return jnp.sum(f(nnx.merge(graph, state), x) * do * (SEG != 0)[..., None])

    sparse = lambda m, x: m(x, Context.of(x, ids))[0]  # noqa: E731
    got, want = (jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(state, x, f) for f in (sparse, dense))
    assert_trees_close("gradients", nnx.to_pure_dict(got[0]), nnx.to_pure_dict(want[0]), TOLERANCE["fp32_op"])
    assert_close("dx", got[1], want[1], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_two_losses_that_never_meet(progress: float) -> None:
    """The output's gradient is exactly zero for the indexer; that of its own loss is so for all else."""
    graph, state = nnx.split(made())
    x, do = normal(0, 2, T, D), normal(1, 2, T, D)

    def losses(state: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, index = run(nnx.merge(graph, state), x, progress=jnp.float32(progress))
        return jnp.sum(y * do), index

    for i in (0, 1):
        params, dx = jax.jit(jax.grad(lambda s, x, i=i: losses(s, x)[i], argnums=(0, 1)))(state, x)
        assert bool(jnp.any(dx)) == (i == 0), "of x"
        for path, g in nnx.to_flat_state(params):
            assert bool(jnp.any(g[...])) == (("indexer" in path) == bool(i)), f"loss {i}, {path}"


def test_the_warmup_is_dense_without_a_loss_of_the_indexer_too() -> None:
    mixer, x = made(index_loss=0.0, warmup=0.5), normal(0, 2, T, D)
    ctx = {"segment_ids": jnp.asarray(SEG), "noise": jax.random.key(0), "records": {}}
    y = jax.jit(lambda x, at: mixer(x, Context.of(x, **ctx, progress=at))[0])
    q, k, v = mixer.qkv(jnp.asarray(x), jnp.asarray(inside(SEG)[0]))
    dense = mixer.out(attention(q, k, v, segment_ids=jnp.asarray(SEG), impl="xla"))
    assert_close("y", y(x, 0.4)[SEG != 0], dense[SEG != 0], TOLERANCE["fp32_op"])
    assert not np.allclose(y(x, 0.6)[SEG != 0], dense[SEG != 0], atol=1e-3) and "index" not in ctx["records"]


def test_the_indexer_learns_from_attention() -> None:
    mixer, x = made(keep=T), normal(0, 2, T, D)
    graph, state = nnx.split(mixer)

    @jax.jit
    def step(state: Any) -> tuple[Any, jax.Array]:
        loss, g = jax.value_and_grad(lambda s: run(nnx.merge(graph, s), x)[1])(state)
        return jax.tree.map(lambda p, g: p - 0.3 * g, state, g), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_training_step_tells_how_far_it_is() -> None:
    """Dense at first, then sparse; with a rate of 0 the indexer stays, as nothing else moves it."""
    tiny = {**mixers.row("dsa").tiny, "warmup": 0.5}
    cfg = build(ModelConfig, {"d_model": D, "vocab_size": 29, "pattern": "dsa", "mixers": {"dsa": tiny}})
    plan = blueprint(cfg)
    optim = build(OptimConfig, {"rates": {"*/mixer/indexer/*": 0.0}})
    names = [n for n, factor in factors(optim, plan.meta).items() if factor == 0]
    assert len(names) == 5
    tx = make_optimizer(optim, 4, plan.meta)
    rows = {"tokens": np.arange(2 * T).reshape(2, T) % 29, "weights": np.ones((2, T), np.float32)}
    batch = {**rows, "targets": np.roll(rows["tokens"], -1, 1), "bytes": np.ones(2, np.float32)}
    batch = {n: jnp.asarray(x) if x.dtype == np.float32 else jnp.asarray(x, jnp.int32) for n, x in batch.items()}
    step = jax.jit(make_train_step(plan, tx, lambda n: 0.0, steps=4))
    state = init_state(plan, tx, jax.random.key(0))
    before, losses = state["params"], {}
    for at in (0, 1, 2):
        new, metrics = step({**state, "step": jnp.asarray(at)}, batch)
        losses[at] = float(metrics["loss"])
        assert float(metrics["index"]) > 0
    assert losses[0] == losses[1] != losses[2]
    moved = {n for n in before if bool(jnp.any(new["params"][n] != before[n]))}
    assert not moved & set(names)


def test_keys_of_another_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv = 'shared': expected own"):
        build(mixers.get("dsa").Config, {"kv": "shared"})


def test_a_bfloat16_input_chooses_the_same_tokens() -> None:
    mixer, x = made(), jnp.asarray(normal(0, 2, T, D), jnp.bfloat16)
    ctx = Context.of(x)
    wide, narrow = (jax.jit(lambda x: mixer.indexer(x, ctx.positions))(a) for a in (x.astype(jnp.float32), x))
    assert_trees_close("index", narrow, wide, 1e-7)
