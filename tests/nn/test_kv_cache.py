"""The key/value cache: which token lies in which slot, and that prefill leaves what single steps leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.nn import kv_cache
from hydrax.ops import documents
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T, SLOTS = 11, {"full": 16, "ring": 4, "ring_sinks": 5}
KINDS = {"full": {}, "ring": {"window": 4}, "ring_sinks": {"window": 3, "sink_tokens": 2}}

# One document; three documents; one document and padding; padding alone; a long document before a short last one.
IDS = jnp.asarray([[1] * 11, [1] * 3 + [2] * 2 + [5] * 6, [3] * 7 + [0] * 4, [0] * 11, [1] * 5 + [2] * 4 + [4] * 2])
PLACES = documents.document_positions(IDS)


def marked(shape: tuple[int, int]) -> jax.Array:
    """[B,T,1,1], a different number for every token."""
    return jnp.arange(1.0, 1 + shape[0] * shape[1]).reshape(*shape, 1, 1)


@functools.partial(jax.jit, static_argnames="kind")
def write(cache: dict, k: jax.Array, positions: jax.Array, ids: jax.Array, kind: str) -> dict:
    return kv_cache.write(cache, k, -k, positions, ids, **KINDS[kind])


def empty(kind: str) -> dict:
    return kv_cache.empty(len(IDS), SLOTS[kind], 1, 1, 1, jnp.float32)


def content(cache: dict, row: int) -> dict[int, int]:
    """{slot: position} of the taken slots."""
    taken = np.flatnonzero(cache["segment_ids"][row])
    return {int(s): int(cache["positions"][row, s]) for s in taken}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("full", [{p: p for p in range(11)}, {p: p for p in range(6)}, {p: p for p in range(7)}, {}, {0: 0, 1: 1}]),
        ("ring", [{0: 8, 1: 9, 2: 10, 3: 7}, {0: 4, 1: 5, 2: 2, 3: 3}, {0: 4, 1: 5, 2: 6, 3: 3}, {}, {0: 0, 1: 1}]),
        (
            "ring_sinks",
            [
                {0: 0, 1: 1, 2: 8, 3: 9, 4: 10},
                {0: 0, 1: 1, 2: 5, 3: 3, 4: 4},
                {0: 0, 1: 1, 2: 5, 3: 6, 4: 4},
                {},
                {0: 0, 1: 1},
            ],
        ),
    ],
)
def test_the_last_document_lies_in_its_slots(kind: str, rows: list[dict[int, int]]) -> None:
    k = marked(IDS.shape)
    cache = write(empty(kind), k, PLACES, IDS, kind=kind)
    assert [content(cache, row) for row in range(len(IDS))] == rows
    for row, slots in enumerate(rows):
        for slot, position in slots.items():
            last = int(np.flatnonzero((np.asarray(PLACES[row]) == position) & (np.asarray(IDS[row]) != 0))[-1])
            assert cache["k"][row, slot, 0, 0] == k[row, last, 0, 0] == -cache["v"][row, slot, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [1, 4, 9])
def test_any_split_of_the_tokens_leaves_the_same_cache(kind: str, split: int) -> None:
    """The caller empties the cache where a document starts at the split, as the base class of mixers does."""
    k = marked(IDS.shape)
    whole = write(empty(kind), k, PLACES, IDS, kind=kind)
    cache = write(empty(kind), k[:, :split], PLACES[:, :split], IDS[:, :split], kind=kind)
    fresh = (IDS[:, split] != IDS[:, split - 1]) & (IDS[:, split] != 0)
    cache = jax.tree.map(lambda x: jnp.where(fresh.reshape(-1, *[1] * (x.ndim - 1)), 0, x), cache)
    cache = write(cache, k[:, split:], PLACES[:, split:], IDS[:, split:], kind=kind)
    for name in whole:
        assert_equal(name, cache[name], whole[name])


def test_a_token_beyond_a_full_cache_is_dropped() -> None:
    cache = write(empty("full"), marked(IDS.shape), PLACES, IDS, kind="full")
    one = jnp.ones((len(IDS), 1), jnp.int32)
    after = write(cache, marked((len(IDS), 1)), one * SLOTS["full"], one, kind="full")
    for name in cache:
        assert_equal(name, after[name], cache[name])


@functools.partial(jax.jit, static_argnames="kind")
def read(q: jax.Array, k: jax.Array, v: jax.Array, cache: dict | None, places: jax.Array, ids: jax.Array, kind: str):
    """What the queries read, the keys they saw, and the cache after them."""
    facts = {"positions": places, "segment_ids": ids}
    keys = kv_cache.collect(k, v, cache, **facts)
    o = kv_cache.attend(q, keys, **facts, **KINDS[kind])
    return o, keys, kv_cache.write(cache, k, v, **facts, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_queries_after_a_prefill_see_its_last_document(kind: str) -> None:
    """Ids of a later call need not be those of the prefill: the cache belongs to the document of its token 0."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 3, T, 2, 4))
    ids, places, t = IDS[:3], PLACES[:3], 7
    full, keys, nothing = read(q, k, v, None, places, ids, kind=kind)
    assert nothing is None and keys[2:] == (None, None)
    cache = kv_cache.empty(3, SLOTS[kind], 2, 4, 4, jnp.float32)
    first, _, cache = read(*(x[:, :t] for x in (q, k, v)), cache, places[:, :t], ids[:, :t], kind=kind)
    later = 9 * (ids[:, t:] != 0)
    then, keys, _ = read(*(x[:, t:] for x in (q, k, v)), cache, places[:, t:], later, kind=kind)
    assert {x.shape[1] for x in keys} == {SLOTS[kind] + T - t}
    assert_close("prefill", first, full[:, :t], TOLERANCE["fp32_op"])
    assert_close("continuation", then, full[:, t:], TOLERANCE["fp32_op"])


