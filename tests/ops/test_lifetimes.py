"""Every pattern of lifetimes against the words of its definition, pair by pair; and what a cache needs for it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention, attention_matrix
from hydrax.ops.sparse import lifetime_attention
from hydrax.ops.sparse.lifetimes import (
    AnchoredBlocks,
    LogBands,
    Neighbourhood,
    Pattern,
    ShiftedGroups,
    Spans,
    Strided,
    Window,
)
from tests.contract.cases import normal, segments
from tests.parallel.devices import shapes
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T, HEADS = 40, 2
Sees = Callable[[int, int, int], bool]
"""Whether query t sees key j <= t in head h of the keys."""


def neighbourhood(w: int, s: int, dilation: int = 1) -> Sees:
    def sees(t: int, j: int, h: int) -> bool:
        leader = t // dilation // s * s + s - 1
        return t % dilation == j % dilation and j // dilation >= leader - (w - 1)

    return sees


def strided(b: int, L: int, vs: int, step: int = 1, offset: int = 0, dense: int = 0) -> Sees:
    def sees(t: int, j: int, h: int) -> bool:
        return t // b - j // b < L or (j // b + h * step + offset) % vs == 0 or h >= HEADS - dense

    return sees


def shifted_groups(g: int, offsets: tuple[int, ...]) -> Sees:
    def sees(t: int, j: int, h: int) -> bool:
        starts = [0, *range(offsets[h] or g, 2 * T, g)]
        return sum(s <= t for s in starts) == sum(s <= j for s in starts)

    return sees


def log_bands(w: int) -> Sees:
    def sees(t: int, j: int, h: int) -> bool:
        power = 1
        while j and j % (2 * power) == 0:
            power *= 2
        return j == 0 or t < j + w * power

    return sees


TABLE: dict[str, tuple[Pattern, Sees]] = {
    "window": (Window(5), lambda t, j, h: t - j < 5),
    "window_sinks": (Window(5, sink_tokens=3), lambda t, j, h: t - j < 5 or j < 3),
    "neighbourhood": (Neighbourhood(7, 3), neighbourhood(7, 3)),
    "neighbourhood_blocked": (Neighbourhood(4, 4), neighbourhood(4, 4)),
    "neighbourhood_dilated": (Neighbourhood(4, 2, dilation=3), neighbourhood(4, 2, 3)),
    "strided": (Strided(3, 2, 4, HEADS), strided(3, 2, 4)),
    "strided_dense": (Strided(3, 1, 3, HEADS, step=2, offset=1, dense=1), strided(3, 1, 3, 2, 1, 1)),
    "strided_homogeneous": (Strided(3, 2, 3, HEADS, step=0), strided(3, 2, 3, 0)),
    "shifted_groups": (ShiftedGroups(8, (0, 4)), shifted_groups(8, (0, 4))),
    "spans": (Spans(4, ((1, 3),)), lambda t, j, h: t // 4 - j // 4 < (1, 3)[h] or j < 4),
    "log_bands": (LogBands(4), log_bands(4)),
    "log_bands_odd": (LogBands(3), log_bands(3)),
    "anchored_blocks": (AnchoredBlocks(6), lambda t, j, h: t // 6 == j // 6 or j < 6),
}


def visible(sees: Sees, n: int = T) -> np.ndarray:
    """[HEADS,n,n]."""
    return np.array([[[j <= t and sees(t, j, h) for j in range(n)] for t in range(n)] for h in range(HEADS)])


@pytest.mark.parametrize("name", TABLE)
def test_lifetimes_are_the_words_of_the_definition(name: str) -> None:
    """In a packed row, where positions count from the start of each document, and under `jit`."""
    pattern, sees = TABLE[name]
    ids = np.stack([segments((T,), T), segments((13, 22), T)])
    index = np.arange(T) - 13 * (ids == 2)
    q, k = (jnp.asarray(normal(i, 2, T, heads, 4)) for i, heads in enumerate((2 * HEADS, HEADS)))

    @jax.jit
    def weights(positions: jax.Array) -> jax.Array:
        ends = pattern.ends(positions)
        assert ends.shape == (2, T, pattern.rows)
        facts = {"segment_ids": jnp.asarray(ids), "positions": positions, "dilation": pattern.dilation}
        return attention_matrix(q, k, ends=ends, **facts)

    want = visible(sees)
    want = np.stack([want, want])
    want[1, :, 13:35, 13:35] = want[1, :, :22, :22]
    want[1, :, 13:, :13], want[1, :, 35:], want[1, :, :, 35:] = False, False, False
    assert_equal("visible", weights(jnp.asarray(index)) > 0, np.repeat(want, 2, axis=1))


@pytest.mark.parametrize("name", TABLE)
def test_nothing_but_the_first_tokens_is_seen_from_beyond_the_reach(name: str) -> None:
    pattern, sees = TABLE[name]
    t, j = np.indices((T, T))
    far = visible(sees) & (j >= pattern.first)
    if pattern.reach is None:
        assert far[:, -1, pattern.first].any() or far[:, -1, 1:17].any()
    else:
        assert np.max((t - j) * far) + 1 == pattern.reach


@pytest.mark.parametrize("n", [1, 9, T])
@pytest.mark.parametrize("name", TABLE)
def test_slots_and_visible_keys_are_counted(name: str, n: int) -> None:
    """A key takes a slot from its own token to the last that sees it."""
    pattern, sees = TABLE[name]
    seen = visible(sees, 2 * T)
    alive = np.flip(np.maximum.accumulate(np.flip(seen, 1), 1), 1) & np.tri(2 * T, dtype=bool)
    assert pattern.slots(n) == alive[:, :n, :n].sum(2).max()
    assert pattern.visible(n) == pytest.approx(seen[: pattern.rows, :n, :n].sum(2).mean())


def test_bands_of_distance_need_few_slots() -> None:
    """w + (w/2) log2(T/w) = 352 for a window of 64 and 32768 tokens."""
    assert LogBands(64).slots(32768) == 352


def test_a_strided_row_of_blocks() -> None:
    """Two local blocks, every third kept: row 5 sees the blocks 0, 3, 4, 5, row 6 the blocks 0, 3, 5, 6."""
    pattern = Strided(1, 2, 3, 1)
    ends = pattern.ends(np.arange(7)[None])[0, :, 0]
    assert [[j for j in range(t + 1) if ends[j] >= t] for t in (5, 6)] == [[0, 3, 4, 5], [0, 3, 5, 6]]


@pytest.mark.parametrize(
    ("heads", "stride", "step", "dense", "whole"),
    [
        (3, 3, 1, 0, True),
        (4, 3, 1, 0, True),
        (2, 3, 1, 0, False),
        (3, 3, 0, 0, False),
        (4, 4, 2, 0, False),
        (2, 3, 1, 1, True),
    ],
)
def test_heads_together_see_everything_iff_they_keep_every_remainder(
    heads: int, stride: int, step: int, dense: int, whole: bool
) -> None:
    ends = Strided(2, 1, stride, heads, step=step, dense=dense).ends(np.arange(T)[None])[0]
    seen = (ends[None] >= np.arange(T)[:, None, None]).any(2)
    assert seen[np.tri(T, dtype=bool)].all() == whole


def test_layers_have_spans_of_their_own() -> None:
    """The index of the layer may be a traced number; layers beyond the list are as its last row."""
    pattern, p = Spans(2, ((1, 2), (3, 1))), np.arange(8)[None]
    ends = jax.jit(pattern.ends)
    for layer, row in ((0, 0), (1, 1), (5, 1)):
        alone = dataclasses.replace(pattern, blocks=(pattern.blocks[row],))
        assert_equal(f"layer {layer}", ends(jnp.asarray(p), jnp.int32(layer)), alone.ends(p))
    assert pattern.slots(8) == max(dataclasses.replace(pattern, blocks=(row,)).slots(8) for row in pattern.blocks)


def test_lifetimes_for_ever_are_causal_attention() -> None:
    """Equal outputs and gradients, and none for the ends; a bias that all keys share changes nothing."""
    q, k, v, do = (jnp.asarray(normal(i, 2, T, heads, 4)) for i, heads in enumerate((4, 2, 2, 4)))
    ends, bias = jnp.full((1, T, 1), 2**30), jnp.full((1, T, 1), 0.7)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple:
        full = jax.vjp(attention, q, k, v)
        alive = jax.vjp(lambda q, k, v, bias: lifetime_attention(q, k, v, ends, key_bias=bias), q, k, v, bias)
        return (full[0], *full[1](do)), (alive[0], *alive[1](do))

    want, got = both(q, k, v, bias)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=False):
        assert_close(name, a, b, TOLERANCE["fp32_op"])
    assert_close("dbias, of a shift", got[4].sum(), 0.0, TOLERANCE["fp32_op"], floor=1.0)


def test_a_dilation_below_one_is_refused() -> None:
    x = jnp.zeros((1, 5, 2, 4))
    with pytest.raises(ValueError, match="dilation = 0: expected at least 1"):
        attention(x, x, x, dilation=0)


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("name", ["window_sinks", "strided", "log_bands"])
def test_blocks_of_queries_meet_the_living_keys_alone(name: str, documents: bool) -> None:
    """With the number of these, chunks of 4 tokens give what all scores at once give, with all gradients."""
    pattern = TABLE[name][0]
    q, k, v, do = (jnp.asarray(normal(i, 2, T, heads, 4)) for i, heads in enumerate((4, HEADS, HEADS, 4)))
    bias, facts = jnp.asarray(normal(4, 2, T, HEADS)), {}
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    if documents:
        ids = np.stack([segments((14, 1, 18), T), segments((3, 37), T)])
        facts["segment_ids"] = jnp.asarray(ids)
        positions = jnp.asarray([[list(row[:t]).count(row[t]) for t in range(T)] for row in ids])
    facts |= {"ends": pattern.ends(positions), "positions": positions, "return_lse": True}

    @functools.partial(jax.jit, static_argnums=4)
    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, how: tuple) -> tuple:
        out, pull = jax.vjp(lambda q, k, v, b: attention(q, k, v, key_bias=b, **facts, **dict(how)), q, k, v, bias)
        seen = jnp.isfinite(out[1])
        return jnp.where(seen, out[1], 0), out[0], *pull((do, jnp.where(seen, do[..., 0], 0)))

    chunks = (("impl", "chunked"), ("chunk_size", 4))
    want = run(q, k, v, bias, (("impl", "xla"),))
    got = run(q, k, v, bias, (*chunks, ("alive", pattern.slots(T))))
    for what, a, b in zip(("lse", "o", "dq", "dk", "dv", "dbias"), got, want, strict=True):
        assert_close(what, a, b, TOLERANCE["fp32_op"])

    def widths(how: tuple) -> set[int]:
        """Last dimensions of the scores of a block [B,G,4,R,·]."""
        program = run.lower(q, k, v, bias, how).compile().as_text()
        return {shape[-1] for shape in shapes(program) if len(shape) == 5 and shape[2:4] == [4, 2]}

    assert max(widths(chunks)) == T and max(widths((*chunks, ("alive", pattern.slots(T))))) == pattern.slots(T) + 4
