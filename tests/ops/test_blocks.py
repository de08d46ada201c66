"""Attention to chosen blocks: the formula in fp64, all gradients of all forms; means of blocks, and the choice."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention
from hydrax.ops.sparse import block_topk_attention, causal_block_topk, pooled_keys
from hydrax.ops.sparse.pooled import Blocks, add_sums, block_sums, seen_blocks
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

B, T, H, HK, K, V, N, SIZE = 2, 29, 4, 2, 4, 6, 3, 4
SEG = np.stack([segments((6, 1, 3, 19), T), segments((25,), T)])
"""Documents that begin anywhere, blocks with one token, padding."""
POSITIONS = inside(SEG)[0]
QKV = {
    name: normal(i, B, T, *shape) for i, (name, shape) in enumerate({"q": (H, K), "k": (HK, K), "v": (HK, V)}.items())
}
DO, DLSE = normal(8, B, T, H, V), normal(9, B, T, H)
FORMS = ("recurrent", "masked", "gather", "inverse")


def some_blocks(heads: int) -> np.ndarray:
    """Numbers with gaps, doubles and the future among them; some queries have none, some not their own block."""
    idx = np.random.default_rng(heads).integers(-1, POSITIONS[..., None, None] // SIZE + 2, (B, T, heads, N))
    idx[:, 5] = -1
    return np.where(np.random.default_rng(1).random(idx.shape) < 0.2, -1, idx)


def mask_of(idx: np.ndarray, seg: np.ndarray = SEG) -> np.ndarray:
    """[B,H,T,T], pair by pair."""
    mask = np.zeros((B, H, T, T), bool)
    for b, h, t in np.ndindex(B, H, T):
        for s in range(t + 1):
            same = seg[b, s] == seg[b, t] != 0
            mask[b, h, t, s] = same and POSITIONS[b, s] // SIZE in idx[b, t, h // (H // idx.shape[2])]
    return mask


def dense(mask: np.ndarray, q: Any, k: Any, v: Any) -> tuple:
    """The definition over all pairs, in the dtype of q."""
    k, v = (jnp.repeat(x, H // HK, axis=2) for x in (k, v))
    z = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K), -1e30)
    some = jnp.asarray(mask.any(-1))
    o = jnp.einsum("bhts,bshv->bthv", jnp.where(some[..., None], jax.nn.softmax(z, -1), 0), v)
    return o, jnp.where(some, jax.nn.logsumexp(z, -1), 0).swapaxes(1, 2)


def evaluate(f: Any, dtype: Any) -> tuple:
    """o, lse (0 where nothing is seen) and the gradients of sums of both."""
    given = {name: jnp.asarray(x, dtype) for name, x in QKV.items()}

    def total(x: dict) -> tuple:
        o, lse = f(**x)
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(o * DO) + jnp.sum(lse * DLSE), (o, lse)

    return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(given))


def of_the_past(idx: np.ndarray) -> dict[str, Any]:
    return {"idx": jnp.asarray(idx, jnp.int32), "block_size": SIZE, "segment_ids": jnp.asarray(SEG), "chunk_size": 8}


@pytest.mark.parametrize("heads", [HK, H])
@pytest.mark.parametrize("impl", FORMS)
def test_the_formula(impl: str, heads: int) -> None:
    idx = some_blocks(heads)
    mask = mask_of(idx)
    with jax.enable_x64(True):
        want_dx, want = evaluate(lambda q, k, v: dense(mask, q, k, v), jnp.float64)
    how = of_the_past(idx) | {"impl": impl, "return_lse": True}
    dx, got = evaluate(lambda q, k, v: block_topk_attention(q, k, v, **how), jnp.float32)
    nothing = ~mask.any(-1).swapaxes(1, 2)
    assert nothing.any() and not got[0][nothing].any(), "queries that see nothing"
    assert_trees_close("o, lse", got, want, TOLERANCE["fp32_op"])
    assert_trees_close("gradients", dx, want_dx, TOLERANCE["fp32_op"])
    lse = jax.jit(lambda q, k, v: block_topk_attention(q, k, v, **how)[1])(**QKV)
    assert_equal("where nothing is seen", np.isneginf(lse), nothing)


@pytest.mark.parametrize("impl", FORMS)
def test_rows_of_one_document_need_no_ids(impl: str) -> None:
    idx = np.minimum(some_blocks(HK), np.arange(T)[None, :, None, None] // SIZE)
    ones = jnp.ones((B, T), jnp.int32)
    run = jax.jit(
        lambda ids, q, k, v: block_topk_attention(
            q, k, v, jnp.asarray(idx), block_size=SIZE, segment_ids=ids, impl=impl
        )
    )
    assert_close("o", run(None, **QKV), run(ones, **QKV), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("impl", FORMS)
def test_all_blocks_are_full_attention(impl: str) -> None:
    every = np.broadcast_to(np.arange(-(-T // SIZE)), (B, T, HK, -(-T // SIZE)))
    how, ids = of_the_past(every) | {"impl": impl, "return_lse": True, "softcap": 5.0}, jnp.asarray(SEG)
    got = evaluate(lambda q, k, v: block_topk_attention(q, k, v, **how), jnp.float32)
    full = {"segment_ids": ids, "impl": "xla", "return_lse": True, "softcap": 5.0}
    want = evaluate(lambda q, k, v: attention(q, k, v, **full), jnp.float32)
    assert_trees_close("o, lse and gradients", got, want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("impl", FORMS)
def test_queries_may_be_a_part_of_the_row(impl: str) -> None:
    """In any order: as a device has them that holds two pieces of the row."""
    idx, part = some_blocks(HK), np.r_[3:9, 17:26]
    q, k, v = (jnp.asarray(x) for x in QKV.values())
    whole = jax.jit(lambda q, k, v: block_topk_attention(q, k, v, **of_the_past(idx), impl="masked"))(q, k, v)
    facts = {
        "segment_ids": SEG[:, part],
        "positions": POSITIONS[:, part],
        "kv_segment_ids": SEG,
        "kv_positions": POSITIONS,
    }
    facts = {name: jnp.asarray(x) for name, x in facts.items()}
    some = jnp.asarray(idx[:, part])
    got = jax.jit(lambda q, k, v: block_topk_attention(q, k, v, some, block_size=SIZE, **facts, impl=impl))(
        q[:, part], k, v
    )
    assert_close("o", got, whole[:, part], TOLERANCE["fp32_op"])


def test_what_cannot_be_served_is_refused() -> None:
    q, k, v = map(jnp.asarray, QKV.values())
    idx = jnp.zeros((B, T, 3, 1), jnp.int32)
    with pytest.raises(ValueError, match="H or Hk"):
        block_topk_attention(q, k, v, idx, block_size=SIZE)
    with pytest.raises(ValueError, match="expected one of recurrent, masked, gather, inverse"):
        block_topk_attention(q, k, v, idx[:, :, :HK], block_size=SIZE, impl="dense")
    with pytest.raises(ValueError, match="'pallas_gpu' cannot serve: it has no softcap"):
        block_topk_attention(q, k, v, idx[:, :, :HK], block_size=SIZE, impl="pallas_gpu", softcap=1.0)


# ------------------------------------------------------------------------------------------------------ means, choice


def windows(length: int, stride: int) -> dict[tuple[int, int, int], np.ndarray]:
    """(row, document, number of the window) -> the mean of its keys, in fp64."""
    found = {}
    for b, doc in {(int(b), int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        x = QKV["k"][b, SEG[b] == doc].astype(np.float64)
        for c in range((len(x) - length) // stride + 1):
            found[b, doc, c] = x[c * stride : c * stride + length].mean(0)
    return found


def entries(blocks: Blocks) -> dict[tuple[int, int, int], np.ndarray]:
    x, numbers, ids = map(np.asarray, blocks)
    there = [(b, n) for b, n in np.ndindex(ids.shape) if ids[b, n]]
    found = {(b, int(ids[b, n]), int(numbers[b, n])): x[b, n] for b, n in there}
    assert len(found) == len(there), "a block has two entries"
    return found


def compare(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for key, x in want.items():
        assert_close(str(key), found[key], x, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 2), (6, 2), (1, 1), (3, 3), (40, 40)])
def test_means_of_whole_blocks(length: int, stride: int) -> None:
    sums = block_sums(jnp.asarray(QKV["k"]), stride, jnp.asarray(POSITIONS), jnp.asarray(SEG))
    compare(entries(pooled_keys(sums, stride, length)), windows(length, stride))


def test_a_length_between_strides_is_refused() -> None:
    sums = block_sums(jnp.asarray(QKV["k"]), 2, jnp.asarray(POSITIONS), jnp.asarray(SEG))
    with pytest.raises(ValueError, match="length = 3: expected a multiple of stride = 2"):
        pooled_keys(sums, 2, 3)


@pytest.mark.parametrize("cuts", [(7,), (3, 4, 10, 11, 12)])
def test_sums_go_on_from_call_to_call(cuts: tuple[int, ...]) -> None:
    """A call of new tokens sees the blocks that the whole row has, of the documents that it goes on with."""
    sums, want, edges = jnp.zeros((B, -(-T // 4), HK, K)), windows(4, 4), (0, *cuts, T)
    for i, j in itertools.pairwise(edges):
        facts = (4, jnp.asarray(POSITIONS[:, i:j]), jnp.asarray(SEG[:, i:j]))
        new = SEG[:, i] != SEG[:, max(i - 1, 0)]  # as a mixer clears the state of another document
        sums = jnp.where((new | (i == 0))[:, None, None, None], 0, sums)
        found = entries(pooled_keys(block_sums(jnp.asarray(QKV["k"][:, i:j]), *facts, before=sums), 4))
        sums = add_sums(sums, jnp.asarray(QKV["k"][:, i:j]), *facts)
        ends = {(b, d): POSITIONS[b, :j][SEG[b, :j] == d].max() for b in range(B) for d in SEG[b, i:j] if d}
        now = {key: x for key, x in want.items() if key[:2] in ends and 4 * key[2] + 3 <= ends[key[:2]]}
        compare(found, now)


def test_the_choice() -> None:
    """Its own block, forced ones, the best of the past; ties to the earlier; nothing of other documents."""
    ids, own = jnp.asarray(SEG), jnp.asarray(POSITIONS // SIZE)
    sums = block_sums(jnp.asarray(QKV["k"]), SIZE, jnp.asarray(POSITIONS), ids)
    blocks = pooled_keys(sums, SIZE)
    score = np.round(normal(5, B, T, HK, blocks.numbers.shape[1]))  # with ties
    seen = seen_blocks(blocks, own, ids)
    for forced in (None, blocks.numbers[:, None] == 1):
        idx = causal_block_topk(jnp.asarray(score), N, own=own, numbers=blocks.numbers, seen=seen, forced=forced)
        for b, t in np.argwhere(SEG):
            at = {
                int(n): i
                for i, (n, d) in enumerate(zip(blocks.numbers[b], blocks.segment_ids[b], strict=True))
                if d == SEG[b, t]
            }
            past = [n for n in at if n < own[b, t]]
            assert past == list(range(int(own[b, t])))
            for g in range(HK):
                best = sorted(past, key=lambda n: (n != 1 or forced is None, -score[b, t, g, at[n]], n))[: N - 1]
                assert np.asarray(idx)[b, t, g].tolist() == [int(own[b, t]), *best, *[-1] * (N - 1 - len(best))]
    assert not jax.grad(
        lambda s: causal_block_topk(s, N, own=own, numbers=blocks.numbers, seen=seen).astype(float).sum()
    )(jnp.asarray(score)).any()