def test_tokens_without_ids_are_one_document() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, T, 2, 4))
    places, one = jnp.tile(jnp.arange(T), (2, 1)), jnp.ones((2, T), jnp.int32)
    empty = kv_cache.empty(2, T, 2, 4, 4, jnp.float32)
    found, expected = (read(q, k, v, empty, places, ids, kind="full") for ids in (None, one))
    jax.tree.map(lambda a, b: assert_equal("result", a, b), found, expected)


def test_keys_that_nobody_lends_are_missed() -> None:
    with pytest.raises(ValueError, match=r"kv = 'shared': expected the keys of another layer in ctx\.keys"):
        kv_cache.shared(None)


@pytest.mark.parametrize("by_head", [1, 2])
@pytest.mark.parametrize("pieces", [(T,), (3, 1, 1, 6), (1,) * T], ids=str)
def test_keys_that_nobody_will_see_leave_room(pieces: tuple[int, ...], by_head: int) -> None:
    """Each head holds the keys of the last document that are alive, and what belongs to them, in slots of any order."""
    cache = kv_cache.empty(len(IDS), T, 2, 1, 1, jnp.float32, by_head=(by_head,), score=jnp.float32)
    ends = np.random.default_rng(0).integers(0, 2 * T, (*IDS.shape, by_head))
    k = jnp.repeat(marked(IDS.shape), 2, axis=2)
    score = jnp.broadcast_to(marked(IDS.shape)[..., 0], (*IDS.shape, by_head))
    evict = jax.jit(kv_cache.evict)
    by_mark = {float(k[b, t, 0, 0]): ends[b, t] for b, t in np.ndindex(IDS.shape)}
    start = 0
    for n in pieces:
        part = slice(start, start + n)
        start += n
        marks = np.asarray(cache["k"])[:, :, 0, 0] if by_head == 1 else np.asarray(cache["k"])[..., 0]
        old = np.vectorize(lambda m, h: by_mark.get(float(m), ends[0, 0])[h])(
            marks.reshape(*marks.shape[:2], -1), np.arange(by_head)
        )
        new = {"k": k[:, part], "v": -k[:, part], "score": score[:, part]}
        if start > n:  # a document that starts with a call finds an empty cache
            starts = (IDS[:, part][:, :1] != IDS[:, start - n - 1 : start - n]) & (IDS[:, part][:, :1] != 0)
            cache = jax.tree.map(lambda x, s=starts: jnp.where(s.reshape(-1, *[1] * (x.ndim - 1)), 0, x), cache)
        cache = evict(
            cache, new, PLACES[:, part], IDS[:, part], ends=jnp.asarray(ends[:, part]), old_ends=jnp.asarray(old)
        )
    for b, h in np.ndindex(len(IDS), by_head):
        real = np.flatnonzero(IDS[b])
        own = [t for t in real if IDS[b, t] == IDS[b, real[-1]]]
        alive = {int(PLACES[b, t]) for t in own if ends[b, t, h] > PLACES[b, own[-1]]} if own else set()
        taken = np.flatnonzero(cache["segment_ids"][b, :, h])
        assert sorted(np.asarray(cache["positions"])[b, taken, h]) == sorted(alive)
        for s in taken:
            t = next(t for t in own if PLACES[b, t] == cache["positions"][b, s, h])
            held = [cache["k"][b, s, h, 0], -cache["v"][b, s, h, 0], cache["score"][b, s, h]]
            assert_equal("what is held", held, np.repeat(k[b, t, 0, 0], 3))
