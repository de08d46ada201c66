"""Attention to chosen tokens and inside of sets: the formula in fp64, gradients, and what an indexer learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention, forms
from hydrax.ops.sparse import token_set_attention, token_topk_attention
from hydrax.ops.sparse.sets import put_heads, take_heads
from hydrax.ops.sparse.tokens import index_loss, index_scores, rows_and_keys, select_tokens
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

B, T, H, G, K, V, N = 2, 21, 4, 2, 4, 6, 5
SEG = np.stack([segments((6, 15), T), segments((18,), T)])
QKV = tuple(normal(i, B, T, *shape) for i, shape in enumerate([(H, K), (G, K), (G, V)]))


def some_tokens() -> np.ndarray:
    """Places with gaps, the future and other documents among them."""
    rng = np.random.default_rng(0)
    idx = np.stack([rng.permutation(T)[:N] for _ in range(B * T)]).reshape(B, T, N)
    idx[:, ::2, 0] = np.arange(0, T, 2)
    return np.where((rng.random(idx.shape) < 0.2) | ((idx == idx[..., :1]) & (np.arange(N) > 0)), -1, idx)


def softmax(z: np.ndarray) -> np.ndarray:
    w = np.exp(z - z.max())
    return w / w.sum()


def by_formula(idx: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in QKV)
    o = np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in idx[b, t] if 0 <= s <= t and SEG[b, s] == SEG[b, t] != 0]
        if seen:
            g = h // (H // G)
            o[b, t, h] = softmax(np.array([q[b, t, h] @ k[b, s, g] / np.sqrt(K) for s in seen])) @ v[b, seen, g]
    return o


@pytest.mark.parametrize("impl", ["recurrent", "masked", "gather", "chunked", None])
def test_the_formula(impl: str | None) -> None:
    idx = some_tokens()
    ids, given = jnp.asarray(SEG), jnp.asarray(idx, jnp.int32)
    o = jax.jit(lambda q, k, v: token_topk_attention(q, k, v, given, segment_ids=ids, impl=impl, chunk_size=8))(*QKV)
    want = by_formula(idx)
    assert (want == 0).all(-1).any() and want.any(), "some query chose nothing, some chose something"
    assert_close("o", o, want, TOLERANCE["fp32_op"])
    assert_equal("queries without keys", o[(want == 0).all(-1)], want[(want == 0).all(-1)])


@pytest.mark.parametrize("impl", ["masked", "gather"])
def test_all_tokens_are_full_attention(impl: str) -> None:
    """Equal outputs and gradients."""
    every, ids = jnp.broadcast_to(jnp.arange(T), (B, T, T)), jnp.asarray(SEG)
    do = normal(9, B, T, H, V)

    def run(f):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(do * f(*x))))(QKV)

    got = run(lambda q, k, v: token_topk_attention(q, k, v, every, segment_ids=ids, impl=impl, chunk_size=8))
    want = run(lambda q, k, v: attention(q, k, v, segment_ids=ids, impl="xla"))
    assert_trees_close("gradients", got[1], want[1], TOLERANCE["fp32_op"])
    assert_close("sum", got[0], want[0], TOLERANCE["fp32_op"])


def indexer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(11, B, T, 3, 4), normal(12, B, T, 4), normal(13, B, T, 3)


def facts() -> tuple[forms.Queries, forms.Keys]:
    return rows_and_keys(*map(jnp.asarray, QKV), jnp.asarray(SEG), jnp.asarray(inside(SEG)[0]), None, None)


def by_sorting(index: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Scores and chosen places in fp64; ties to the lower place."""
    q, k, w = (x.astype(np.float64) for x in index)
    scores = np.einsum("bti,btsi->bts", w, np.maximum(np.einsum("btid,bsd->btsi", q, k) / 2, 0))
    idx = np.full((B, T, N), -1)
    for b, t in np.ndindex(B, T):
        seen = [s for s in range(t + 1) if SEG[b, s] == SEG[b, t] != 0]
        best = sorted(seen, key=lambda s, b=b, t=t: (-scores[b, t, s], s))[:N]
        idx[b, t, : len(best)] = best
    return scores, idx


def test_the_choice() -> None:
    index = indexer()
    scores, want = by_sorting(index)
    assert_close("scores", jax.jit(index_scores)(*index), scores, TOLERANCE["fp32_op"])
    assert (scores == 0).any() and (scores < 0).any(), "ties at 0, and negative scores"
    for chunk in (4, 64):
        got = jax.jit(lambda *i, c=chunk: select_tokens(i, *facts(), N, chunk_size=c))(*index)
        assert_equal("idx", got, want)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_loss_of_the_indexer(sparse: bool) -> None:
    """KL in fp64; its gradient is that of the indexer, and exactly zero for attention."""
    index = indexer()
    scores, idx = by_sorting(index)
    q, k, _ = (x.astype(np.float64) for x in QKV)
    want = np.zeros((B, T))
    for b, t in np.argwhere(SEG):
        seen = [s for s in range(t + 1) if SEG[b, s] == SEG[b, t] and (not sparse or s in idx[b, t])]
        p = np.mean([softmax(k[b, seen, h // (H // G)] @ q[b, t, h] / np.sqrt(K)) for h in range(H)], axis=0)
        want[b, t] = np.sum(p * np.log(p / softmax(scores[b, t, seen])))
    rules = forms.Rules(K**-0.5, None, None, 0, aligned=False)

    def loss(index, qkv):
        queries, keys = rows_and_keys(*qkv, jnp.asarray(SEG), jnp.asarray(inside(SEG)[0]), None, None)
        return index_loss(index, queries, keys, jnp.asarray(idx) if sparse else None, rules, chunk_size=8)

    got = jax.jit(loss)(index, QKV)
    assert_close("loss", got, want, TOLERANCE["fp32_op"])
    own, other = jax.jit(jax.grad(lambda *a: jnp.sum(loss(*a)), argnums=(0, 1)))(index, QKV)
    assert all(np.any(np.asarray(g)) for g in own)
    assert not any(np.any(np.asarray(g)) for g in other)


def test_sets() -> None:
    """Each head attends inside of its own set, in fp64; nothing is added where no set has a token."""
    rng = np.random.default_rng(1)
    places = np.sort(np.stack([rng.permutation(T)[:7] for _ in range(B * H)]).reshape(B, H, 7), axis=-1)
    places[:, :, -1] = -1
    q, k, v = normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V)

    given = jnp.asarray(places, jnp.int32)

    @jax.jit
    def run(q, k, v):
        o = token_set_attention(*(take_heads(x, given) for x in (q, k, v)), given, segment_ids=jnp.asarray(SEG))
        return put_heads(o, given, T)

    want = np.zeros((B, T, H, V))
    for b, h in np.ndindex(B, H):
        for t in places[b, h]:
            seen = [s for s in places[b, h] if 0 <= s <= t and SEG[b, s] == SEG[b, t] != 0]
            if seen:
                w = softmax(k[b, seen, h].astype(np.float64) @ q[b, t, h] / np.sqrt(K))
                want[b, t, h] = w @ v[b, seen, h]
    assert_close("o", run(q, k, v), want, TOLERANCE["fp32_op"])
