"""Attention under masks of tokens and blocks: both forms against numpy in fp64, with gradients by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention
from hydrax.ops.sparse import block_mask_attention, masked_attention
from hydrax.ops.sparse.masks import FULL, IMPLS, PARTIAL, SKIP
from tests.tolerances import TOLERANCE, assert_close, assert_equal

B, T, H, Hk, K, V = 2, 37, 4, 2, 8, 6
BLOCK = (8, 4)
IDS = np.ones((B, T), np.int32)
IDS[0, 13:] = 2
IDS[1, 30:] = 0


def inputs() -> dict[str, np.ndarray]:
    normal = np.random.default_rng(0).normal
    return {"q": 2 * normal(size=(B, T, H, K)), "k": normal(size=(B, T, Hk, K)), "v": normal(size=(B, T, Hk, V))}


def block_map(heads: int = H) -> np.ndarray:
    """Random blocks: the past full or left out, the diagonal partial but for a few, the future anything."""
    rng = np.random.default_rng(1)
    first, start = np.arange(5)[:, None] * BLOCK[0], np.arange(10) * BLOCK[1]
    past, diagonal = start + BLOCK[1] <= first, (start < first + BLOCK[0]) & (start + BLOCK[1] > first)
    some = rng.random((B, heads, 5, 10)) < 0.4
    bm = np.where(past & some, FULL, SKIP)
    return np.where(diagonal & (some | (start == first)), PARTIAL, bm)


def mask_of(bm: np.ndarray) -> np.ndarray:
    """The pairs [B,H,T,T] that a map keeps, by the words of the definition."""
    mask = np.zeros((B, H, T, T), bool)
    for b, h, t in np.ndindex(B, H, T):
        for s in range(t + 1):
            kept = bm[b % bm.shape[0], h % bm.shape[1], t // BLOCK[0], s // BLOCK[1]] != SKIP
            mask[b, h, t, s] = kept and IDS[b, t] == IDS[b, s] != 0
    return mask


def oracle(mask: np.ndarray, do: np.ndarray, dlse: np.ndarray) -> dict[str, np.ndarray]:
    """Output, lse and gradients in fp64, with every key head repeated."""
    x = inputs()
    k, v = (np.repeat(x[name], H // Hk, axis=2) for name in "kv")
    e = np.where(mask, np.exp(np.einsum("bthk,bshk->bhts", x["q"], k) / np.sqrt(K)), 0)
    total = e.sum(-1)
    p = e / np.where(total > 0, total, 1)[..., None]
    dp = np.einsum("bthv,bshv->bhts", do, v)
    dlse = np.where(total > 0, np.moveaxis(dlse, 2, 1), 0)
    dz = p * (dp + (dlse - (p * dp).sum(-1))[..., None]) / np.sqrt(K)
    fold = (B, T, Hk, H // Hk, -1)
    with np.errstate(divide="ignore"):
        lse = np.moveaxis(np.log(total), 1, 2)
    return {
        "o": np.einsum("bhts,bshv->bthv", p, v),
        "lse": lse,
        "dq": np.einsum("bhts,bshk->bthk", dz, k),
        "dk": np.einsum("bhts,bthk->bshk", dz, x["q"]).reshape(fold).sum(3),
        "dv": np.einsum("bhts,bthv->bshv", p, do).reshape(fold).sum(3),
    }


def cotangents() -> tuple[np.ndarray, np.ndarray]:
    normal = np.random.default_rng(2).normal
    return normal(size=(B, T, H, V)), normal(size=(B, T, H))


def outcome(f: functools.partial) -> dict[str, np.ndarray]:
    """Output, lse and gradients of attention by `f`."""
    do, dlse = (jnp.asarray(x, jnp.float32) for x in cotangents())

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        out, pullback = jax.vjp(lambda *x: f(*x, return_lse=True), q, k, v)
        return out, pullback((do, dlse))

    (o, lse), (dq, dk, dv) = run(*(jnp.asarray(x, jnp.float32) for x in inputs().values()))
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def compare(actual: dict, expected: dict) -> None:
    nothing = np.isneginf(expected["lse"])
    assert_equal("rows that keep nothing", np.isneginf(actual["lse"]), nothing)
    for name, value in expected.items():
        where = ~nothing if name == "lse" else ...
        assert_close(name, np.asarray(actual[name])[where], value[where], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [1, H])
def test_blocks_match_the_definition(impl: str, heads: int) -> None:
    bm = block_map(heads)
    f = functools.partial(block_mask_attention, bm=bm, block=BLOCK, segment_ids=jnp.asarray(IDS), impl=impl)
    compare(outcome(f), oracle(mask_of(bm), *cotangents()))


def test_a_mask_of_tokens_matches_the_definition() -> None:
    mask = np.random.default_rng(3).random((B, H, T, T)) < 0.3
    mask &= (IDS[:, None, :, None] == IDS[:, None, None]) & (IDS[:, None, None] != 0)
    f = functools.partial(masked_attention, kept=jnp.asarray(mask), chunk_size=8)
    compare(outcome(f), oracle(mask & np.tri(T, dtype=bool), *cotangents()))


def test_a_map_of_everything_is_full_attention_with_its_gradients() -> None:
    bm = np.full((1, 1, 5, 10), PARTIAL)
    ids = jnp.asarray(IDS)
    actual = outcome(functools.partial(block_mask_attention, bm=bm, block=BLOCK, segment_ids=ids))
    expected = outcome(functools.partial(attention, segment_ids=ids))
    compare(actual, {name: np.asarray(x, np.float64) for name, x in expected.items()})


def test_the_soft_cap_does_not_uncover_what_is_masked() -> None:
    x = {name: jnp.asarray(a, jnp.float32) for name, a in inputs().items()}
    kept = jnp.eye(T, dtype=bool)[None, None]
    o = masked_attention(**x, kept=kept, softcap=0.1)
    assert_close("own values", o, jnp.repeat(x["v"], H // Hk, axis=2), TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bm": np.full((1, 1, 5, 9), PARTIAL)}, "expected"),
        ({"bm": np.full((1, 1, 5, 10), FULL)}, "expected full blocks of keys only where they end before"),
        ({"bm": np.full((1, 1, 5, 10), SKIP)}, "at least one block of keys"),
        ({"bm": np.full((1, 1, 5, 10), 7)}, "expected 0"),
        ({"bm": jnp.full((1, 1, 5, 10), PARTIAL), "impl": "gather"}, "numpy array"),
        ({"bm": np.full((1, 1, 5, 10), PARTIAL), "impl": "fast"}, "expected one of masked, gather"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        block_mask_attention(**{name: jnp.asarray(x) for name, x in inputs().items()}, block=BLOCK, **change)
